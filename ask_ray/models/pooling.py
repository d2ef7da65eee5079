"""Pooling over the true positions of padded sequences, and what a tower makes of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """A batch as a tower hears or reads it.

    vectors: (B, width), one of each clip or caption; tokens: (B, L, token_width), one of each frame, patch or word, where mask
    (B, L) bool is true, at least once in every row. Both are None where the model makes nothing but the vectors.
    """

    vectors: Tensor
    tokens: Tensor | None
    mask: Tensor | None


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the true positions. x: (B, T, C), mask: (B, T) bool with a true one in every row -> (B, C)."""
    inside = mask[..., None]
    return (x * inside).sum(1) / inside.sum(1)


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the true positions, shapes as for :func:`masked_mean`."""
    return x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min).amax(1)
