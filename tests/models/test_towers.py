"""Every tower the settings can name, at reduced width: independent of its batch, repeatable, trainable in every parameter."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ask_ray import config
from ask_ray.config import AskSettings, ModelSettings, Settings, SettingsError, TrainingSettings
from ask_ray.data.batches import Batch
from ask_ray.models import registry
from ask_ray.models.audio_towers import AudioTower
from ask_ray.models.pooling import Encoded
from ask_ray.models.text_towers import TextTower
from ask_ray.training.step import Stepper

LISTENERS = ("ast", "wav2vec2", "hubert", "whisper", "clap", "clap-fused")
AUDIO = (*config.AUDIO_TOWERS, *(f"hf:{name}" for name in LISTENERS))
TEXT = (*config.TEXT_TOWERS, "bert published", "roberta published", "sonar published", "hf:bert", "hf:bart", "hf:minilm")
RATES = {"resnet38": 32000, "hf:clap": 48000, "hf:clap-fused": 48000}
CAPTIONS = ["", "a dog barks", "rain falls, then a siren wails and a man speaks", "a man speaks, then rain falls"]


def audio_settings(name: str, models: dict[str, Path]) -> ModelSettings:
    if name.startswith("hf:"):
        name = f"hf:{models[name.removeprefix('hf:')]}"
    return ModelSettings(audio=name, width=0.08, dim=16, dropout=0.0, freq_mask=0, time_mask=0)


def text_settings(name: str, models: dict[str, Path], minilm: str) -> ModelSettings:
    family, _, published = name.partition(" ")
    if family.startswith("hf:"):
        family = f"hf:{minilm if family == 'hf:minilm' else models[family.removeprefix('hf:')]}"
    weights = str(models[family]) if published else None
    return ModelSettings(text=family, text_weights=weights, width=0.08, dim=16, dropout=0.0, max_words=24)


@pytest.fixture
def audio(request, models) -> AudioTower:
    torch.manual_seed(0)
    return registry.audio_tower(audio_settings(request.param, models), RATES.get(request.param, 16000))


@pytest.fixture
def text(request, models, minilm) -> TextTower:
    torch.manual_seed(0)
    return registry.text_tower(text_settings(request.param, models, minilm))


def clips(rate: int, seconds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Clips of noise, with louder noise where the batch is padded: towers must not hear it."""
    lengths = torch.tensor([round(rate * length) for length in seconds])
    waves = torch.randn(len(seconds), int(lengths.max()), generator=torch.Generator().manual_seed(0))
    for number, (row, length) in enumerate(zip(waves, lengths, strict=True)):
        row[:length] *= 0.05 * (number + 1)
    return waves, lengths


