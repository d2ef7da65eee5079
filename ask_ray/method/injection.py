"""Knowledge injection (method: ASK §4.2): read the knowledge base, and mix what was read into a pair's embedding.

A pair's neighbours are the rows that its embedding retrieved within its own modality. With similarities s_in:

    α_in = softmax_n(s_in / τ_kb)                 weights of the neighbours
    ū_i  = normalise(mean over granularities of Σ_n α_in û_n)
    u'_i = normalise(ρ u_i + (1 - ρ) ū_i)

ρ is the weight of the pair's *own* embedding, as the paper's formula has it. Read "injection ratio" the other way
round and you want 1 - ρ. A missing neighbour (too few entries, or excluded by id) has similarity -inf.
"""

import torch
from torch import Tensor

from ask_ray.method.tensors import check_positive, check_shape, check_share, normalise


def neighbour_weights(similarity: Tensor, temperature: float) -> Tensor:
    """α, the softmax of the neighbours' similarities (ASK §4.2).

    Args:
        similarity: ``(B, K)``, floating point; -inf marks a missing neighbour.
        temperature: τ_kb > 0.

    Returns:
        ``(B, K)``, same dtype, in [0, 1]. Rows sum to 1; a missing neighbour weighs 0, and a pair with no neighbour
        at all has a row of zeros. Gradients are finite everywhere, and 0 at missing neighbours.

    Raises:
        ValueError: a temperature that is not positive.
    """
    return _masked_softmax(similarity, torch.isneginf(similarity), temperature)


def agreement_weights(similarity: Tensor, cross_similarity: Tensor, temperature: float) -> Tensor:
    """α weighed also by cross-modal agreement: the neighbour-level reliability of ASK §4.3.

    An audio neighbour n of pair i scores u_i · û_n + v_i · v̂_n, a text neighbour v_i · v̂_n + u_i · û_n.

    Args:
        similarity: ``(B, K)``, within the modality that retrieved; -inf marks a missing neighbour.
        cross_similarity: ``(B, K)``, of the pair's other side with the same entries; finite at present neighbours,
            ignored at missing ones.
        temperature: τ_kb > 0.

    Returns:
        ``(B, K)``, as :func:`neighbour_weights`.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    check_shape("cross_similarity", cross_similarity, similarity.shape)
    return _masked_softmax(similarity + cross_similarity, torch.isneginf(similarity), temperature)


def read(rows: Tensor, weights: Tensor) -> Tensor:
    """g(X, N): the weighted mean of the rows that were retrieved, not normalised (ASK §4.2).

    Args:
        rows: ``(B, K, d)``; finite everywhere, also where the weight is 0. Rows stored in a narrower dtype are read
            in the weights' dtype.
        weights: ``(B, K)``, from :func:`neighbour_weights` or :func:`agreement_weights`.

    Returns:
        ``(B, d)``, the weights' dtype; zero for a pair with no neighbour.

    Raises:
        ValueError: weights that are not ``(B, K)``.
    """
    check_shape("weights", weights, rows.shape[:2])
    return torch.einsum("bk,bkd->bd", weights, rows.to(weights.dtype))


def combine(*reads: Tensor) -> Tensor:
    """ū: the mean of the granularities' reads (fine, coarse, or both), L2-normalised (ASK §4.2).

    Args:
        reads: one or more tensors ``(B, d)`` of one dtype.

    Returns:
        ``(B, d)``, unit rows; a zero mean stays zero, with a finite gradient.

    Raises:
        ValueError: no read, or shapes that differ.
    """
    if not reads:
        raise ValueError("combine needs at least one read")
    for other in reads[1:]:
        check_shape("read", other, reads[0].shape)
    return normalise(torch.stack(reads).mean(dim=0))


def inject(own: Tensor, knowledge: Tensor, rho: float) -> Tensor:
    """u' = normalise(ρ u + (1 - ρ) ū): the embedding with knowledge injected (ASK §4.2).

    Args:
        own: ``(B, d)``, the pair's embedding, L2-normalised.
        knowledge: ``(B, d)``, from :func:`combine`; a zero row leaves the pair's own embedding as it is (for ρ > 0).
        rho: ρ in [0, 1], the weight of the pair's own embedding; 1 switches injection off.

    Returns:
        ``(B, d)``, unit rows.

    Raises:
        ValueError: shapes that differ, or ρ outside [0, 1].
    """
    check_share("rho", rho)
    check_shape("knowledge", knowledge, own.shape)
    return normalise(rho * own + (1 - rho) * knowledge)


def _masked_softmax(scores: Tensor, missing: Tensor, temperature: float) -> Tensor:
    """Softmax over the last dimension with weight 0 at ``missing``, also where the whole row is missing."""
    check_positive("temperature", temperature)
    lowest = torch.finfo(scores.dtype).min
    weights = (scores / temperature).masked_fill(missing, lowest).softmax(dim=-1)
    return weights.masked_fill(missing, 0.0)
