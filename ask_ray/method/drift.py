"""Representation drift mismatch (method: ASK §3.3, Eq. 4): how far a stored knowledge base is from the encoders.

    RDM = mean_i KL(P_ideal(·|i) ‖ P_actual(·|i)),   P(n|i) = softmax_n(q_i · x_n / τ)

with x the entries encoded by the current weights for P_ideal, and as they are stored for P_actual.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ask_ray.method.tensors import at_least_float32, check_positive, check_shape


def rdm(queries: Tensor, fresh: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """RDM over a set of entries of one modality (ASK Eq. 4). A diagnostic: no gradient.

    Args:
        queries: ``(P, d)``, embeddings by the current weights, P > 0.
        fresh: ``(M, d)``, the entries encoded by the current weights, M > 0.
        stored: ``(M, d)``, the same entries as the knowledge base holds them.
        temperature: τ > 0.

    Returns:
        Scalar >= 0 in nats, float32 (float64 for float64); exactly 0 when ``fresh`` equals ``stored``, as right after
        a refresh. Autocast is off here.

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
