"""Out-of-Batch Influence (method: ASK §4.2): does the loss depend on entries outside the batch at all?

    OBI = Σ_n ‖∂L/∂û_n‖ + ‖∂L/∂v̂_n‖

It is 0 for a plain contrastive loss (the Gradient Locality Bottleneck) and positive with injection, or with
out-of-batch negatives.
"""

import torch
from torch import Tensor

from ask_ray.method.tensors import at_least_float32


def out_of_batch_influence(loss: Tensor, *rows: Tensor) -> Tensor:
    """OBI of a loss over the knowledge-base rows that it was computed from. A diagnostic: no gradient.

    Give a row for each entry, which the pairs that retrieved it share: a copy for each pair would count apart, and the
    sum would bound the paper's per-entry sum from above.
    The graph is kept, so that the step's own backward still works. Where the loss gathers embeddings across ranks
    with gradient, call it on every rank.

    Args:
        loss: scalar.
        rows: tensors ``(..., d)``, such as the ``(U, d)`` entries of each modality and granularity, out-of-batch by
            construction. Those that do not require a gradient count 0, as do those that the loss does not use.

    Returns:
        Scalar >= 0, detached, on the loss's device.

    Raises:
        ValueError: a loss that is not a scalar.
    """
    if loss.ndim:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    total = torch.zeros_like(at_least_float32(loss.detach()))
    watched = [tensor for tensor in rows if tensor.requires_grad]
    if not watched or not loss.requires_grad:
        return total
    for gradient in torch.autograd.grad(loss, watched, retain_graph=True, allow_unused=True):
        if gradient is not None:
            total = total + at_least_float32(gradient).norm(dim=-1).sum()
    return total
