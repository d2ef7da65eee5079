"""Waveforms to log-mel features, on whatever device the audio tower trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchaudio import functional
from torchaudio.transforms import FrequencyMasking, MelScale, Spectrogram, TimeMasking


@dataclass(frozen=True)
class MelSpec:
    """What a log-mel front end computes: rates and band edges in Hz, window and hop in samples, floor in power.

    `top_db` raises whatever lies further than this many dB below a clip's loudest value; None leaves it.
    `scale` is the mel scale: Slaney's with its area normalisation, or HTK's with triangles of height one.
    `reflect` continues a clip mirrored beyond its ends, where a window reaches over them, instead of silently.
    """

    sample_rate: int
    n_fft: int
    hop: int
    mels: int
    f_min: float
    f_max: float
    top_db: float | None
    amin: float = 1e-10
    scale: Literal["slaney", "htk"] = "slaney"
    reflect: bool = False

    def frames(self, samples: Tensor) -> Tensor:
        """Frames of clips of this many samples: one is centred on every `hop`-th sample, the first on sample 0."""
        return 1 + samples // self.hop


def tiny_mel(sample_rate: int) -> MelSpec:
    """The tiny tower's features at any rate: 64 mels, a frame every 20 ms, a window of at least 32 ms."""
    n_fft = 1 << (sample_rate * 32 // 1000 - 1).bit_length()
    return MelSpec(sample_rate, n_fft, sample_rate // 50, 64, 50.0, min(8000.0, sample_rate / 2), None)


TINY_MEL = tiny_mel(16000)

#: What the published PANNs were trained on (Kong et al. 2020, arXiv 1912.10211).
PANNS_MEL = MelSpec(32000, 1024, 320, 64, 50.0, 14000.0, None, reflect=True)

#: What the published CEDs were trained on (Dinkel et al. 2024, arXiv 2308.11957).
CED_MEL = MelSpec(16000, 512, 160, 64, 0.0, 8000.0, 120.0, scale="htk", reflect=True)


def valid(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths as (B, size) bool: true within each row's own length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def mirrored(waveforms: Tensor, lengths: Tensor, edge: int) -> Tensor:
    """Each clip continued by `edge` samples at both ends, mirrored at its first and its last; zeros after that.

    Clips of at most `edge` samples hold still where the mirror image ends. (B, S) and (B,) -> (B, S + 2 edge).
    """
    place = torch.arange(-edge, waveforms.shape[1] + edge, device=waveforms.device).abs().expand(len(waveforms), -1)
    last = lengths[:, None] - 1
    inside = torch.minimum(place, 2 * last - place).clamp(min=0)
    return waveforms.gather(1, torch.minimum(inside, last)) * valid(lengths + 2 * edge, place.shape[1])


class LogMel(nn.Module):
    """Log-mel power in dB.

    Samples beyond a clip's own length count as silence, so its frames do not depend on what it is batched with.
    """

    def __init__(self, spec: MelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.spectrum = Spectrogram(spec.n_fft, hop_length=spec.hop, power=None, pad_mode="constant", center=not spec.reflect)
        bins = spec.n_fft // 2 + 1
        norm = "slaney" if spec.scale == "slaney" else None
        self.mel = MelScale(spec.mels, spec.sample_rate, spec.f_min, spec.f_max, bins, norm=norm, mel_scale=spec.scale)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features of padded clips.

        Args:
            waveforms: (B, S) float32, full scale 1.
            lengths: (B,) int64, samples of each clip.

        Returns:
            features (B, T, mels) float32 in dB, the floor (10 log10 `amin`) beyond a clip's frames;
            frames (B,) int64.
        """
        frames = self.spec.frames(lengths)
        # Reduced precision would round away quiet bands, so an enclosing autocast does not reach in here.
        with torch.autocast(waveforms.device.type, enabled=False):
            waves = self.spectrum(self._framed(waveforms.float(), lengths))
            # Cheaper than torchaudio's own power, which takes a root only to square it again.
            power = self.mel(waves.real.square() + waves.imag.square())
            power = power * valid(frames, power.shape[2])[:, None]
            # The channel axis makes torchaudio take top_db from each clip's own peak rather than the batch's.
            decibels = functional.amplitude_to_DB(power[:, None], 10.0, self.spec.amin, 0.0, self.spec.top_db)
        return decibels[:, 0].transpose(1, 2), frames

    def _framed(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """What the transform sees: clips without what lies beyond their ends."""
        if self.spec.reflect:
            return mirrored(waveforms, lengths, self.spec.n_fft // 2)
        return waveforms * valid(lengths, waveforms.shape[1])


class SpecAugment(nn.Module):
    """One masked band and one masked stretch a clip (Park et al. 2019, arXiv 1904.08779), while training only.

    Masked values become 0, so features should be centred. A stretch covers at most half the batch's frames.
    """

    def __init__(self, freq_mask: int, time_mask: int) -> None:
        super().__init__()
        self.freq = FrequencyMasking(freq_mask, iid_masks=True) if freq_mask else nn.Identity()
        self.time = TimeMasking(time_mask, iid_masks=True, p=0.5) if time_mask else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, M) features, each clip masked on its own; unchanged in eval mode."""
        if not self.training:
            return features
        return self.time(self.freq(features.transpose(1, 2))).transpose(1, 2)
