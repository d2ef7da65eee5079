"""RDM against scipy; zero right after a refresh, and larger the further the encoders have moved."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.special import rel_entr, softmax
from torch import Tensor
from torch.nn import functional

from ask_ray.config import COLDEST
from ask_ray.method import drift


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_rdm_is_the_mean_kl_divergence(temperature: float):
    queries, fresh, stored = unit(5, 8), unit(20, 8, seed=1), unit(20, 8, seed=2)
    ideal, actual = (softmax(queries.numpy() @ rows.numpy().T / temperature, axis=1) for rows in (fresh, stored))
    expected = rel_entr(ideal, actual).sum(1).mean()
    assert drift.rdm(queries, fresh, stored, temperature).item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 40), st.integers(0, 2**16), st.sampled_from([0.005, 0.07, 1]))
def test_rdm_is_exactly_zero_after_a_refresh(queries: int, entries: int, width: int, seed: int, temperature: float):
    asked, fresh = unit(queries, width, seed=seed), unit(entries, width, seed=seed + 1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        stored = fresh.to(dtype).clone()
        assert drift.rdm(asked.to(dtype), fresh.to(dtype), stored, temperature).item() == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([torch.float32, torch.float64]))
def test_rdm_is_positive_and_grows_as_the_encoder_moves_away(seed: int, dtype: torch.dtype):
    """The stored rows stay; the encoder turns every entry along a fixed direction of its own, further and further."""
    stored, direction = unit(64, 16, seed=seed), unit(64, 16, seed=seed + 1)
    readings = []
    for distance in (0.0, 0.05, 0.2, 0.8):
        fresh = functional.normalize(stored + distance * direction, dim=1).to(dtype)
        readings.append(drift.rdm(fresh, fresh, stored.to(dtype), 0.07).item())
    assert readings[1] > 0
    assert readings == sorted(readings)


@pytest.mark.parametrize("temperature", [COLDEST, 0.07, 1.0])
def test_rdm_of_unit_rows_stays_below_the_bound_that_thresholds_are_held_to(temperature: float):
    """The worst there is: entries are stored as their opposites, and those that the query likes least are its favourites."""
    query, entries, readings = unit(1, 8), 2000, []
    for disliked in range(1, entries, 7):
        signs = torch.ones(entries, 1, dtype=torch.float64)
        signs[:disliked] = -1
        readings.append(drift.rdm(query, signs * query, -signs * query, temperature).item())
    assert 4 / temperature / 3 < max(readings) < 4 / temperature


def test_rdm_falls_as_the_stored_rows_are_corrected():
    stored, fresh = unit(40, 16), unit(40, 16, seed=1)
    readings = [drift.rdm(fresh, fresh, torch.lerp(stored, fresh, share), 0.07).item() for share in (0, 0.25, 0.5, 0.75, 1)]
    assert readings == sorted(readings, reverse=True)
    assert readings[-1] == pytest.approx(0, abs=1e-12)


def test_rdm_is_zero_whatever_the_stored_rows_memory_layout():
    """Equal rows laid out otherwise may take another matrix-product kernel, which rounds differently."""
    queries, fresh = unit(33, 257, dtype=torch.float32), unit(65, 257, seed=1, dtype=torch.float32)
    assert drift.rdm(queries, fresh, fresh.mT.contiguous().mT, 0.005).item() == 0.0


def test_rdm_counts_what_the_queries_see():
    """Moving all entries at right angles to the queries changes no distribution."""
    queries, fresh = torch.eye(4, 8, dtype=torch.float64), unit(10, 8)
    aside = fresh.clone()
    aside[:, 4:] = aside[:, 4:].flip(0)
    assert drift.rdm(queries, fresh, aside, 0.07).item() == 0.0


def test_rdm_has_no_gradient_and_is_float32_or_wider_under_autocast():
    queries, fresh, stored = (unit(6, 8, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reading = drift.rdm(queries, fresh, stored, 0.07)
    assert not reading.requires_grad
    assert reading.dtype == torch.float32
    assert torch.equal(reading, drift.rdm(queries, fresh, stored, 0.07))


def test_rdm_stays_finite_when_distributions_do_not_overlap():
    queries = torch.eye(2, 4)
    assert drift.rdm(queries, queries.clone(), -queries, 0.001).isfinite()


def test_rejections():
    rows = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="temperature"):
        drift.rdm(rows, rows, rows, 0.0)
    with pytest.raises(ValueError, match="stored"):
        drift.rdm(rows, rows, torch.zeros(2, 4), 0.1)
    with pytest.raises(ValueError, match="queries"):
        drift.rdm(torch.zeros(3, 2), rows, rows, 0.1)
    with pytest.raises(ValueError, match="number of queries"):
        drift.rdm(torch.zeros(0, 4), rows, rows, 0.1)
    with pytest.raises(ValueError, match="number of entries"):
        drift.rdm(rows, torch.zeros(0, 4), torch.zeros(0, 4), 0.1)


# --- the drift map ---


def rows_of(count: int, dim: int, seed: int) -> torch.Tensor:
    return functional.normalize(
        torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def rotation_of(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def test_a_strong_ridge_is_the_procrustes_rotation():
    stored, fresh = rows_of(60, 7, 0), rows_of(60, 7, 1)
    rotation, _ = orthogonal_procrustes(stored.numpy(), fresh.numpy())
    np.testing.assert_allclose(drift.drift_map(stored, fresh, 1e7), rotation, atol=1e-5)


def test_a_weak_ridge_is_least_squares():
    stored, fresh = rows_of(60, 7, 0), rows_of(60, 7, 1)
    np.testing.assert_allclose(drift.drift_map(stored, fresh, 1e-9), np.linalg.lstsq(stored, fresh)[0], atol=1e-6)


@given(st.integers(1, 40), st.integers(2, 12), st.floats(0.01, 10), st.integers(0, 99))
def test_it_minimises_its_objective(pairs, dim, ridge, seed):
    """The gradient of the objective, by autograd, is zero at the map."""
    stored, fresh = rows_of(pairs, dim, seed), rows_of(pairs, dim, seed + 1)
    rotation = drift.drift_map(stored, fresh, 1e9)
    weight = ridge * float((stored.mT @ stored).trace()) / dim
    found = drift.drift_map(stored, fresh, ridge).requires_grad_()
    objective = (stored @ found - fresh).square().sum() + weight * (found - rotation).square().sum()
    (gradient,) = torch.autograd.grad(objective, found)
    assert float(gradient.abs().max()) < 1e-5


@given(st.integers(2, 12), st.integers(12, 40), st.floats(0.001, 10), st.integers(0, 99))
def test_a_rotation_is_recovered(dim, pairs, ridge, seed):
    stored, rotation = rows_of(pairs, dim, seed), rotation_of(dim, seed)
    np.testing.assert_allclose(drift.drift_map(stored, stored @ rotation, ridge), rotation, atol=1e-5)


@given(st.integers(1, 5), st.integers(8, 16), st.integers(0, 99))
def test_directions_that_nobody_observed_are_left_alone(pairs, dim, seed):
    stored, fresh = rows_of(pairs, dim, seed), rows_of(pairs, dim, seed + 1)
    seen = torch.linalg.svd(torch.cat([stored, fresh]), full_matrices=True).Vh
    unseen = seen[2 * pairs :]
    np.testing.assert_allclose(unseen @ drift.drift_map(stored, fresh, 0.1), unseen, atol=1e-5)


def test_nothing_moved_nothing_moves_and_the_order_of_pairs_does_not_matter():
    stored, fresh = rows_of(30, 6, 0), rows_of(30, 6, 1)
    np.testing.assert_allclose(drift.drift_map(stored, stored, 0.1), torch.eye(6), atol=1e-7)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(drift.drift_map(stored[order], fresh[order], 0.1), drift.drift_map(stored, fresh, 0.1), atol=1e-9)


def test_mapped_rows_are_unit_rows_of_their_dtype():
    rows = rows_of(9, 5, 0).float()
    mapped = drift.apply_map(rows, 3 * rotation_of(5, 1))
    assert mapped.dtype == torch.float32
    np.testing.assert_allclose(mapped.norm(dim=1), 1, atol=1e-6)
    np.testing.assert_allclose(mapped, rows.double() @ rotation_of(5, 1), atol=1e-6)


@pytest.mark.parametrize(("stored", "fresh", "ridge"), [((3, 4), (3, 5), 1.0), ((0, 4), (0, 4), 1.0), ((3, 4), (3, 4), 0.0)])
def test_a_map_of_nothing_is_refused(stored, fresh, ridge):
    with pytest.raises(ValueError, match=r"pairs|fresh|ridge"):
        drift.drift_map(torch.ones(stored), torch.ones(fresh), ridge)


@given(st.integers(1, 40), st.integers(1, 12), st.floats(1e-3, 1e3), st.floats(0.01, 100), st.integers(0, 99))
def test_the_length_of_rows_and_their_number_do_not_change_what_a_ridge_means(pairs, dim, ridge, length, seed):
    stored, fresh = rows_of(pairs, dim, seed), rows_of(pairs, dim, seed + 1)
    found = drift.drift_map(stored, fresh, ridge)
    np.testing.assert_allclose(drift.drift_map(length * stored, length * fresh, ridge), found, atol=1e-6)
    np.testing.assert_allclose(drift.drift_map(stored.repeat(3, 1), fresh.repeat(3, 1), ridge), found, atol=1e-6)


def test_a_map_of_float32_rows_is_float32_without_gradient_and_the_same_under_autocast():
    stored, fresh = rows_of(9, 5, 0).float().requires_grad_(), rows_of(9, 5, 1).float().requires_grad_()
    found = drift.drift_map(stored, fresh, 0.1)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(drift.drift_map(stored, fresh, 0.1), found)
        inside = drift.apply_map(stored, found)
    assert torch.equal(inside, drift.apply_map(stored, found))
    assert not inside.requires_grad


def test_a_map_brings_entries_that_it_was_not_fitted_on_nearer_to_where_they_went():
    """The drift that all rows share is undone; what each row drifts by itself stays."""
    stored = rows_of(400, 16, 0)
    common = torch.linalg.matrix_exp(0.3 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    fresh = functional.normalize(stored @ common + 0.05 * rows_of(400, 16, 2), dim=1)
    mapped = drift.apply_map(stored[200:], drift.drift_map(stored[:200], fresh[:200], 0.1))
    before, after = ((fresh[200:] - rows).norm(dim=1).mean() for rows in (stored[200:], mapped))
    assert after < before / 4


def test_a_matrix_of_another_width_is_refused():
    with pytest.raises(ValueError, match="matrix"):
        drift.apply_map(torch.ones(3, 4), torch.eye(5))
