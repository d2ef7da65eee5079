"""Token-wise interaction of a clip and a caption, beside the inner product of their embeddings.

Each word meets its best frame and each frame its best word (ColBERT: Khattab and Zaharia 2020, arXiv 2004.12832; FILIP: Yao et
al. 2021, arXiv 2111.07783), and a learnt softmax says how much each counts (the weighted token-wise interaction of DRL: Wang et
al. 2022, arXiv 2203.07111, §3.2). With unit vectors f of the frames of clip i, t of the words of caption j, and their weights:

    L_ij = ½ [Σ_w a_w max_f <t_w, f> + Σ_f b_f max_w <f, t_w>],   Σ_w a_w = Σ_f b_f = 1
    S_ij = ½ (u_i · v_j + L_ij)

S is what is trained on and ranked by. L is of the pair's tokens alone: with knowledge, S' = ½ (u' v'ᵀ + L), and knowledge base,
injection, reliability and drift stay with the embeddings u and v. Both halves lie in [-1, 1], so that temperature and ε mean the
same as without L; out-of-batch negatives have no tokens, and enter the denominators with their inner products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ask_ray.method.tensors import at_least_float32, check_shape

CELLS = 1 << 22
"""Products of a word and a frame that are held at once: 16 MiB of float32."""

LOWEST = -2.0
"""What stands for products with padding: below all products of unit vectors, and nothing when it is weighed with 0."""


class Tokens(NamedTuple):
    """The words of captions or the frames of clips, padded to a common number L."""

    vectors: Tensor
    """``(B, L, d)``, unit vectors; finite where they are padding."""
    weights: Tensor
    """``(B, L)``, from :func:`token_weights`."""
    mask: Tensor
    """``(B, L)`` bool, true for tokens, of which every row has at least one."""

    def rows(self, some: slice) -> Tokens:
        """Some of the captions or clips."""
        return Tokens(*(part[some] for part in self))


@dataclass(frozen=True)
class Packed:
    """The tokens of a whole split without padding.

    vectors: ``(T, d)`` float16; weights: ``(T,)`` float32; lengths: ``(B,)`` int64, the tokens of each row, T in all.
    """

    vectors: Tensor
    weights: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> Packed:
        """Tokens without their padding, on the CPU."""
        inside = tokens.mask
        return cls(tokens.vectors[inside].half().cpu(), tokens.weights[inside].float().cpu(), inside.sum(dim=1).cpu())

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        """The rows of all parts, in their order; at least one part."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("vectors", "weights", "lengths")))

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, some: slice, device: torch.device) -> Tokens:
        """Some rows in float32, padded to the longest of them."""
        lengths = self.lengths[some]
        first = int(self.lengths[: some.indices(len(self))[0]].sum())
        mine = slice(first, first + int(lengths.sum()))
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        vectors = torch.zeros(*mask.shape, self.vectors.shape[1])
        vectors[mask] = self.vectors[mine].float()
        weights = torch.zeros(mask.shape)
        weights[mask] = self.weights[mine]
        return Tokens(vectors.to(device), weights.to(device), mask.to(device))


def token_weights(logits: Tensor, mask: Tensor) -> Tensor:
    """a or b: how much each token of a row counts.

    Args:
        logits: ``(B, L)``, finite.
        mask: ``(B, L)`` bool, true for tokens, of which every row has at least one.

    Returns:
        ``(B, L)``, at least float32; rows sum to 1, padding weighs 0.

    Raises:
        ValueError: shapes that differ.
    """
    check_shape("mask", mask, logits.shape)
    return at_least_float32(logits).masked_fill(~mask, -torch.inf).softmax(dim=1)


def token_scores(audio: Tokens, text: Tokens, cells: int = CELLS) -> Tensor:
    """L: how well every clip's frames and every caption's words meet, with gradient.

    Args:
        audio: of A clips.
        text: of B captions, with tokens as wide.
        cells: products of a word and a frame that are held at once. Memory depends on it, L does not.

    Returns:
        ``(A, B)`` in [-1, 1], at least float32, whatever autocast says. The same with the two exchanged is its transpose.

    Raises:
        ValueError: widths that differ.
    """
    width = audio.vectors.shape[2]
    check_shape("text.vectors", text.vectors, (*text.vectors.shape[:2], width))
    size = _pairs(cells, audio.mask.shape[1], text.mask.shape[1])
    with torch.autocast(audio.vectors.device.type, enabled=False):
        others = [text.rows(some) for some in _slices(len(text.mask), size)]
        rows = [[_block(audio.rows(some), other) for other in others] for some in _slices(len(audio.mask), size)]
        return torch.cat([torch.cat(row, dim=1) for row in rows])


def score_rows(audio: Packed, text: Packed, device: torch.device, cells: int = CELLS) -> Iterator[Tensor]:
    """:func:`token_scores` of two whole splits, some clips at a time: ``(a, B)`` float32 on the CPU, A rows in all.

    Args:
        device: where they are computed.
        cells: as for :func:`token_scores`.
    """
    size = _pairs(cells, int(audio.lengths.max()), int(text.lengths.max()))
    for some in _slices(len(audio), size):
        mine = audio.rows(some, device)
        yield torch.cat([_block(mine, text.rows(other, device)).cpu() for other in _slices(len(text), size)], dim=1)


def combined(similarity: Tensor, tokenwise: Tensor) -> Tensor:
    """S = ½ (u vᵀ + L).

    Args:
        similarity: ``(A, B)``, inner products of embeddings, with knowledge or without.
        tokenwise: ``(A, B)``, from :func:`token_scores`.

    Raises:
        ValueError: shapes that differ.
    """
    check_shape("tokenwise", tokenwise, similarity.shape)
    return (similarity + tokenwise) / 2


def _pairs(cells: int, frames: int, words: int) -> int:
    """Clips, and captions, of a block: as many of the ones as of the others."""
    return max(1, math.isqrt(cells // (frames * words)))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _block(audio: Tokens, text: Tokens) -> Tensor:
    """(a, b): L of a few clips and captions."""
    # Tokens come first, so that maxima are taken over whole vectors of pairs; padding is filled in in place.
    frames, words = (at_least_float32(side.vectors).transpose(0, 1) for side in (audio, text))
    products = (frames.flatten(0, 1) @ words.flatten(0, 1).T).view(*frames.shape[:2], *words.shape[:2])
    of_frames = _best(products.masked_fill_(~text.mask.T, LOWEST), 2)
    of_words = _best(products.masked_fill_(~audio.mask.T[:, :, None, None], LOWEST), 0)
    by_frames = torch.einsum("fab,af->ab", of_frames, audio.weights)
    return (by_frames + torch.einsum("awb,bw->ab", of_words, text.weights)) / 2


def _best(products: Tensor, dim: int) -> Tensor:
    """The maximum along `dim`. With gradient only its places are kept for the backward pass, not the products."""
    return products.max(dim=dim).values if products.requires_grad else products.amax(dim=dim)
