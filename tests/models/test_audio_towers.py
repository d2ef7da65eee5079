"""Audio towers: independent of padding and company, deterministic, and trainable in every parameter."""

import pytest
import torch
from torch import nn

from ask_ray.models.audio_towers import AudioTower, ResNet38, TinyAudio, positions

LENGTHS = [1600, 5000, 8001, 16000]


def tiny(**changes: float) -> TinyAudio:
    torch.manual_seed(0)
    return TinyAudio(**{"sample_rate": 16000, "width": 0.5, "dropout": 0.1, "freq_mask": 8, "time_mask": 16} | changes)


def resnet(width: float = 0.125) -> ResNet38:
    torch.manual_seed(0)
    return ResNet38(width, 8, 16)


def batch(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of noise, with louder noise where a batch is padded: towers must not hear it."""
    waves = torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(seed))
    for row, length in zip(waves, lengths, strict=True):
        row[:length] *= 0.1
    return waves, torch.tensor(lengths)


def warm(tower: AudioTower) -> AudioTower:
    """The tower in eval mode, with batch statistics that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return tower.eval()


@pytest.mark.parametrize(("make", "scale"), [(tiny, 1), (resnet, 2)])
def test_a_batch_gives_what_its_clips_give_one_by_one(make, scale: int) -> None:
    tower = warm(make())
    waves, lengths = batch([scale * length for length in LENGTHS])
    with torch.no_grad():
        together = tower(waves, lengths)
        alone = [tower(wave[None, :length], length[None])[0] for wave, length in zip(waves, lengths, strict=True)]
    assert together.shape == (len(LENGTHS), tower.width)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_resnet38_gives_equal_clips_what_they_give_one_by_one() -> None:
    tower = warm(resnet())
    waves, lengths = batch([32000, 32000, 32000])
    with torch.no_grad():
        alone = torch.cat([tower(wave[None], lengths[:1]) for wave in waves])
        torch.testing.assert_close(tower(waves, lengths), alone, atol=1e-5, rtol=1e-5)


def test_tiny_tower_in_training_does_not_depend_on_how_a_batch_is_split() -> None:
    tower = tiny(dropout=0.0, freq_mask=0, time_mask=0).train()
    waves, lengths = batch(LENGTHS)
    parts = torch.cat([tower(waves[:2, :5000], lengths[:2]), tower(waves[2:], lengths[2:])])
    torch.testing.assert_close(tower(waves, lengths), parts, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny, resnet])
def test_eval_repeats_itself_and_training_augments(make) -> None:
    waves, lengths = batch([16000, 16000])
    tower = make().eval()
    with torch.no_grad():
        assert torch.equal(tower(waves, lengths), tower(waves, lengths))
        tower.train()
        assert not torch.equal(tower(waves, lengths), tower(waves, lengths))


@pytest.mark.parametrize("make", [tiny, resnet])
def test_gradients_reach_every_parameter(make) -> None:
    tower = make().train()
    waves, lengths = batch([16000, 32000])
    (tower(waves, lengths) * torch.randn(2, tower.width)).sum().backward()
    silent = [name for name, parameter in tower.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


@pytest.mark.parametrize("make", [tiny, resnet])
@pytest.mark.parametrize("samples", [1, 160, 3200, 400_000])
def test_any_length_is_heard(make, samples: int) -> None:
    tower = make().eval()
    with torch.no_grad():
        assert tower(0.1 * torch.randn(1, samples), torch.tensor([samples])).isfinite().all()


@pytest.mark.parametrize("width", [0.01, 0.25, 1.0, 1.3])
def test_width_scales_the_tiny_tower(width: float) -> None:
    tower = tiny(width=width)
    assert tower.width == max(8, round(24 * width) * 8)
    assert tower(*batch([3200, 1600])).shape == (2, tower.width)


@pytest.mark.parametrize("rate", [4000, 22050, 48000])
def test_the_tiny_tower_takes_any_rate(rate: int) -> None:
    tower = tiny(sample_rate=rate)
    assert tower.sample_rate == rate
    assert tower(*batch([rate, rate // 2])).isfinite().all()


def test_the_tiny_tower_hears_order() -> None:
    """A few steps are enough to tell a low tone before a high one from a high one before a low one."""
    time = torch.arange(8000) / 16000
    low, high = torch.sin(2 * torch.pi * 300 * time), torch.sin(2 * torch.pi * 2000 * time)
    waves = 0.3 * torch.stack([torch.cat([low, high]), torch.cat([high, low])])
    tower = tiny(dropout=0.0, freq_mask=0, time_mask=0)
    classify = nn.Linear(tower.width, 2)
    optimiser = torch.optim.AdamW([*tower.parameters(), *classify.parameters()], 1e-3)
    lengths, labels = torch.tensor([16000, 16000]), torch.tensor([0, 1])
    for _ in range(40):
        loss = nn.functional.cross_entropy(classify(tower(waves, lengths)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1


def test_positions_differ_and_do_not_depend_on_how_many_there_are() -> None:
    many = positions(500, 32, torch.device("cpu"))
    assert torch.equal(many[:100], positions(100, 32, torch.device("cpu")))
    assert torch.cdist(many, many).add(torch.eye(500)).min() > 0.1


def test_resnet38_norms_bands_over_the_clips_own_frames_only() -> None:
    tower = resnet().train()
    tower.bn0.momentum = 1.0
    waves, lengths = batch([16000, 48000])
    tower(waves, lengths)
    features, frames = tower.front(waves, lengths)
    own = torch.cat([row[:count] for row, count in zip(features, frames, strict=True)])
    torch.testing.assert_close(tower.bn0.running_mean, own.mean(0))
