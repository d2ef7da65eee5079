"""Normalisation at and near zero, and the checks of arguments."""

import pytest
import torch

from ask_ray.method import tensors


def test_normalise_gives_unit_rows_and_leaves_zero_alone():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    assert torch.allclose(tensors.normalise(vectors), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))


def test_normalise_has_a_small_finite_gradient_at_zero():
    vectors = torch.zeros(2, 3, requires_grad=True)
    tensors.normalise(vectors).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().max() <= 1


def test_at_least_float32_widens_only_half_precision():
    for given, wanted in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)] + [
        (dtype, dtype) for dtype in (torch.float32, torch.float64)
    ]:
        assert tensors.at_least_float32(torch.zeros(1, dtype=given)).dtype == wanted


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_check_positive_rejects(value: float):
    with pytest.raises(ValueError, match="temperature must be positive"):
        tensors.check_positive("temperature", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_check_share_rejects(value: float):
    with pytest.raises(ValueError, match=r"rho must be in \[0, 1\]"):
        tensors.check_share("rho", value)


def test_check_shape_does_not_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 1\), expected \(2, 3\)"):
        tensors.check_shape("weights", torch.zeros(2, 1), (2, 3))
