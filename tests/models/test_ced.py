"""CED against PyTorch's own layers and torchaudio's front end, its chunks, and its published checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from ask_ray.config import ModelSettings
from ask_ray.data.frontend import CED_MEL, LogMel
from ask_ray.models.ced import CHUNK, DEPTH, HEADS, Ced, chunked
from ask_ray.models.registry import audio_tower
from ask_ray.models.weights import WeightsError

#: Millions of parameters, as the authors publish them, with the classifier of 527 AudioSet classes.
PUBLISHED = {"tiny": 5.5, "mini": 9.6, "small": 22, "base": 86}


def ced(**changes: float) -> Ced:
    torch.manual_seed(0)
    made = Ced(**{"size": "tiny", "width": 0.34, "freq_mask": 0, "time_mask": 0} | changes).eval()
    with torch.no_grad():
        made.init_bn.running_mean.fill_(-30)
        made.init_bn.running_var.uniform_(100, 200)
    return made


def reference(tower: Ced, wave: Tensor) -> Tensor:
    """The tokens of one clip of at most a chunk, from the paper's description and other libraries' layers."""
    mel = MelSpectrogram(16000, n_fft=512, win_length=512, hop_length=160, f_min=0, f_max=8000, n_mels=64)
    x = AmplitudeToDB(top_db=120)(mel(wave[None]))
    norm = tower.init_bn
    x = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    weights = tower.state_dict()
    x = nn.functional.conv2d(x[:, None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
    x = x + weights["time_pos_embed"][..., : x.shape[-1]] + weights["freq_pos_embed"]
    x = x.flatten(2).transpose(1, 2)
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
    }
    names |= {"norm1.": "norm1.", "norm2.": "norm2."}
    for number in range(DEPTH):
        block = nn.TransformerEncoderLayer(
            tower.width, tower.width // 64, 4 * tower.width, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        parts = [(there, here, kind) for there, here in names.items() for kind in ("weight", "bias")]
        block.load_state_dict({there + kind: weights[f"blocks.{number}.{here}{kind}"] for there, here, kind in parts})
        x = block.train()(x)  # without dropout; in eval mode it takes another path
    return nn.functional.layer_norm(x, (tower.width,), weights["norm.weight"], weights["norm.bias"], 1e-6)


@pytest.mark.parametrize("samples", [2400, 20000, 161920])
def test_a_clip_of_one_chunk_is_the_mean_of_its_tokens_as_the_paper_has_it(samples: int) -> None:
    tower = ced(width=0.67)
    wave = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    with torch.no_grad():
        made = tower(wave[None], torch.tensor([samples]))
        torch.testing.assert_close(made, reference(tower, wave).mean(1), atol=1e-4, rtol=1e-4)


def test_a_longer_clip_is_the_mean_over_all_tokens_of_chunks_encoded_alone() -> None:
    tower = ced()
    features, frames = torch.randn(1, 2 * CHUNK + 500, 64), torch.tensor([2 * CHUNK + 500])
    with torch.no_grad():
        tokens, mask = tower._tokens(*chunked(features, frames))
        alone = []
        for start in range(0, features.shape[1], CHUNK):
            part = features[:, start : start + CHUNK]
            alone.append(tower._tokens(part, torch.tensor([part.shape[1] // 16]))[0][0])
    assert [len(part) for part in alone] == [63 * 4, 63 * 4, 31 * 4]
    torch.testing.assert_close(tokens[mask], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_chunks_belong_to_their_clips_whatever_the_batch() -> None:
    """Six clips around the chunk's length: chunks of one clip are never another's."""
    tower = ced()
    seconds = (0.01, 10.11, 10.12, 10.5, 20.3, 31.0)
    lengths = torch.tensor([round(16000 * length) for length in seconds])
    waves = torch.randn(6, int(lengths.max()), generator=torch.Generator().manual_seed(0))
    for number, (row, length) in enumerate(zip(waves, lengths, strict=True)):
        row[:length] *= 0.02 * (number + 1)
    with torch.no_grad():
        together = tower(waves, lengths)
        alone = [tower(wave[None, :length], length[None])[0] for wave, length in zip(waves, lengths, strict=True)]
        shuffled = tower(waves[[3, 5, 0, 4, 1, 2]], lengths[[3, 5, 0, 4, 1, 2]])
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled, together[[3, 5, 0, 4, 1, 2]], atol=1e-5, rtol=1e-5)


def test_at_full_width_what_is_made_of_a_clip_does_not_depend_on_its_batch() -> None:
    tower = ced(width=1.0)
    lengths = torch.tensor([16000, 40000])
    waves = 0.1 * torch.randn(2, 40000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = tower(waves, lengths)
        alone = [tower(wave[None, :length], length[None])[0] for wave, length in zip(waves, lengths, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)


def test_training_augments_and_norms_bands_over_the_clips_own_frames_only() -> None:
    tower = ced(freq_mask=8, time_mask=16).train()
    tower.init_bn.momentum = 1.0
    waves, lengths = 0.1 * torch.randn(2, 48000), torch.tensor([16000, 48000])
    assert not torch.equal(tower(waves, lengths), tower(waves, lengths))
    features, frames = tower.front(waves, lengths)
    own = torch.cat([row[:count] for row, count in zip(features, frames, strict=True)])
    torch.testing.assert_close(tower.init_bn.running_mean, own.mean(0))


@pytest.mark.parametrize("size", HEADS)
def test_the_full_width_has_as_many_parameters_as_published(size: str, monkeypatch) -> None:
    front = LogMel(CED_MEL)  # looks at its own values
    monkeypatch.setattr("ask_ray.models.ced.LogMel", lambda mel: front)
    with torch.device("meta"):  # shapes alone: there is no weight to draw
        tower = Ced(size, 1.0, 0, 0)
    width = tower.width
    blocks = DEPTH * (12 * width**2 + 13 * width)
    others = 256 * width + width + (63 + 4) * width + 2 * width + 2 * 64
    assert sum(parameter.numel() for parameter in tower.parameters()) == blocks + others
    assert {"tiny": 192, "mini": 256, "small": 384, "base": 768}[size] == width
    classifier = 2 * width + 527 * width + 527
    assert (blocks + others + classifier) / 1e6 == pytest.approx(PUBLISHED[size], rel=0.02)


def published_names() -> list[str]:
    """The names in the checkpoints on the hub."""
    names = ["init_bn." + part for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    names += ["time_pos_embed", "freq_pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    for number in range(12):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names += [f"blocks.{number}.{part}.weight", f"blocks.{number}.{part}.bias"]
    names = [f"encoder.{name}" for name in [*names, "norm.weight", "norm.bias"]]
    return names + [f"outputlayer.{number}.{kind}" for number in (0, 1) for kind in ("weight", "bias")]


def authors_name(name: str) -> str:
    """The name in the authors' own files, which hold the front end's buffers too."""
    return name.removeprefix("encoder.").replace("init_bn.", "init_bn.1.")


def published(tower: Ced) -> dict[str, Tensor]:
    own = tower.state_dict()
    return {name: own.get(name.removeprefix("encoder."), torch.ones(2)).clone() for name in published_names()}


@pytest.mark.parametrize("kind", ["folder", "safetensors", "authors", "pickled folder"])
def test_the_published_checkpoints_load(tmp_path: Path, kind: str) -> None:
    source = ced(width=1.0)
    tensors = published(source)
    place = tmp_path / "model.safetensors"
    if kind in ("folder", "safetensors"):
        save_file(tensors, place)
    elif kind == "authors":
        place = tmp_path / "audiotransformer_tiny_mAP_4814.pt"
        front = {"front_end.0.spectrogram.window": torch.ones(512), "front_end.0.mel_scale.fb": torch.ones(257, 64)}
        torch.save(front | {authors_name(name): tensor for name, tensor in tensors.items()}, place)
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    weights = str(tmp_path if "folder" in kind else place)
    built = audio_tower(ModelSettings(audio="ced-tiny", audio_weights=weights, width=0.25), 16000)
    assert built.training
    waves, lengths = 0.1 * torch.randn(1, 16000), torch.tensor([16000])
    with torch.no_grad():
        assert torch.equal(built.eval()(waves, lengths), source(waves, lengths))


def test_weights_of_another_size_or_architecture_are_refused_and_name_the_first_keys(tmp_path: Path, models) -> None:
    save_file(published(ced(width=1.0)), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.audio_weights: .* blocks\.0\.attn\.proj\.bias \(192,\) instead of \(256,\)"):
        audio_tower(ModelSettings(audio="ced-mini", audio_weights=str(tmp_path)), 16000)
    with pytest.raises(WeightsError, match=r"missing: blocks\.0\..*unexpected: .*audio_spectrogram_transformer\."):
        audio_tower(ModelSettings(audio="ced-tiny", audio_weights=str(models["ast"])), 16000)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        audio_tower(ModelSettings(audio="ced-tiny", audio_weights=str(tmp_path)), 16000)
