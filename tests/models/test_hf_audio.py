"""Audio models of transformers as towers: what they hear, how they are pooled, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ASTFeatureExtractor, ASTModel, AutoFeatureExtractor, ClapModel, Wav2Vec2Model

from ask_ray.config import SettingsError
from ask_ray.models.hf_audio import HfAudio, pieces_of, window
from ask_ray.models.weights import WeightsError


def noise(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))


def heard(tower: HfAudio, wave: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tower.eval()(wave[None], torch.tensor([len(wave)]))[0]


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "pooler"])
def test_ast_gives_what_transformers_gives(models, pooling: str) -> None:
    wave = noise(16000)
    inputs = AutoFeatureExtractor.from_pretrained(models["ast"])(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        output = ASTModel.from_pretrained(models["ast"]).eval()(**inputs)
    states = output.last_hidden_state[0]
    wanted = {"mean": states.mean(0), "max": states.amax(0), "first": states[0], "pooler": output.pooler_output[0]}
    torch.testing.assert_close(heard(HfAudio(str(models["ast"]), pooling), wave), wanted[pooling], atol=1e-5, rtol=1e-5)


def test_wav2vec2_hears_a_clip_without_its_padding(models) -> None:
    wave = noise(11000)
    inputs = AutoFeatureExtractor.from_pretrained(models["wav2vec2"])(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        states = Wav2Vec2Model.from_pretrained(models["wav2vec2"]).eval()(**inputs).last_hidden_state[0]
        tower = HfAudio(str(models["wav2vec2"]), "mean").eval()
        padded = torch.stack([torch.cat([wave, torch.ones(9000)]), noise(20000)])
        made = tower(padded, torch.tensor([11000, 20000]))[0]
    torch.testing.assert_close(made, states.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clap", "clap-fused"])
def test_claps_audio_tower_is_taken_alone_and_never_crops_at_random(models, name: str) -> None:
    tower = HfAudio(str(models[name]), "pooler")
    whole = sum(parameter.numel() for parameter in ClapModel.from_pretrained(models[name]).parameters())
    assert sum(parameter.numel() for parameter in tower.parameters()) < whole
    wave = noise(48000 * 11)
    halves = [heard(tower, half) for half in wave.tensor_split(2)]
    for _ in range(3):
        torch.testing.assert_close(heard(tower, wave), (halves[0] + halves[1]) / 2, atol=1e-5, rtol=1e-5)


def test_clips_are_split_evenly_at_the_models_window_and_lengthened_to_half_a_second() -> None:
    assert [len(piece) for piece in pieces_of(noise(25), 10, 4)] == [9, 8, 8]
    assert torch.equal(torch.cat(pieces_of(noise(25), 10, 4)), noise(25))
    (short,) = pieces_of(noise(3), None, 16000)
    assert short.shape == (8000,)
    assert torch.equal(short[:3], noise(3))
    assert not short[3:].any()
    assert len(pieces_of(noise(100_000), None, 16000)) == 1


def test_the_window_of_ast_is_what_its_extractor_keeps() -> None:
    extractor = ASTFeatureExtractor(max_length=64, do_normalize=False)
    longest = window(extractor)
    assert longest is not None
    frames = [
        extractor(noise(size).numpy(), sampling_rate=16000, return_tensors="pt")["input_values"]
        for size in (longest, longest - 1)
    ]
    assert [int((found[0].abs().sum(1) > 0).sum()) for found in frames] == [64, 63]


def test_a_pooling_that_a_model_lacks_is_refused(models) -> None:
    with pytest.raises(SettingsError, match=r"model\.audio_pooling.*choose mean"):
        HfAudio(str(models["wav2vec2"]), "pooler")


def test_what_is_no_audio_model_and_what_is_not_there_is_refused(models, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.audio: .*could not be loaded"):
        HfAudio(str(models["bert"]), "mean")
    with pytest.raises(WeightsError, match=r"model\.audio: no/such-model .*give a local folder"):
        HfAudio("no/such-model", "mean")
    with pytest.raises(WeightsError, match=r"model\.audio: .*could not be loaded.*give a local folder"):
        HfAudio(str(tmp_path), "mean")


def test_weights_that_lack_layers_or_have_other_shapes_are_refused(models, tmp_path: Path) -> None:
    folder = tmp_path / "ast"
    shutil.copytree(models["ast"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("layernorm.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing or differently shaped: layernorm\.weight"):
        HfAudio(str(folder), "mean")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(
        WeightsError, match=r"4 missing or differently.*\(32,\) instead of \(24,\)|\(16, 32\) instead of \(16, 24\)"
    ):
        HfAudio(str(folder), "mean")


def test_an_enclosing_autocast_does_not_reach_the_features(models) -> None:
    tower = HfAudio(str(models["ast"]), "mean")
    exact = tower._features(noise(16000).numpy())["input_values"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tower._features(noise(16000).numpy())["input_values"], exact)
