"""Out-of-batch negatives (beyond ASK): other-modality rows that join the denominator of the loss (ASK Eq. 1).

They come from the knowledge base (the neighbours a pair retrieved are its hard negatives) or, for comparison, from a
cross-batch memory queue of the last batches (XBM: Wang, Zhang, Huang and Scott, CVPR 2020, arXiv 1912.06798). Rows of
the pair's own clip are masked with -inf, and so is a neighbour that is missing.
"""

import torch
from torch import Tensor

from ask_ray.method.tensors import check_shape


def knowledge_negatives(own: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """Similarities of each pair with its own neighbours' other-modality rows.

    Args:
        own: ``(B, d)``, audio (or text) embeddings, L2-normalised.
        rows: ``(B, K, d)``, the text (or audio) rows of the entries that pair i retrieved; finite everywhere. Rows
            stored in a narrower dtype are read in that of ``own``.
        valid: ``(B, K)``, bool; False where a neighbour is missing or is no negative of the pair.

    Returns:
        ``(B, K)``, for :func:`ask_ray.method.objective.contrastive_loss`; -inf where not valid.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shape("rows", rows, (own.shape[0], *rows.shape[1:2], own.shape[1]))
    check_shape("valid", valid, rows.shape[:2])
    return torch.einsum("bd,bkd->bk", own, rows.to(own.dtype)).masked_fill(~valid, -torch.inf)


def queue_negatives(own: Tensor, rows: Tensor, own_ids: Tensor, row_ids: Tensor) -> Tensor:
    """Similarities of each pair with every row of a cross-batch memory queue (Wang et al. 2020, XBM).

    Args:
        own: ``(B, d)``, audio (or text) embeddings, L2-normalised.
        rows: ``(M, d)``, the queue's text (or audio) rows; ``M`` may be 0.
        own_ids: ``(B,)``, int64, the clip of each pair (all captions of a clip share its id).
        row_ids: ``(M,)``, int64, the clip of each row.

    Returns:
        ``(B, M)``; -inf where the ids are equal.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shape("rows", rows, (rows.shape[0], own.shape[1]))
    check_shape("own_ids", own_ids, own.shape[:1])
    check_shape("row_ids", row_ids, rows.shape[:1])
    same_clip = own_ids.unsqueeze(1) == row_ids.unsqueeze(0)
    return (own @ rows.to(own.dtype).mT).masked_fill(same_clip, -torch.inf)
