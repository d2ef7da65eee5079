"""The plan against POT, and by the optimality conditions where POT's sweeps are too slow; targets and logits."""

from functools import cache

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ask_ray.method import transport


def batch(size: int, seed: int = 0, width: int = 16, noise: float = 1.0) -> Tensor:
    """Similarities of ``size`` pairs whose text is the audio plus noise (noise 0.1: almost aligned), float64."""
    generator = torch.Generator().manual_seed(seed)
    audio = functional.normalize(torch.randn(size, width, generator=generator, dtype=torch.float64), dim=1)
    shift = functional.normalize(torch.randn(size, width, generator=generator, dtype=torch.float64), dim=1)
    return audio @ functional.normalize(audio + noise * shift, dim=1).T


def uniform(size: int, seed: int) -> Tensor:
    """Similarities drawn from [-1, 1], float64."""
    return torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def assert_optimal(plan: Tensor, similarity: Tensor, epsilon: float, atol: float) -> None:
    """The one optimum has uniform marginals, and log Q - S / ε is a row term plus a column term."""
    ones = torch.ones(len(plan), dtype=plan.dtype)
    torch.testing.assert_close(plan.sum(1), ones, atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(0), ones, atol=atol, rtol=0)
    potentials = plan.log() - similarity / epsilon
    rest = potentials - potentials.mean(0) - potentials.mean(1, keepdim=True) + potentials.mean()
    assert rest.abs().max() < 1e-8


@cache  # the same for every dtype, and slow
def plan_of_pot(size: int, seed: int, epsilon: float) -> tuple[Tensor, np.ndarray]:
    """Similarities, and POT's plan of them, both float64."""
    similarity = batch(size, seed, width=8, noise=2.0)
    weights = np.full(size, 1 / size)
    plan = size * ot.sinkhorn(weights, weights, -similarity.numpy(), epsilon, "sinkhorn_log", numItermax=5000, stopThr=1e-12)
    assert np.abs(plan.sum(0) - 1).max() < 1e-8, "the oracle itself has not converged"
    return similarity, plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.03, 0.05, 0.2, 1.0])
