"""Optimal-transport realignment (method: ASK §4.5): the entropic plan of a batch, and how it enters the loss.

    Q* = argmax_Q <Q, S> + ε H(Q),   Q 1 = Qᵀ 1 = 1 / B

Q* is the one matrix of the form exp(S / ε + f_i + g_j) with these marginals. Sinkhorn's sweeps normalise columns and
rows in turn; they run on log Q, so that a small ε does not underflow (Peyré and Cuturi, Computational Optimal
Transport, 2019, §4.4), and on log Q itself rather than on f and g: its large entries are near 0, where floats are
dense, so float32 reaches marginals of 1e-6. At ε ≈ 0.03 and with audio and text well aligned, the plan is close to a
permutation and sweeps alone take thousands of rounds. So every few sweeps one Newton step on g does what many sweeps
would (Sinkhorn-Newton: Brauer, Clason, Lorenz and Wirth, 2017, arXiv 1710.06635).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ask_ray.method import interaction
from ask_ray.method.tensors import at_least_float32, check_positive, check_shape, check_share

SWEEPS_PER_CHECK = 10
"""Sweeps between two looks at the marginal error: each look waits for the device."""

LARGEST_STEP = 3.0
"""Bound of a Newton step on log Q; the objective is near its quadratic model only within a few units of log Q."""


class Potentials(NamedTuple):
    """The plan of a whole test set as Q = exp(S / ε + f_i + g_j): rows (N,) f and columns (M,) g, float64.

    error: how far the row sum that is furthest off was from its share when last looked, as a part of that share; sweeps: how
    many were made.
    """

    rows: Tensor
    columns: Tensor
    error: float
    sweeps: int


def transport_plan(similarity: Tensor, epsilon: float, iterations: int = 1000, tolerance: float = 1e-6) -> Tensor:
    """Q*, the entropic optimal-transport plan with uniform marginals, scaled by B so that rows sum to 1 (ASK §4.5).

    Args:
        similarity: ``(B, B)``, finite; rows are audio, columns text. Float64 is computed in float64, every other
            dtype in float32, whatever autocast says.
        epsilon: ε > 0, the weight of the entropy, in units of similarity.
        iterations: the most Sinkhorn sweeps (one of columns and one of rows each), at least 1.
        tolerance: stop once no column sum is further than this from 1 (or than 16 units of rounding, if that is
            more). When ``iterations`` run out first, the plan so far is returned.

    Returns:
        ``(B, B)``, float32 or float64, non-negative, no gradient. Rows sum to 1, columns within ``tolerance`` of it.

    Raises:
        ValueError: a similarity that is not square; an ε, number of iterations or tolerance that is not positive.
    """
    check_shape("similarity", similarity, (similarity.shape[0], similarity.shape[0]))
    check_positive("epsilon", epsilon)
    check_positive("iterations", iterations)
    check_positive("tolerance", tolerance)
    with torch.no_grad(), torch.autocast(similarity.device.type, enabled=False):
        log_plan = _normalise_rows(at_least_float32(similarity) / epsilon)
        reachable = max(tolerance, 16 * torch.finfo(log_plan.dtype).eps)
        for sweep in range(1, iterations + 1):
            log_plan = _normalise_rows(log_plan - log_plan.logsumexp(dim=0, keepdim=True))
            if sweep % SWEEPS_PER_CHECK == 0 and sweep < iterations:
                if _marginal_error(log_plan) <= reachable:
                    break
                log_plan = _normalise_rows(log_plan + _newton_step(log_plan))
        return log_plan.exp()


def potentials(
    audio: Tensor,
    text: Tensor,
    epsilon: float,
    iterations: int = 1000,
    tolerance: float = 1e-3,
    chunk: int = 64,
    tokenwise: Tensor | None = None,
) -> Potentials:
    """The entropic plan between N clips and M captions of uniform shares, Q 1 = 1 / N and Qᵀ 1 = 1 / M, by Sinkhorn's sweeps.

    The plan itself is never held: each sweep scores the clips anew, `chunk` of them at once. Hence no Newton step either.

    Args:
        audio: ``(N, d)`` and text: ``(M, d)``, finite, floating point; their dot products are the similarity S.
        epsilon: ε > 0, in units of similarity.
        iterations: the most sweeps, at least 1.
        tolerance: stop once no row sum is off by more than this part of its share; column sums are then exact. When
            ``iterations`` run out first, the potentials so far are returned.
        chunk: rows at once, which bounds memory and changes nothing but rounding.
        tokenwise: ``(N, M)``, on any device: then S is :func:`ask_ray.method.interaction.combined` of both.

    Raises:
        ValueError: widths or shapes that differ; an ε, number of iterations or tolerance that is not positive.
    """
    check_shape("text", text, (len(text), audio.shape[1]))
    if tokenwise is not None:
        check_shape("tokenwise", tokenwise, (len(audio), len(text)))
    check_positive("epsilon", epsilon)
    check_positive("iterations", iterations)
    check_positive("tolerance", tolerance)
    with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
        audio, text = at_least_float32(audio), at_least_float32(text)
        share_of_row, share_of_column = -torch.tensor([len(audio), len(text)], dtype=torch.float64).log()
        rows = torch.full((len(audio),), torch.inf, dtype=torch.float64, device=audio.device)
        columns = torch.zeros(len(text), dtype=torch.float64, device=audio.device)
        sweeps, error = 0, torch.inf
        while sweeps < iterations and error > tolerance:
            of_rows, of_columns = _sweep(audio, text, epsilon, columns, share_of_row, chunk, tokenwise)
            sweeps, error = sweeps + 1, float((rows - of_rows).expm1().abs().max())
            if error > tolerance:
                rows, columns = of_rows, share_of_column - of_columns
        return Potentials(rows, columns, error, sweeps)


def soft_targets(plan: Tensor, beta: float) -> Tensor:
    """Y = (1 - β) I + β Q*: targets that give the transport plan a share (ASK §4.5).

    Args:
        plan: ``(B, B)``, from :func:`transport_plan`.
        beta: β in [0, 1]; 0 gives the identity.

    Returns:
        ``(B, B)``; row i is the target of audio query i, column j that of text query j (transpose it for
        :func:`ask_ray.method.objective.contrastive_loss`). Rows and columns sum to 1.

    Raises:
        ValueError: a plan that is not square, or β outside [0, 1].
    """
    check_share("beta", beta)
    check_shape("plan", plan, (plan.shape[0], plan.shape[0]))
    return (1 - beta) * torch.eye(len(plan), dtype=plan.dtype, device=plan.device) + beta * plan


def realigned_logits(similarity: Tensor, plan: Tensor, beta: float) -> Tensor:
    """S'' = (1 - β) S' + β Q*: the alternative to soft targets, with the plan in the logits (ASK §4.5).

    Args:
        similarity: ``(B, B)``.
        plan: ``(B, B)``, from :func:`transport_plan`.
        beta: β in [0, 1].

    Returns:
        ``(B, B)``, to stand for the similarity in the loss; its gradient flows through ``similarity`` alone.

    Raises:
        ValueError: shapes that differ, or β outside [0, 1].
    """
    check_share("beta", beta)
    check_shape("plan", plan, similarity.shape)
    return (1 - beta) * similarity + beta * plan


def _sweep(
    audio: Tensor, text: Tensor, epsilon: float, columns: Tensor, share: Tensor, chunk: int, tokenwise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row potentials (N,) that make row sums right, and with them log Σ exp(S / ε + f) of every column, (M,)."""
    rows, summed = columns.new_empty(len(audio)), torch.full_like(columns, -torch.inf)
    for start in range(0, len(audio), chunk):
        mine = slice(start, start + chunk)
        similarity = audio[mine] @ text.T
        if tokenwise is not None:
            similarity = interaction.combined(similarity, tokenwise[mine].to(similarity.device))
        scores = similarity.double() / epsilon
        rows[mine] = share - (scores + columns).logsumexp(dim=1)
        torch.logaddexp(summed, (scores + rows[mine, None]).logsumexp(dim=0), out=summed)
    return rows, summed


