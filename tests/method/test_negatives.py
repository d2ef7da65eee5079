"""Out-of-batch negatives: the right products, the right masks, finite gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ask_ray.method import negatives


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_knowledge_negatives_are_similarities_with_a_pairs_own_neighbours():
    own, rows = normal(3, 5), normal(3, 4, 5, seed=1)
    valid = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    result = negatives.knowledge_negatives(own, rows, valid)
    for i in range(3):
        for k in range(4):
            expected = np.dot(own[i], rows[i, k]) if valid[i, k] else -math.inf
            assert result[i, k].item() == pytest.approx(expected)


def test_queue_negatives_leave_out_rows_of_the_same_clip():
    own, rows = normal(3, 5), normal(4, 5, seed=1)
    own_ids, row_ids = torch.tensor([7, 8, 9]), torch.tensor([8, 1, 8, 9])
    result = negatives.queue_negatives(own, rows, own_ids, row_ids)
    same = np.equal.outer(own_ids.numpy(), row_ids.numpy())
    np.testing.assert_allclose(result, np.where(same, -math.inf, own.numpy() @ rows.numpy().T))


def test_an_empty_queue_gives_no_columns():
    nothing = torch.empty(0, dtype=torch.int64)
    assert negatives.queue_negatives(normal(3, 5), torch.empty(0, 5), torch.arange(3), nothing).shape == (3, 0)


def test_gradients_are_finite_and_stop_at_the_mask():
    own, rows = normal(3, 5).requires_grad_(), normal(3, 4, 5, seed=1).requires_grad_()
    valid = torch.zeros(3, 4, dtype=torch.bool)
    valid[1, 2] = True
    result = negatives.knowledge_negatives(own, rows, valid)
    result.logsumexp(1)[1].backward()
    assert own.grad is not None
    assert rows.grad is not None
    assert own.grad.isfinite().all()
    assert torch.equal(rows.grad.abs().sum(-1) > 0, valid)


def test_stored_rows_are_read_in_the_dtype_of_the_batch():
    own, stored = normal(3, 5).float(), normal(3, 4, 5).to(torch.bfloat16)
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert negatives.knowledge_negatives(own, stored, everything).dtype == torch.float32
    assert negatives.queue_negatives(own, stored[0], torch.arange(3), torch.arange(4)).dtype == torch.float32


def test_rejections():
    own, ids = torch.zeros(3, 5), torch.arange(3)
    with pytest.raises(ValueError, match="rows"):
        negatives.knowledge_negatives(own, torch.zeros(1, 4, 5), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="valid"):
        negatives.knowledge_negatives(own, torch.zeros(3, 4, 5), torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows"):
        negatives.queue_negatives(own, torch.zeros(4, 2), ids, torch.arange(4))
    with pytest.raises(ValueError, match="own_ids"):
        negatives.queue_negatives(own, torch.zeros(4, 5), torch.arange(1), torch.arange(4))
    with pytest.raises(ValueError, match="row_ids"):
        negatives.queue_negatives(own, torch.zeros(4, 5), ids, torch.arange(1))