@pytest.mark.parametrize(("size", "seed"), [(2, 2), (8, 0), (32, 1), (96, 0)])
def test_plan_agrees_with_pot(size: int, seed: int, epsilon: float, dtype: torch.dtype):
    similarity, expected = plan_of_pot(size, seed, epsilon)
    plan = transport.transport_plan(similarity.to(dtype, copy=True), epsilon)
    assert plan.dtype == dtype
    np.testing.assert_allclose(plan.numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("epsilon", [0.03, 0.05, 0.1])
@pytest.mark.parametrize("size", [3, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_plan_is_optimal_where_plain_sweeps_crawl(size: int, epsilon: float, seed: int):
    for similarity in (batch(size, seed, noise=0.1), batch(size, seed, width=4, noise=0.2), uniform(size, seed)):
        plan = transport.transport_plan(similarity, epsilon, iterations=300)
        assert_optimal(plan, similarity, epsilon, atol=1e-6)
        narrow = transport.transport_plan(similarity.float(), epsilon, iterations=300)
        torch.testing.assert_close(narrow.double(), plan, atol=1e-5, rtol=0)


def test_a_tight_tolerance_is_reached_in_float64():
    similarity = batch(24, noise=0.3)
    assert_optimal(transport.transport_plan(similarity, 0.03, tolerance=1e-13), similarity, 0.03, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.sampled_from([0.01, 0.03, 0.1, 1.0, 100.0]), st.integers(0, 2**16))
def test_rows_and_columns_sum_to_one_and_pairs_may_be_permuted(size: int, epsilon: float, seed: int):
    similarity = uniform(size, seed)
    plan = transport.transport_plan(similarity, epsilon)
    assert (plan >= 0).all()
    ones = torch.ones(size, dtype=plan.dtype)
    torch.testing.assert_close(plan.sum(1), ones, atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(0), ones, atol=1.1e-6, rtol=0)
    rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
    permuted = transport.transport_plan(similarity[rows][:, columns], epsilon)
    torch.testing.assert_close(permuted, plan[rows][:, columns], atol=1e-5, rtol=0)


def test_plan_ignores_terms_of_rows_and_columns():
    similarity = batch(12)
    moved = similarity + torch.linspace(-1, 1, 12, dtype=torch.float64) + torch.linspace(0, 2, 12)[:, None]
    plans = [transport.transport_plan(s, 0.05, tolerance=1e-12) for s in (similarity, moved)]
    torch.testing.assert_close(*plans, atol=1e-10, rtol=0)


def test_entropy_spreads_the_plan_and_its_absence_gives_the_assignment():
    similarity = batch(8, noise=0.5)
    spread = transport.transport_plan(similarity, 1000.0)
    torch.testing.assert_close(spread, torch.full_like(spread, 1 / 8), atol=1e-3, rtol=0)
    torch.testing.assert_close(transport.transport_plan(similarity, 0.005), torch.eye(8).double(), atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32_without_gradient(dtype: torch.dtype):
    similarity = batch(16, noise=0.3).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = transport.transport_plan(similarity, 0.05)
    assert plan.dtype == torch.float32
    assert not plan.requires_grad
    assert torch.equal(plan, transport.transport_plan(similarity.float(), 0.05))


def test_iterations_bound_the_work_and_rows_still_sum_to_one():
    plan = transport.transport_plan(batch(16, noise=2.0), 0.03, iterations=1)
    torch.testing.assert_close(plan.sum(1), torch.ones(16, dtype=torch.float64))
    assert (plan.sum(0) - 1).abs().max() > 1e-3


def test_soft_targets_mix_identity_and_plan():
    plan = transport.transport_plan(batch(6), 0.1)
    assert torch.equal(transport.soft_targets(plan, 0.0), torch.eye(6, dtype=torch.float64))
    assert torch.equal(transport.soft_targets(plan, 1.0), plan)
    targets = transport.soft_targets(plan, 0.2)
    np.testing.assert_allclose(targets, 0.8 * np.eye(6) + 0.2 * plan.numpy())
    np.testing.assert_allclose([targets.sum(0).numpy(), targets.sum(1).numpy()], 1, atol=1e-6)


def test_realigned_logits_mix_similarity_and_plan():
    similarity = batch(6).requires_grad_()
    plan = transport.transport_plan(similarity, 0.1)
    assert torch.equal(transport.realigned_logits(similarity, plan, 0.0), similarity)
    mixed = transport.realigned_logits(similarity, plan, 0.2)
    np.testing.assert_allclose(mixed.detach(), 0.8 * similarity.detach().numpy() + 0.2 * plan.numpy())
    mixed.sum().backward()
    torch.testing.assert_close(similarity.grad, torch.full((6, 6), 0.8, dtype=torch.float64))


def test_rejections():
    square = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="similarity"):
        transport.transport_plan(torch.zeros(3, 2), 0.1)
    with pytest.raises(ValueError, match="epsilon"):
        transport.transport_plan(square, 0.0)
    with pytest.raises(ValueError, match="iterations"):
        transport.transport_plan(square, 0.1, iterations=0)
    with pytest.raises(ValueError, match="tolerance"):
        transport.transport_plan(square, 0.1, tolerance=0.0)
    with pytest.raises(ValueError, match="beta"):
        transport.soft_targets(square, 1.1)
    with pytest.raises(ValueError, match="plan"):
        transport.soft_targets(torch.zeros(3, 2), 0.1)
    with pytest.raises(ValueError, match="plan"):
        transport.realigned_logits(square, torch.zeros(3, 1), 0.1)


def captioned(clips: int, seed: int, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    """Clips and their one to four captions, (N, 12) and (M, 12) float64 unit rows."""
    rng = np.random.default_rng(seed)
    audio = functional.normalize(torch.from_numpy(rng.standard_normal((clips, 12))), dim=1)
    owner = torch.repeat_interleave(torch.arange(clips), torch.from_numpy(rng.integers(1, 5, clips)))
    return audio, functional.normalize(audio[owner] + noise * torch.from_numpy(rng.standard_normal((len(owner), 12))), dim=1)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.1, 0.3, 1.0]), st.integers(1, 20))
def test_potentials_give_the_plan_of_pot_for_any_number_of_captions(clips: int, seed: int, epsilon: float, chunk: int):
    audio, text = captioned(clips, seed)
    shares = [np.full(len(side), 1 / len(side)) for side in (audio, text)]
    similarity = (audio @ text.T).numpy()
    expected = ot.sinkhorn(*shares, -similarity, epsilon, "sinkhorn_log", numItermax=5000, stopThr=1e-12)
    found = transport.potentials(audio, text, epsilon, iterations=5000, tolerance=1e-9, chunk=chunk)
    plan = np.exp(similarity / epsilon + found.rows[:, None].numpy() + found.columns.numpy())
    np.testing.assert_allclose(plan, expected, atol=1e-7, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(0), shares[1], rtol=1e-9)
    assert found.error <= 1e-9


def test_scores_of_tokens_are_half_of_what_is_transported():
    audio, text = captioned(9, 2)
    tokenwise = torch.rand(len(audio), len(text), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = transport.potentials(audio, text, 0.1, chunk=4, tokenwise=tokenwise)
    wider = torch.cat([audio, tokenwise], 1) / 2, torch.cat([text, torch.eye(len(text), dtype=torch.float64)], 1)
    expected = transport.potentials(*wider, 0.1, chunk=4)
    assert made.sweeps == expected.sweeps
    torch.testing.assert_close(made.rows, expected.rows)
    torch.testing.assert_close(made.columns, expected.columns)


def test_potentials_of_too_few_sweeps_tell_how_far_off_they_are():
    audio, text = captioned(40, 0)
    found = transport.potentials(audio.float(), text.float(), 0.02, iterations=3)
    assert found.sweeps == 3
    assert found.error > 1e-3
    assert found.rows.dtype == torch.float64


def test_potentials_refuse_what_cannot_be():
    audio, text = captioned(3, 0)
    with pytest.raises(ValueError, match="text has shape"):
        transport.potentials(audio, text[:, :5], 0.1)
    with pytest.raises(ValueError, match="tokenwise has shape"):
        transport.potentials(audio, text, 0.1, tokenwise=torch.zeros(len(text), len(audio)))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        transport.potentials(audio, text, 0.0)
