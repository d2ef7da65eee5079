"""The dual encoder: two towers, two projection heads, one learnt temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from ask_ray.config import COLDEST, WARMEST
from ask_ray.method.interaction import Tokens, combined, token_scores, token_weights
from ask_ray.models.audio_towers import AudioTower
from ask_ray.models.image_towers import ImageTower
from ask_ray.models.pooling import Encoded
from ask_ray.models.text_towers import TextTower

#: The most that a token is wide in the shared space: ColBERT's width (Khattab and Zaharia 2020, arXiv 2004.12832).
TOKEN_WIDTH = 128


class Encoding(NamedTuple):
    """A batch in the shared space: vectors (B, d) float32, unit rows; tokens: None without token-wise interaction."""

    vectors: Tensor
    tokens: Tokens | None


class DualEncoder(nn.Module):
    """Audio and captions in one space of unit vectors; their dot products are cosine similarities.

    With token-wise interaction, their frames and words are in another such space, at most 128 wide. Where a corpus is one of
    pictures, an image tower stands for the audio tower: what is said of waveforms, lengths in samples and frames then holds for
    its pictures, sizes and patches.
    """

    def __init__(
        self,
        audio: AudioTower | ImageTower,
        text: TextTower,
        dim: int,
        dropout: float,
        temperature: float,
        token_widths: tuple[int, int] | None = None,
    ) -> None:
        """`temperature` is τ at the start, brought into [0.01, 10]; `token_widths` are the towers', if tokens are to interact."""
        super().__init__()
        self.audio = audio
        self.text = text
        self.audio_head = head(audio.width, dim, dropout)
        self.text_head = head(text.width, dim, dropout)
        self.log_temperature = nn.Parameter(torch.tensor(min(max(temperature, COLDEST), WARMEST)).log())
        self.audio_tokens: TokenHead | None = None
        self.text_tokens: TokenHead | None = None
        if token_widths is not None:
            self.audio_tokens, self.text_tokens = (TokenHead(width, dim) for width in token_widths)

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

    def audio_encoding(self, waveforms: Tensor, lengths: Tensor) -> Encoding:
        """Arguments and vectors as for :meth:`encode_audio`, with the frames if they interact."""
        return _encoding(self.audio.encode(waveforms, lengths), self.audio_head, self.audio_tokens)

    def text_encoding(self, ids: Tensor, mask: Tensor) -> Encoding:
        """Arguments and vectors as for :meth:`encode_text`, with the words if they interact."""
        return _encoding(self.text.encode(ids, mask), self.text_head, self.text_tokens)

    def forward(self, waveforms: Tensor, lengths: Tensor, ids: Tensor, mask: Tensor) -> tuple[Encoding, Encoding, Tensor]:
        """Both encodings and :attr:`scale` in one call, as data-parallel wrappers need it."""
        return self.audio_encoding(waveforms, lengths), self.text_encoding(ids, mask), self.scale


class TokenHead(nn.Module):
    """A tower's tokens in the shared space, and how much each counts: at first all alike."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, min(dim, TOKEN_WIDTH))
        self.weigh = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.weigh.weight)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tokens:
        """(B, L, width) and (B, L) bool -> unit vectors (B, L, d) and weights (B, L) in float32."""
        x = self.norm(tokens.masked_fill(~mask[..., None], 0))
        return Tokens(functional.normalize(self.project(x).float(), dim=2), token_weights(self.weigh(x)[..., 0], mask), mask)


def _encoding(made: Encoded, vector_head: nn.Module, token_head: TokenHead | None) -> Encoding:
    if token_head is None:
        return Encoding(unit(vector_head(made.vectors)), None)
    assert made.tokens is not None
    assert made.mask is not None
    return Encoding(unit(vector_head(made.vectors)), token_head(made.tokens, made.mask))


def scores(audio: Encoding, text: Encoding) -> Tensor:
    """(A, B) float32: what ranks B captions for A clips, and the reverse."""
    similarity = audio.vectors @ text.vectors.T
    if audio.tokens is None or text.tokens is None:
        return similarity
    return combined(similarity, token_scores(audio.tokens, text.tokens))


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