def _normalise_rows(log_plan: Tensor) -> Tensor:
    return log_plan - log_plan.logsumexp(dim=1, keepdim=True)


def _marginal_error(log_plan: Tensor) -> float:
    return (log_plan.exp().sum(dim=0) - 1).abs().max().item()


def _newton_step(log_plan: Tensor) -> Tensor:
    """The bounded Newton step ``(B,)`` on the columns' potentials g, rows being normalised.

    Its Hessian, diag(column sums) - QᵀQ, is the Laplacian of the graph with weights QᵀQ. It is built from those
    weights, without cancellation, so that the step is accurate where columns are almost disconnected. A constant
    added to g changes nothing: the rank-one term fixes it.
    """
    plan = log_plan.exp()
    links = (plan.mT @ plan).fill_diagonal_(0)
    degrees = links.sum(dim=1)
    numbers = torch.finfo(plan.dtype)
    laplacian = torch.diag(degrees * (1 + 8 * numbers.eps) + numbers.tiny) - links
    step = torch.linalg.solve_ex(laplacian + degrees.mean() / len(plan), 1 - plan.sum(dim=0)).result
    step = step.masked_fill(~step.isfinite(), 0.0)
    step = step - step.mean()
    return step * (LARGEST_STEP / step.abs().max()).clamp(max=1.0)
