"""Shares and reliability by source, against counting by hand, and over ranks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ask_ray.knowledge.replica import Neighbourhood, Reading
from ask_ray.training.by_source import by_source, source_totals

NAMES = ["train", "enriched", "elsewhere"]
ROWS = 9


def reading(sources: Tensor, by_audio: Tensor, by_text: Tensor, valid: tuple[Tensor, Tensor]) -> Reading:
    table = torch.zeros(len(sources), 4)
    found = Neighbourhood(by_audio, valid[0]), Neighbourhood(by_text, valid[1])
    return Reading(*found, table, table, torch.arange(len(sources)), sources)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Reading, Tensor]:
    seed, pairs, k = draw(st.integers(0, 10_000)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = torch.Generator().manual_seed(seed)
    sources = torch.randint(0, draw(st.integers(1, 3)), (ROWS,), generator=rng)
    rows = torch.randint(0, ROWS, (2, pairs, k), generator=rng)
    valid = torch.rand(2, pairs, k, generator=rng) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    psi = pairs * torch.randn(pairs, generator=rng).softmax(0)
    return reading(sources, rows[0], rows[1], (valid[0], valid[1])), psi


def by_hand(one: Reading, psi: Tensor) -> dict[str, float]:
    pairs = [
        [int(one.sources[row]) for near in (one.by_audio, one.by_text) for row in near.rows[pair][near.valid[pair]]]
        for pair in range(len(psi))
    ]
    every, made = list(itertools.chain(*pairs)), {}
    for code, name in enumerate(NAMES):
        made[f"share_{name}"] = every.count(code) / len(every) if every else math.nan
        weights = [pair.count(code) / len(pair) if pair else 0.0 for pair in pairs]
        weighted = sum(weight * float(value) for weight, value in zip(weights, psi, strict=True))
        made[f"reliability_{name}"] = weighted / sum(weights) if sum(weights) else math.nan
    return made


@given(batches())
def test_the_metrics_are_those_counted_by_hand(batch):
    made = by_source(source_totals(batch[0], 3, batch[1]), NAMES)
    assert {name: value.shape for name, value in made.items()} == dict.fromkeys(made, torch.Size([]))
    expected = by_hand(*batch)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert float(made[name]) == pytest.approx(value, abs=1e-5, nan_ok=True)


@given(batches(), st.integers(0, 6))
def test_totals_of_ranks_add_up_to_those_of_the_global_batch(batch, cut):
    one, psi = batch

    def part(of: slice) -> Tensor:
        near = [Neighbourhood(found.rows[of], found.valid[of]) for found in (one.by_audio, one.by_text)]
        return source_totals(Reading(*near, one.audio, one.text, one.numbers, one.sources), 3, psi[of])

    torch.testing.assert_close(part(slice(None, cut)) + part(slice(cut, None)), source_totals(one, 3, psi))


def test_reliability_tells_which_source_the_agreeing_pairs_read():
    """Two pairs, one reading one source, one the other; an absent source has no share and no reliability."""
    rows, every = torch.tensor([[0, 0], [1, 1]]), torch.ones(2, 2, dtype=torch.bool)
    made = by_source(source_totals(reading(torch.tensor([0, 1]), rows, rows, (every, every)), 3, torch.tensor([1.5, 0.5])), NAMES)
    assert {name: float(value) for name, value in made.items() if "elsewhere" not in name} == {
        "share_train": 0.5, "share_enriched": 0.5, "reliability_train": 1.5, "reliability_enriched": 0.5,
    }  # fmt: skip
    assert float(made["share_elsewhere"]) == 0
    assert math.isnan(made["reliability_elsewhere"])


def test_a_potential_of_another_batch_is_refused():
    rows, every = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="potential"):
        source_totals(reading(torch.tensor([0]), rows, rows, (every, every)), 1, torch.ones(4))


def test_no_gradient_is_kept():
    rows, every = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    psi = torch.ones(2, requires_grad=True)
    assert not source_totals(reading(torch.tensor([0]), rows, rows, (every, every)), 1, psi).requires_grad
