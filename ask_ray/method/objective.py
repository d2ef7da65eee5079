"""The objective (method: ASK Eq. 1; in full, §4.5): bidirectional contrastive loss over a batch's similarities.

    L = mean_i Ψ_i ½ [CE(Y_i·, S_i· / τ) + CE(Y_·i, S_·i / τ)]

With Y = I and Ψ = 1 this is plain NT-Xent, Eq. 1. Out-of-batch negatives, where given, join the denominators only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ask_ray.method.tensors import at_least_float32, check_shape


class ContrastiveLoss(NamedTuple):
    """The loss and its parts, in float32 or float64."""

    loss: Tensor
    """Scalar: the mean over pairs of Ψ_i times the mean of both directions."""
    audio_to_text: Tensor
    """``(B,)``: cross-entropy of each audio query over texts, before Ψ."""
    text_to_audio: Tensor
    """``(B,)``: cross-entropy of each text query over audios, before Ψ."""


def similarity(audio: Tensor, text: Tensor) -> Tensor:
    """S = u vᵀ: inner products of every audio with every text (ASK Eq. 1).

    Args:
        audio: ``(B, d)``, L2-normalised.
        text: ``(B, d)``, L2-normalised, row i paired with audio row i.

    Returns:
        ``(B, B)``, in [-1, 1]; rows are audio, columns text.

    Raises:
        ValueError: shapes that differ.
    """
    check_shape("text", text, audio.shape)
    return audio @ text.mT


def contrastive_loss(
    similarity: Tensor,
    scale: Tensor,
    targets_audio: Tensor | None = None,
    targets_text: Tensor | None = None,
    potential: Tensor | None = None,
    audio_negatives: Tensor | None = None,
    text_negatives: Tensor | None = None,
) -> ContrastiveLoss:
    """L_ASK (ASK §4.5); with every option left out, bidirectional NT-Xent (ASK Eq. 1).

    Args:
        similarity: ``(B, B)``, finite; rows are audio, columns text, the diagonal holds the pairs. Half precision is
            computed in float32.
        scale: scalar, 1 / τ, with gradient if τ is learnt.
        targets_audio: ``(B, B)``, row i the target distribution of audio query i over texts; None is the identity.
        targets_text: ``(B, B)``, row j the target distribution of text query j over audios; None is the identity.
            For soft targets Y these are ``Y`` and ``Y.mT``.
        potential: ``(B,)``, Ψ, mean 1; None is 1 for every pair (ASK §4.3).
        audio_negatives: ``(B, M)``, similarities of each audio query with out-of-batch texts; -inf is left out.
        text_negatives: ``(B, M')``, the same of each text query with out-of-batch audios.

    Returns:
        The loss and both directions' cross-entropies. Finite, with finite gradients, also when every negative of a
        pair is -inf.

    Raises:
        ValueError: shapes that do not fit the batch.
    """
    batch = similarity.shape[0]
    check_shape("similarity", similarity, (batch, batch))
    audio_to_text = _cross_entropy(similarity, scale, targets_audio, audio_negatives)
    text_to_audio = _cross_entropy(similarity.mT, scale, targets_text, text_negatives)
    pairs = (audio_to_text + text_to_audio) / 2
    if potential is not None:
        check_shape("potential", potential, (batch,))
        pairs = potential * pairs
    return ContrastiveLoss(pairs.mean(), audio_to_text, text_to_audio)


def _cross_entropy(similarity: Tensor, scale: Tensor, targets: Tensor | None, negatives: Tensor | None) -> Tensor:
    """CE of each row ``(B,)``. Targets weigh the batch's columns only, so a masked negative is never multiplied."""
    logits = scale * at_least_float32(similarity)
    denominator = logits if negatives is None else torch.cat([logits, _scaled_negatives(negatives, scale, logits)], 1)
    log_partition = denominator.logsumexp(dim=1)
    if targets is None:
        return log_partition - logits.diagonal()
    check_shape("targets", targets, logits.shape)
    return (targets * (log_partition.unsqueeze(1) - logits)).sum(dim=1)


def _scaled_negatives(negatives: Tensor, scale: Tensor, logits: Tensor) -> Tensor:
    """Negatives over τ; the mask is lifted while they are scaled, or the gradient of ``scale`` would be 0 · inf."""
    check_shape("negatives", negatives, (logits.shape[0], negatives.shape[-1]))
    missing = torch.isneginf(negatives)
    scaled = scale * negatives.masked_fill(missing, 0.0).to(logits.dtype)
    return scaled.masked_fill(missing, -torch.inf)
