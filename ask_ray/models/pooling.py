"""Pooling over the true positions of padded sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the true positions. x: (B, T, C), mask: (B, T) bool with a true one in every row -> (B, C)."""
    inside = mask[..., None]
    return (x * inside).sum(1) / inside.sum(1)


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the true positions, shapes as for :func:`masked_mean`."""
    return x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min).amax(1)
