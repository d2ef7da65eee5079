"""Audio towers: padded waveforms to one vector a clip. Each has its front end inside, so features never travel."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.data.frontend import PANNS_MEL, LogMel, SpecAugment, tiny_mel, valid
from ask_ray.models.pooling import Encoded, masked_max, masked_mean


class AudioTower(nn.Module):
    """A tower.

    width: the length of its vectors; token_width: of those of single frames or patches, None if it makes none; sample_rate: the
    Hz it hears at.
    """

    width: int
    token_width: int | None = None
    sample_rate: int

    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """(B, S) float32 waveforms of full scale 1 and (B,) int64 lengths in samples -> (B, width)."""
        return self.encode(waveforms, lengths).vectors

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Encoded:
        """Arguments as for :meth:`forward`; what is made of a clip depends neither on its batch nor on its padding."""
        raise NotImplementedError


class TinyAudio(AudioTower):
    """A small convolutional tower with one transformer layer over time, fast enough for a laptop's CPU.

    Frequency is folded away by strided convolutions but time only by four, to 80 ms a frame, and the transformer layer
    knows positions: captions tell which sound came first. Masked frames are zeroed before every convolution and norms
    act on single positions, so a clip's vector depends neither on its batch nor on its padding.
    """

    def __init__(self, sample_rate: int, width: float, dropout: float, freq_mask: int, time_mask: int) -> None:
        super().__init__()
        self.front = LogMel(tiny_mel(sample_rate))
        self.augment = SpecAugment(freq_mask, time_mask)
        self.sample_rate = sample_rate
        self.width = self.token_width = channels(192, width)
        first, second, third = (channels(count, width) for count in (48, 64, 128))
        self.stages = nn.ModuleList(
            [_Stage(1, first, (5, 7), (2, 4)), _Stage(first, second, (3, 3), (2, 2)), _Stage(second, third, (3, 3), (1, 2))]
        )
        self.fold = nn.Linear(third * self.front.spec.mels // 16, self.width)
        self.order = nn.TransformerEncoderLayer(
            self.width, 4, 2 * self.width, dropout, functional.gelu, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(2 * self.width)
        self.pool = nn.Linear(2 * self.width, self.width)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Encoded:
        """See :meth:`AudioTower.encode`."""
        features, frames = self.front(waveforms, lengths)
        # Everyday sounds lie around -35 dB on this scale, with a spread of about 15 dB.
        x = self.augment((features + 35) / 15)[:, None]
        for stage in self.stages:
            x, frames = stage(x, frames)
        x = self.fold(x.permute(0, 2, 3, 1).flatten(2))
        mask = valid(frames, x.shape[1])
        x = self.order(x + positions(x.shape[1], self.width, x.device), src_key_padding_mask=~mask)
        vectors = self.pool(self.norm(torch.cat((masked_mean(x, mask), masked_max(x, mask)), dim=1)))
        return Encoded(vectors, x, mask)


class _Stage(nn.Module):
    """A strided convolution over (time, frequency), a norm over channels at each position, and a rectifier."""

    def __init__(self, before: int, after: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2))
        self.norm = nn.LayerNorm(after)
        self.stride = stride[0]

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, before, T, F) and (B,) frames -> (B, after, T', F') and frames, both axes divided by the stride, upward."""
        x = (x * valid(frames, x.shape[2])[:, None, :, None]).contiguous(memory_format=torch.channels_last)
        x = functional.relu(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x, (frames + self.stride - 1) // self.stride


def channels(count: int, width: float) -> int:
    """A channel count scaled by `width`, as a multiple of 8 and at least 8."""
    return max(8, round(count * width / 8) * 8)


def positions(size: int, width: int, device: torch.device) -> Tensor:
    """(size, width) sinusoids of the frame's number (Vaswani et al. 2017), so that clips may be of any length."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-9.0 / width))
    angles = torch.arange(size, device=device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def normalised(norm: nn.BatchNorm2d, features: Tensor, frames: Tensor) -> Tensor:
    """Mel bands normed over the frames that belong to clips; zero elsewhere. (B, T, M) and (B,) -> (B, T, M)."""
    mask = valid(frames, features.shape[1])
    out = torch.zeros_like(features)
    out[mask] = norm(features[mask][:, :, None, None])[:, :, 0, 0]
    return out


class _Spectrum(NamedTuple):
    """A padded spectrogram (B, C, T, F) and the frames (B,) of each clip."""

    x: Tensor
    frames: Tensor

    def masked(self) -> Tensor:
        """`x` with zeros beyond each clip's frames: the zeros a convolution pads with."""
        return self.x * valid(self.frames, self.x.shape[2])[:, None, :, None]

    def halved(self) -> _Spectrum:
        """Averages of 2x2 fields; an odd last frame is dropped."""
        return _Spectrum(functional.avg_pool2d(self.x, 2), self.frames // 2)


class ResNet38(AudioTower):
    """PANNs ResNet38 (Kong et al. 2020, arXiv 1912.10211), names as in its published checkpoint.

    Hears 32 kHz. In eval mode a clip's vector does not depend on its padding; in training mode, batch norms see the
    worker's own batch, the first of them only frames that belong to clips.
    """

    #: What a published checkpoint holds beside the tower, and the tower's own front end.
    IGNORE = ("spectrogram_extractor.", "logmel_extractor.", "fc_audioset.", "front.")
    #: Time is halved five times before pooling; shorter clips are lengthened with silence to one frame there.
    LEAST_FRAMES = 32

    def __init__(self, width: float, freq_mask: int, time_mask: int) -> None:
        super().__init__()
        self.front = LogMel(PANNS_MEL)
        self.augment = SpecAugment(freq_mask, time_mask)
        self.sample_rate = PANNS_MEL.sample_rate
        base = channels(64, width)
        self.width = self.token_width = 32 * base
        self.bn0 = nn.BatchNorm2d(PANNS_MEL.mels)
        self.conv_block1 = _ConvBlock(1, base)
        self.resnet = _Layers(base, (3, 4, 6, 3))
        self.conv_block_after1 = _ConvBlock(8 * base, self.width)
        self.fc1 = nn.Linear(self.width, self.width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Encoded:
        """See :meth:`AudioTower.encode`."""
        least = (self.LEAST_FRAMES - 1) * PANNS_MEL.hop
        waveforms = functional.pad(waveforms, (0, max(0, least - waveforms.shape[1])))
        # Clips are silenced at their own length here, because they count as `least` samples long from now on.
        waveforms = waveforms * valid(lengths, waveforms.shape[1])
        features, frames = self.front(waveforms, lengths.clamp(min=least))
        x = _Spectrum(self.augment(normalised(self.bn0, features, frames))[:, None], frames)
        x = self._drop(self.conv_block1(x).halved(), 0.2)
        x = self._drop(self.resnet(x).halved(), 0.2)
        x = self._drop(self.conv_block_after1(x), 0.2)
        over_time, mask = x.x.mean(3).transpose(1, 2), valid(x.frames, x.x.shape[2])
        pooled = masked_mean(over_time, mask) + masked_max(over_time, mask)
        pooled = functional.dropout(pooled, 0.5, self.training)
        return Encoded(functional.relu(self.fc1(pooled)), over_time, mask)

    def _drop(self, x: _Spectrum, share: float) -> _Spectrum:
        return _Spectrum(functional.dropout(x.x, share, self.training), x.frames)


def _conv3x3(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=False)


class _ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and rectifier."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(before, after)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = _conv3x3(after, after)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: _Spectrum) -> _Spectrum:
        first = _Spectrum(functional.relu(self.bn1(self.conv1(x.masked()))), x.frames)
        return _Spectrum(functional.relu(self.bn2(self.conv2(first.masked()))), x.frames)


class _Layers(nn.Module):
    """The four residual layers, channels doubling and both axes halving from one to the next."""

    def __init__(self, base: int, counts: tuple[int, int, int, int]) -> None:
        super().__init__()
        before = base
        for number, count in enumerate(counts):
            after, halve = base * 2**number, number > 0
            blocks = [_BasicBlock(before, after, halve)] + [_BasicBlock(after, after, False) for _ in range(count - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
            before = after

    def forward(self, x: _Spectrum) -> _Spectrum:
        for layer in self.children():
            x = layer(x)
        return x


class _BasicBlock(nn.Module):
    """A residual block of two 3x3 convolutions; where it halves, both paths average 2x2 fields first."""

    def __init__(self, before: int, after: int, halve: bool) -> None:
        super().__init__()
        self.conv1 = _conv3x3(before, after)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = _conv3x3(after, after)
        self.bn2 = nn.BatchNorm2d(after)
        self.halve = halve
        # The names 1 and 2 are the published ones, where 0 is the pooling.
        shortcut = OrderedDict({"1": nn.Conv2d(before, after, 1, bias=False), "2": nn.BatchNorm2d(after)})
        self.downsample = nn.Sequential(shortcut) if halve else nn.Identity()

    def forward(self, x: _Spectrum) -> _Spectrum:
        x = x.halved() if self.halve else x
        out = _Spectrum(functional.relu(self.bn1(self.conv1(x.masked()))), x.frames)
        out = _Spectrum(functional.dropout(out.x, 0.1, self.training), x.frames)
        return _Spectrum(functional.relu(self.bn2(self.conv2(out.masked())) + self.downsample(x.x)), x.frames)
