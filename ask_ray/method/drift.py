"""Drift of a stored knowledge base away from the encoders: its measure (method: ASK §3.3, Eq. 4), and a map that undoes some.

    RDM = mean_i KL(P_ideal(·|i) ‖ P_actual(·|i)),   P(n|i) = softmax_n(q_i · x_n / τ)

with x the entries encoded by the current weights for P_ideal, and as they are stored for P_actual.

    W = argmin ‖X W - Y‖² + λ ‖W - R‖²,   R = argmin over orthogonal R of ‖X R - Y‖²

with X stored rows and Y the same entries by the current weights. Encoders drift mostly alike for all entries, so a map
fitted to a few pairs serves them all, without encoding any.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ask_ray.method.tensors import at_least_float32, check_positive, check_shape, normalise

STAY = 1e-8
"""Pull of the rotation toward the identity, in units of the stored rows' mean eigenvalue: under float32's rounding."""


def rdm(queries: Tensor, fresh: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """RDM over a set of entries of one modality (ASK Eq. 4). A diagnostic: no gradient.

    Args:
        queries: ``(P, d)``, embeddings by the current weights, P > 0.
        fresh: ``(M, d)``, the entries encoded by the current weights, M > 0.
        stored: ``(M, d)``, the same entries as the knowledge base holds them.
        temperature: τ > 0.

    Returns:
        Scalar >= 0 in nats, of unit rows below 4 / τ, float32 (float64 for float64); exactly 0 when ``fresh`` equals
        ``stored``, as right after a refresh. Autocast is off here.

    Raises:
        ValueError: shapes that do not fit, no query, no entry, or a temperature that is not positive.
    """
    check_positive("temperature", temperature)
    check_positive("number of queries", queries.shape[0])
    check_positive("number of entries", fresh.shape[0])
    check_shape("stored", stored, fresh.shape)
    check_shape("queries", queries, (queries.shape[0], fresh.shape[1]))
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        queries, fresh, stored = (at_least_float32(tensor) for tensor in (queries, fresh, stored))
        ideal = queries @ fresh.mT
        actual = ideal + queries @ (stored - fresh).mT  # the same as queries @ stored.mT, and exact when nothing moved
        log_ideal, log_actual = ((logits / temperature).log_softmax(dim=1) for logits in (ideal, actual))
        return functional.kl_div(log_actual, log_ideal, reduction="batchmean", log_target=True).clamp(min=0.0)


def drift_map(stored: Tensor, fresh: Tensor, ridge: float) -> Tensor:
    """The linear map from stored rows to fresh ones, ridge regression toward their best rotation (ASK §3.3).

    The rotation R is the orthogonal Procrustes solution of the same pairs (a reflection is allowed). Where the pairs do
    not determine it, it is the one nearest the identity: a direction at right angles to all stored and all fresh rows is
    left as it is. So any number of pairs will do, also fewer than the width.

    Args:
        stored: ``(n, d)``, rows as the knowledge base holds them, n > 0.
        fresh: ``(n, d)``, the same entries by the current weights.
        ridge: λ > 0 in units of the mean eigenvalue of ``stored.T @ stored``, so that neither n nor the rows' length
            matters; the larger, the nearer the map is to the rotation.

    Returns:
        ``(d, d)`` W, to be applied by :func:`apply_map`; float32 (float64 for float64), no gradient, computed in float64.
        The same pairs give the same bits on the same machine with the same number of threads; where several processes
        must agree, one of them fits.

    Raises:
        ValueError: shapes that differ, no pair, or a ridge that is not positive.
    """
    check_positive("ridge", ridge)
    check_positive("number of pairs", stored.shape[0])
    check_shape("fresh", fresh, stored.shape)
    with torch.no_grad(), torch.autocast(stored.device.type, enabled=False):
        x, y = stored.double(), fresh.double()
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        gram = x.mT @ x
        scale = gram.diagonal().mean().clamp(min=torch.finfo(x.dtype).tiny)
        # Adding a little of the identity chooses, among the rotations that fit the pairs equally well, the one with the
        # largest trace, which is the one nearest the identity.
        left, _, right = torch.linalg.svd(x.mT @ y + STAY * scale * identity)
        rotation = left @ right
        # Solved for W - R, whose right-hand side is exactly 0 where nothing was observed.
        change = torch.linalg.solve(gram + ridge * scale * identity, x.mT @ (y - x @ rotation))
        return (rotation + change).to(at_least_float32(stored).dtype)


def apply_map(rows: Tensor, matrix: Tensor) -> Tensor:
    """The rows as :func:`drift_map`'s map puts them, normalised. No gradient.

    Args:
        rows: ``(N, d)``, entries or prototypes.
        matrix: ``(d, d)``, the map.

    Returns:
        ``(N, d)``, unit rows, the dtype of ``rows``; a row that the map sends to zero is zero. Autocast is off here.

    Raises:
        ValueError: a matrix that is not ``(d, d)``.
    """
    check_shape("matrix", matrix, (rows.shape[1], rows.shape[1]))
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        return normalise(at_least_float32(rows) @ matrix.to(at_least_float32(rows).dtype)).to(rows.dtype)
