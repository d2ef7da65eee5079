"""The front ends against a direct numpy transform, and independent of padding."""

import warnings
from typing import Literal

import numpy as np
import pytest
import torch
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from ask_ray.data.frontend import CED_MEL, PANNS_MEL, TINY_MEL, LogMel, MelSpec, SpecAugment, mirrored, tiny_mel, valid


def slaney(hertz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    linear = hertz * 3 / 200
    return np.where(hertz < 1000, linear, 15 + 27 * np.log(np.maximum(hertz, 1e-9) / 1000) / np.log(6.4))


def oracle(wave: np.ndarray, spec: MelSpec, beyond: Literal["constant", "reflect"]) -> np.ndarray:
    """Log-mel features of one clip, frame by frame, with a plain discrete Fourier sum per frame.

    `beyond`: how numpy's padding continues the clip beyond its ends.
    """
    padded = np.pad(wave.astype(np.float64), spec.n_fft // 2, mode=beyond)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.n_fft) / spec.n_fft)
    starts = range(0, len(wave) + 1, spec.hop)
    power = np.stack([np.abs(np.fft.rfft(window * padded[at : at + spec.n_fft])) ** 2 for at in starts])
    grid = np.linspace(1e-3, spec.sample_rate / 2, 400_000)
    ends = np.linspace(*slaney(np.array([spec.f_min, spec.f_max], dtype=float)), spec.mels + 2)
    edges = np.interp(ends, slaney(grid), grid)
    bins = np.arange(spec.n_fft // 2 + 1) * spec.sample_rate / spec.n_fft
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.clip(np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)), 0, None)
    return 10 * np.log10(np.maximum(power @ (triangles * 2 / (high - low)).T, spec.amin))


def noisy(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def wavy(rate: int) -> torch.Tensor:
    """A third of a second of noise on a sine."""
    return noisy(rate // 3) + torch.sin(torch.arange(rate // 3) * 0.3)


def one(spec: MelSpec, wave: torch.Tensor) -> torch.Tensor:
    features, frames = LogMel(spec)(wave[None], torch.tensor([len(wave)]))
    assert features.shape == (1, int(frames), spec.mels)
    return features[0]


@pytest.mark.parametrize("spec", [TINY_MEL, tiny_mel(4000), tiny_mel(22050), tiny_mel(48000)])
def test_features_equal_a_direct_transform(spec: MelSpec) -> None:
    wave = wavy(spec.sample_rate)
    np.testing.assert_allclose(one(spec, wave).numpy(), oracle(wave.numpy(), spec, "constant"), atol=0.02)


def test_panns_features_continue_a_clip_mirrored_as_in_their_training() -> None:
    wave = wavy(PANNS_MEL.sample_rate)
    np.testing.assert_allclose(one(PANNS_MEL, wave).numpy(), oracle(wave.numpy(), PANNS_MEL, "reflect"), atol=0.02)


def test_ceds_features_are_those_of_torchaudios_defaults() -> None:
    wave = noisy(20000)
    wave[5000:9000] = 0
    mel = MelSpectrogram(16000, n_fft=512, hop_length=160, n_mels=64, f_min=0, f_max=8000)
    wanted = AmplitudeToDB(top_db=120)(mel(wave[None]))[0].T
    torch.testing.assert_close(one(CED_MEL, wave), wanted, atol=1e-3, rtol=1e-4)


def test_clips_are_mirrored_at_their_own_ends() -> None:
    rows = torch.tensor([[1.0, 2, 3, 4, 5], [1, 2, 3, 9, 9], [7, 9, 9, 9, 9]])
    made = mirrored(rows, torch.tensor([5, 3, 1]), 2)
    assert made.tolist() == [[3, 2, 1, 2, 3, 4, 5, 4, 3], [3, 2, 1, 2, 3, 2, 1, 0, 0], [7, 7, 7, 7, 7, 0, 0, 0, 0]]


@pytest.mark.parametrize("hertz", [100.0, 440.0, 3000.0, 7000.0])
def test_a_sine_is_loudest_in_its_band(hertz: float) -> None:
    spec = TINY_MEL
    wave = torch.sin(2 * np.pi * hertz * torch.arange(8000) / spec.sample_rate)
    low, high = slaney(np.array([spec.f_min, spec.f_max]))
    band = (slaney(np.array(hertz)) - low) / (high - low) * (spec.mels + 1) - 1
    assert abs(int(one(spec, wave)[5].argmax()) - band) <= 1


@pytest.mark.parametrize("spec", [TINY_MEL, PANNS_MEL, CED_MEL])
def test_padding_and_company_change_nothing(spec: MelSpec) -> None:
    lengths = torch.tensor([160, 3201, 9600])
    batch = torch.randn(3, 12000)  # loud rubbish beyond the clips' ends
    clips = [noisy(int(length), seed) for seed, length in enumerate(lengths)]
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    features, frames = LogMel(spec)(batch, lengths)
    for row, count, clip in zip(features, frames, clips, strict=True):
        torch.testing.assert_close(row[:count], one(spec, clip), atol=1e-4, rtol=1e-5)


def test_silence_is_the_floor_and_top_db_lifts_each_clips_own() -> None:
    assert (one(TINY_MEL, torch.zeros(1600)) == -100).all()
    spec = MelSpec(16000, 512, 320, 64, 50.0, 8000.0, 20.0)
    loud, quiet = noisy(16000), 0.001 * noisy(16000)
    features, _ = LogMel(spec)(torch.stack([loud, quiet]), torch.tensor([16000, 16000]))
    spread = features.amax((1, 2)) - features.amin((1, 2))
    torch.testing.assert_close(spread, torch.tensor([20.0, 20.0]))


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 16000, 22050, 32000, 44100, 48000])
def test_no_rate_leaves_a_mel_band_empty(rate: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        front = LogMel(tiny_mel(rate))
    assert (front.mel.fb.sum(0) > 0).all()
    assert tiny_mel(rate).n_fft >= rate * 0.032 > tiny_mel(rate).n_fft / 2


def test_an_enclosing_autocast_does_not_reduce_precision() -> None:
    wave = noisy(16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = one(TINY_MEL, wave)
    torch.testing.assert_close(features, one(TINY_MEL, wave), atol=0, rtol=0)


def test_valid_marks_each_rows_own_length() -> None:
    assert valid(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]


def test_spec_augment_masks_each_clip_within_bounds_and_only_in_training() -> None:
    torch.manual_seed(0)
    augment = SpecAugment(8, 16)
    features = torch.ones(64, 100, 64)
    masked = augment(features) == 0
    bands, stretches = masked.all(1).sum(1), masked.all(2).sum(1)
    assert bands.max() <= 8
    assert stretches.max() <= 16
    assert len(bands.unique()) > 3
    assert len(stretches.unique()) > 3
    assert (augment(torch.ones(64, 6, 64)) == 0).all(2).sum(1).max() <= 3
    assert augment.eval()(features) is features
    assert (SpecAugment(0, 0)(features) == 1).all()
