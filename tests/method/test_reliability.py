"""Consistency and Ψ: mean 1, detached, and lower for a pair whose neighbourhoods disagree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ask_ray.method import injection, reliability

ENTRIES, WIDTH, NEIGHBOURS = 60, 16, 5


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def read_both(entries: Tensor, ids: Tensor, similarity: Tensor) -> Tensor:
    return injection.read(entries[ids], injection.neighbour_weights(similarity, 0.07))


def consistency_of(audio: Tensor, text: Tensor, by_audio: Tensor, by_text: Tensor) -> Tensor:
    """c of pairs whose audio retrieved entries ``by_audio`` and whose text retrieved ``by_text``, equally similar."""
    level = torch.zeros(by_audio.shape, dtype=audio.dtype)
    reads = [
        read_both(rows, ids, level) for rows, ids in [(audio, by_audio), (audio, by_text), (text, by_text), (text, by_audio)]
    ]
    return reliability.consistency(*reads)


def test_consistency_is_the_mean_of_two_cosines():
    reads = [unit(4, 6, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(4)]
    first, second, third, fourth = (tensor.numpy() for tensor in reads)

    def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)

    expected = (cosine(first, second) + cosine(third, fourth)) / 2
    np.testing.assert_allclose(reliability.consistency(*reads), expected, atol=1e-12)


def test_the_same_neighbourhood_is_consistency_one_and_an_empty_one_is_zero():
    generator = torch.Generator().manual_seed(0)
    audio, text = unit(3, 6, generator=generator), unit(3, 6, generator=generator)
    torch.testing.assert_close(reliability.consistency(audio, audio, text, text), torch.ones(3, dtype=torch.float64))
    nothing = torch.zeros_like(audio)
    assert (reliability.consistency(nothing, audio, text, nothing) == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64), st.integers(0, 2**16), st.sampled_from([0.02, 0.1, 0.5, 5.0]))
def test_potential_has_mean_one(batch: int, seed: int, temperature: float):
    consistency = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    potential = reliability.potential(consistency, temperature)
    assert potential.mean().item() == pytest.approx(1, abs=1e-5)
    assert (potential >= 0).all()
    assert (potential <= batch * (1 + 1e-6)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16))
def test_potential_falls_when_a_pairs_neighbourhoods_are_shuffled(seed: int):
    generator = torch.Generator().manual_seed(seed)
    audio = unit(ENTRIES, WIDTH, generator=generator)
    text = functional.normalize(audio + 0.3 * unit(ENTRIES, WIDTH, generator=generator), dim=-1)
    neighbours = torch.stack([torch.randperm(ENTRIES, generator=generator)[:NEIGHBOURS] for _ in range(8)])
    shuffled = neighbours.clone()
    pool = [entry for entry in range(ENTRIES) if entry not in set(neighbours[0].tolist())]
    shuffled[0] = torch.tensor(pool)[torch.randperm(len(pool), generator=generator)[:NEIGHBOURS]]
    before = reliability.potential(consistency_of(audio, text, neighbours, neighbours), 0.5)
    after = reliability.potential(consistency_of(audio, text, neighbours, shuffled), 0.5)
    torch.testing.assert_close(before, torch.ones_like(before))
    assert after[0] < before[0]
    assert (after[1:] > before[1:]).all()


def test_potential_is_detached_and_flattens_with_temperature():
    consistency = torch.tensor([0.9, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    sharp, flat = reliability.potential(consistency, 0.1), reliability.potential(consistency, 100.0)
    assert not sharp.requires_grad
    assert sharp[0] > sharp[1] > sharp[2]
    torch.testing.assert_close(flat, torch.ones(3, dtype=torch.float64), atol=0.02, rtol=0)


def test_rejections():
    with pytest.raises(ValueError, match="temperature"):
        reliability.potential(torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="audio_by_text"):
        reliability.consistency(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="text_by_text"):
        reliability.consistency(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(1, 3))
