"""The exchange between ranks, in one place: everything else sees the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.method.interaction import Tokens


def world_size() -> int:
    """Number of ranks; 1 outside a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This rank; 0 outside a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(tensor: Tensor) -> Tensor:
    """All ranks' rows, (B, …) -> (ranks * B, …) in rank order, with gradient.

    Every rank computes the same loss over the global batch; the backward pass adds up what all of them derive for a
    row, and the data-parallel mean over ranks then gives exactly the gradient that one rank with the whole batch has.
    """
    if world_size() == 1:
        return tensor
    if tensor.requires_grad:
        gathered = torch.cat(torch.distributed.nn.functional.all_gather(tensor.contiguous()))
        # PyTorch's backward pass over Gloo copies a transposed gradient as if its rows were contiguous.
        gathered.register_hook(Tensor.contiguous)
        return gathered
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_tokens(tokens: Tokens) -> Tokens:
    """All ranks' rows as :func:`gather`, filled up with padding to the most tokens that a row of any rank has."""
    if world_size() == 1:
        return tokens
    more = -agree_on_least(-tokens.mask.shape[1], tokens.mask.device) - tokens.mask.shape[1]
    return Tokens(
        gather(functional.pad(tokens.vectors, (0, 0, 0, more))),
        gather(functional.pad(tokens.weights, (0, more))),
        gather(functional.pad(tokens.mask, (0, more))),
    )


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, such as running statistics of normalisation."""
    if world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def agree_on_least(value: int, device: torch.device) -> int:
    """The least of all ranks' integers."""
    if world_size() == 1:
        return value
    least = torch.tensor([value], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least.item())


def tell_all(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
