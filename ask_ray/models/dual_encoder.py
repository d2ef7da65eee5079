"""The dual encoder: two towers, two projection heads, one learnt temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from ask_ray.models.audio_towers import AudioTower
from ask_ray.models.text_towers import TextTower

#: The learnt temperature stays between these.
COLDEST, WARMEST = 0.01, 10.0


class DualEncoder(nn.Module):
    """Audio and captions in one space of unit vectors; their dot products are cosine similarities."""

    def __init__(self, audio: AudioTower, text: TextTower, dim: int, dropout: float, temperature: float) -> None:
        """`temperature` is τ at the start, brought into [0.01, 10]."""
        super().__init__()
        self.audio = audio
        self.text = text
        self.audio_head = head(audio.width, dim, dropout)
        self.text_head = head(text.width, dim, dropout)
        self.log_temperature = nn.Parameter(torch.tensor(min(max(temperature, COLDEST), WARMEST)).log())

    @property
    def temperature(self) -> Tensor:
        """τ, a float32 scalar in [0.01, 10] that gradients pass through."""
        return _Bounded.apply(self.log_temperature).exp()

    @property
    def scale(self) -> Tensor:
        """1 / τ, what similarities are multiplied by to become logits."""
        return 1 / self.temperature

    @property
    def tokenise(self) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
        """What makes ids (B, L) int64 and a mask (B, L) bool of captions, on the CPU."""
        return self.text.tokenise

    def encode_audio(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """(B, S) float32 waveforms of full scale 1 and (B,) int64 lengths in samples -> (B, d) float32 unit vectors."""
        return unit(self.audio_head(self.audio(waveforms, lengths)))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) int64 ids and bool mask from :attr:`tokenise` -> (B, d) float32 unit vectors."""
        return unit(self.text_head(self.text(ids, mask)))

    def forward(self, waveforms: Tensor, lengths: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both encodings and :attr:`scale` in one call, as data-parallel wrappers need it."""
        return self.encode_audio(waveforms, lengths), self.encode_text(ids, mask), self.scale


def head(width: int, dim: int, dropout: float) -> nn.Sequential:
    """A projection head from a tower's width to the shared space."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim))


def unit(x: Tensor) -> Tensor:
    """Rows of length one in float32, whatever precision they were computed in."""
    return functional.normalize(x.float(), dim=1)


class _Bounded(torch.autograd.Function):
    """log τ clamped to its bounds. A parameter that a step took outside still hears gradients that lead back inside."""

    LOW, HIGH = math.log(COLDEST), math.log(WARMEST)

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(_Bounded.LOW, _Bounded.HIGH)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        (gradient,) = gradients
        outward = ((x < _Bounded.LOW) & (gradient > 0)) | ((x > _Bounded.HIGH) & (gradient < 0))
        return gradient.masked_fill(outward, 0)
