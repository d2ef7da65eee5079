"""What the mechanisms of the method share: a safe normalisation, a working precision, and checks of arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(vectors: Tensor) -> Tensor:
    """L2-normalise the last dimension; a zero vector stays zero, and its gradient is finite.

    Args:
        vectors: ``(..., d)``, floating point.

    Returns:
        ``(..., d)``, same dtype; norms 1, or 0 where the squared norm is below the dtype's smallest normal number.
    """
    squared_norm = vectors.square().sum(dim=-1, keepdim=True)
    vanishing = squared_norm < torch.finfo(vectors.dtype).tiny
    return vectors * torch.rsqrt(squared_norm.masked_fill(vanishing, 1.0))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is half precision, else as it is (float64 stays float64)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value > 0``."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 <= value <= 1``."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has exactly this shape (nothing is broadcast silently)."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
