"""Neighbour weights, reads and injection: against scipy, by finite differences, and with neighbours missing."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional

from ask_ray.method import injection

TAU = 0.07


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**16), st.sampled_from([0.01, 0.07, 1.0]))
def test_weights_are_the_softmax_over_present_neighbours(batch: int, k: int, seed: int, temperature: float):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(batch, k, generator=generator, dtype=torch.float64) * 2 - 1
    missing = torch.rand(batch, k, generator=generator) < 0.4
    weights = injection.neighbour_weights(similarity.masked_fill(missing, -math.inf), temperature)
    for row, scores, absent in zip(weights.numpy(), similarity.numpy(), missing.numpy(), strict=True):
        assert (row[absent] == 0).all()
        if not absent.all():
            assert row.sum() == pytest.approx(1, abs=1e-12)
            np.testing.assert_allclose(row[~absent], softmax(scores[~absent] / temperature), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_without_neighbours_weighs_nothing_in_any_dtype(dtype: torch.dtype):
    similarity = torch.tensor([[-math.inf, -math.inf], [0.9, -math.inf]], dtype=dtype)
    expected = torch.tensor([[0, 0], [1, 0]], dtype=dtype)
    assert torch.equal(injection.neighbour_weights(similarity, TAU), expected)
    assert torch.equal(injection.agreement_weights(similarity, similarity, TAU), expected)


def test_agreement_adds_the_other_side_and_takes_its_mask_from_the_similarity():
    similarity = torch.tensor([[0.5, 0.5, -math.inf]], dtype=torch.float64)
    cross = torch.tensor([[0.2, 0.4, math.nan]], dtype=torch.float64)
    weights = injection.agreement_weights(similarity, cross, 0.1)
    np.testing.assert_allclose(weights[0, :2], softmax([7.0, 9.0]), atol=1e-12)
    assert weights[0, 2] == 0


def test_agreement_with_a_constant_is_plain_weights():
    similarity = unit(4, 5)
    agreement = injection.agreement_weights(similarity, torch.full_like(similarity, 0.3), TAU)
    torch.testing.assert_close(agreement, injection.neighbour_weights(similarity, TAU))


def test_read_is_the_weighted_mean_and_reads_narrow_rows_in_the_weights_dtype():
    rows, weights = unit(3, 4, 5), injection.neighbour_weights(unit(3, 4, seed=1), TAU)
    expected = np.stack([weight @ row for weight, row in zip(weights.numpy(), rows.numpy(), strict=True)])
    np.testing.assert_allclose(injection.read(rows, weights), expected, atol=1e-12)
    assert injection.read(rows.to(torch.bfloat16), weights.float()).dtype == torch.float32


def test_combine_averages_granularities_and_normalises():
    fine, coarse = unit(3, 5), unit(3, 5, seed=1)
    mean = (fine.numpy() + coarse.numpy()) / 2
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(injection.combine(fine, coarse), expected, atol=1e-12)
    torch.testing.assert_close(injection.combine(3 * fine), fine)


def test_rho_is_the_weight_of_the_pairs_own_embedding():
    own, knowledge = unit(3, 5), unit(3, 5, seed=1)
    torch.testing.assert_close(injection.inject(own, knowledge, 1.0), own)
    torch.testing.assert_close(injection.inject(own, knowledge, 0.0), knowledge)
    nearness = [(injection.inject(own, knowledge, rho) * own).sum(1) for rho in (0.1, 0.2, 0.5, 0.8, 0.95)]
    assert all((nearer > further).all() for further, nearer in itertools.pairwise(nearness))


def test_a_pair_without_neighbours_keeps_its_own_embedding_with_finite_gradients():
    similarity = torch.full((2, 3), -math.inf, dtype=torch.float64)
    similarity[1, 0] = 0.5
    similarity.requires_grad_()
    rows, own = unit(2, 3, 4).requires_grad_(), unit(2, 4, seed=1).requires_grad_()
    knowledge = injection.combine(injection.read(rows, injection.neighbour_weights(similarity, TAU)))
    injected = injection.inject(own, knowledge, 0.2)
    assert (knowledge[0] == 0).all()
    torch.testing.assert_close(injected[0], own[0])
    injected[:, 0].sum().backward()
    for tensor in (similarity, rows, own):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert rows.grad is not None
    assert (rows.grad[0] == 0).all()


def test_gradients_by_finite_differences():
    similarity, rows, own = (
        unit(3, 4).requires_grad_(),
        unit(3, 4, 5).requires_grad_(),
        unit(3, 5, seed=2).requires_grad_(),
    )
    cross, coarse = unit(3, 4, seed=3).requires_grad_(), unit(3, 5, seed=4).requires_grad_()

    def whole(similarity: Tensor, cross: Tensor, rows: Tensor, coarse: Tensor, own: Tensor) -> Tensor:
        fine = injection.read(rows, injection.agreement_weights(similarity, cross, 0.3))
        return injection.inject(own, injection.combine(fine, coarse), 0.2)

    assert torch.autograd.gradcheck(whole, (similarity, cross, rows, coarse, own))
    assert torch.autograd.gradcheck(lambda s: injection.neighbour_weights(s, 0.3), (similarity,))


def test_rejections():
    with pytest.raises(ValueError, match="temperature"):
        injection.neighbour_weights(torch.zeros(1, 1), 0.0)
    with pytest.raises(ValueError, match="cross_similarity"):
        injection.agreement_weights(torch.zeros(2, 3), torch.zeros(2, 1), TAU)
    with pytest.raises(ValueError, match="weights"):
        injection.read(torch.zeros(2, 3, 4), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least one"):
        injection.combine()
    with pytest.raises(ValueError, match="read"):
        injection.combine(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="rho"):
        injection.inject(torch.zeros(2, 3), torch.zeros(2, 3), 1.5)
    with pytest.raises(ValueError, match="knowledge"):
        injection.inject(torch.zeros(2, 3), torch.zeros(3), 0.5)