def warm(tower: nn.Module) -> nn.Module:
    """The tower in eval mode, with batch statistics that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return tower.eval()


@pytest.mark.parametrize("audio", AUDIO, indirect=True)
def test_a_batch_of_clips_gives_what_they_give_one_by_one_and_gives_it_again(audio) -> None:
    warm(audio)
    waves, lengths = clips(audio.sample_rate, (0.05, 1.0, 1.0, 3.1, 11.7))
    with torch.no_grad():
        together = audio(waves, lengths)
        assert torch.equal(audio(waves, lengths), together)
        made = audio.encode(waves, lengths)
        single = [audio.encode(wave[None, :length], length[None]) for wave, length in zip(waves, lengths, strict=True)]
    same_tokens(made, single, audio.token_width)
    assert torch.equal(made.vectors, together)
    assert together.shape == (5, audio.width)
    scale = together.abs().max().clamp(min=1)
    alone = torch.cat([one.vectors for one in single])
    torch.testing.assert_close(together / scale, alone / scale, atol=1e-5, rtol=1e-5)
    assert torch.pdist(together).min() > 1e-4


@pytest.mark.parametrize("text", TEXT, indirect=True)
def test_a_batch_of_captions_gives_what_they_give_one_by_one_and_gives_it_again(text) -> None:
    text.eval()
    tokens = text.tokenise(CAPTIONS)
    with torch.no_grad():
        together = text(*tokens)
        assert torch.equal(text(*tokens), together)
        made, single = text.encode(*tokens), [text.encode(*text.tokenise([caption])) for caption in CAPTIONS]
    same_tokens(made, single, text.token_width)
    assert torch.equal(made.vectors, together)
    assert torch.equal(made.mask, tokens[1])
    assert together.shape == (len(CAPTIONS), text.width)
    torch.testing.assert_close(together, torch.cat([one.vectors for one in single]), atol=1e-5, rtol=1e-5)
    assert torch.pdist(together).min() > 1e-3


def same_tokens(together: Encoded, alone: list[Encoded], width: int) -> None:
    """Every row of a batch has at least one token, and its tokens are those that it has alone."""
    scale = together.tokens[together.mask].abs().max().clamp(min=1)
    assert together.tokens.isfinite().all()
    for tokens, mask, one in zip(together.tokens, together.mask, alone, strict=True):
        own = one.tokens[one.mask]
        assert own.shape == (max(1, int(mask.sum())), width)
        torch.testing.assert_close(tokens[mask] / scale, own / scale, atol=1e-5, rtol=1e-5)


def still(model: ModelSettings, rate: int, side: str) -> list[str]:
    """Parameters of one tower that real steps on a batch of different pairs leave as they were."""
    torch.manual_seed(0)
    training = TrainingSettings(epochs=1, warmup_share=0.0)
    settings = Settings(model=model, ask=AskSettings(enabled=False), training=training)
    encoder = registry.build(settings.model, rate)
    assert all(module.training for module in getattr(encoder, side).modules()), "built to be trained"
    stepper = Stepper(encoder, encoder, settings, 50, torch.device("cpu"))
    waves, lengths = clips(rate, (1.0, 1.0, 1.0, 0.7))
    words, mask = encoder.tokenise(CAPTIONS)
    ids = torch.arange(4)
    before = {name: parameter.detach().clone() for name, parameter in getattr(encoder, side).named_parameters()}
    for _ in range(3):
        figures = stepper.take(Batch(waves, lengths, words, mask, ids, torch.zeros_like(ids)), None).figures
        assert figures["loss"].isfinite()
        assert figures["gradient_norm"] > 0
    after = dict(getattr(encoder, side).named_parameters())
    return [name for name, value in before.items() if after[name].requires_grad and torch.equal(after[name], value)]


@pytest.mark.parametrize("name", AUDIO)
def test_real_steps_move_every_parameter_of_an_audio_tower(name: str, models) -> None:
    assert still(audio_settings(name, models), RATES.get(name, 16000), "audio") == []


@pytest.mark.parametrize("name", TEXT)
def test_real_steps_move_every_parameter_of_a_text_tower(name: str, models, minilm) -> None:
    assert still(text_settings(name, models, minilm), 8000, "text") == []


@pytest.mark.parametrize("name", sorted(set(AUDIO) - {"tiny"}))
def test_a_rate_that_a_tower_does_not_take_is_refused(name: str, models) -> None:
    right = RATES.get(name, 16000)
    with pytest.raises(SettingsError, match=rf"data\.sample_rate is 22050 .*hears {right} Hz: set data\.sample_rate={right}"):
        registry.audio_tower(audio_settings(name, models), 22050)


@pytest.mark.parametrize("side", ["audio", "text"])
def test_weights_beside_a_tower_that_names_its_own_are_refused(side: str) -> None:
    for name in ("tiny", "hf:some/model"):
        settings = ModelSettings(**{side: name, f"{side}_weights": "w.pth"})
        with pytest.raises(SettingsError, match=rf"model\.{side}_weights is w\.pth, but model\.{side}={name}"):
            registry.build(settings, 16000)
