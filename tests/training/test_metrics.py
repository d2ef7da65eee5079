"""Retrieval metrics against a slow reference that sorts one query at a time."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ask_ray.training.metrics import Retrieval, audio_to_text, text_to_audio

WAYS = (text_to_audio, audio_to_text)


def reference(audio: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, dict[str, float]]:
    """Both ways, one query at a time: wrong candidates stand before right ones that score the same."""
    made = {}
    for way, queries, candidates in (("t2a", text, audio), ("a2t", audio, text)):
        ranks, precisions = [], []
        for number, query in enumerate(queries):
            right = [owner[number] == n if way == "t2a" else owner[n] == number for n in range(len(candidates))]
            scores = [float(query @ candidate) for candidate in candidates]
            order = sorted(range(len(candidates)), key=lambda n: (-scores[n], right[n]))
            places = [place for place, n in enumerate(order, 1) if right[n]]
            ranks.append(places[0])
            hits = [(hit / place) for hit, place in enumerate(places, 1) if place <= 10]
            precisions.append(sum(hits) / min(10, len(places)))
        made[way] = {f"r{cutoff}": np.mean([rank <= cutoff for rank in ranks]) for cutoff in (1, 5, 10)}
        made[way] |= {"map10": np.mean(precisions), "median_rank": np.median(ranks), "n": len(audio)}
    return made


def counted(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


@st.composite
def splits(draw):
    """Small whole numbers: products are exact, so ties are ties whatever order they are summed in, and there are many."""
    counts = draw(st.lists(st.integers(1, 14), min_size=1, max_size=14))
    owner = counted(counts)[torch.tensor(draw(st.permutations(range(sum(counts)))))]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    high = draw(st.integers(1, 4))
    audio, text = (torch.from_numpy(rng.integers(-high, high + 1, (n, 3))).float() for n in (len(counts), len(owner)))
    return audio, text, owner


@settings(max_examples=100, deadline=None)
@given(splits(), st.integers(1, 20))
def test_figures_are_those_of_the_slow_reference_in_any_chunks(split, chunk):
    expected = reference(*(part.numpy() for part in split))
    for way, name in zip(WAYS, ("t2a", "a2t"), strict=True):
        whole_at_once, in_chunks = asdict(way(*split)), asdict(way(*split, chunk=chunk))
        assert whole_at_once == in_chunks
        assert whole_at_once == pytest.approx(expected[name], abs=1e-6)


def test_figures_of_real_embeddings_are_those_of_the_slow_reference():
    rng = torch.Generator().manual_seed(0)
    owner = counted([1, 5, 3, 2, 12, 1, 5, 5, 4, 2] * 3)
    audio = functional.normalize(torch.randn(30, 8, generator=rng), dim=1)
    text = functional.normalize(audio[owner] + 0.4 * torch.randn(len(owner), 8, generator=rng), dim=1)
    expected = reference(audio.double().numpy(), text.double().numpy(), owner.numpy())
    for way, name in zip(WAYS, ("t2a", "a2t"), strict=True):
        figures = asdict(way(audio, text, owner, chunk=7))
        assert figures == pytest.approx(expected[name], abs=1e-6)
        assert 0.1 < figures["r1"] < 0.99
        assert figures["r1"] <= figures["r5"] <= figures["r10"]


def test_a_perfect_model_and_the_worst():
    owner = counted([2, 1, 3])
    audio = torch.eye(3)
    best = Retrieval(1.0, 1.0, 1.0, 1.0, 1.0, 3)
    assert text_to_audio(audio, audio[owner], owner) == best
    assert audio_to_text(audio, audio[owner], owner) == best
    worst = text_to_audio(audio, -audio[owner], owner)
    assert (worst.r1, worst.median_rank) == (0.0, 3.0)


@pytest.mark.parametrize("value", [0.5, 0.0, torch.nan])
def test_a_model_that_gives_every_input_the_same_or_nan_finds_nothing(value):
    owner = counted([3] * 20)
    audio, text = torch.full((20, 4), value), torch.full((60, 4), value)
    there, back = text_to_audio(audio, text, owner), audio_to_text(audio, text, owner)
    for figures in (there, back):
        assert (figures.r1, figures.r5, figures.r10, figures.map10) == (0.0, 0.0, 0.0, 0.0)
    assert there.median_rank == 20
    assert back.median_rank == 58  # 57 wrong captions before the best of three


def test_one_clip_is_always_found():
    for way in WAYS:
        assert way(torch.ones(1, 2), torch.ones(4, 2), counted([4])) == Retrieval(1.0, 1.0, 1.0, 1.0, 1.0, 1)


def test_one_clip_that_is_nan_never_helps():
    owner = counted([1] * 30)
    audio, text = torch.eye(30), torch.eye(30)
    audio[3] = torch.nan
    assert text_to_audio(audio, text, owner).r1 < 1
    assert audio_to_text(audio, text, owner).r1 == pytest.approx(29 / 30)


def test_the_median_rank_of_an_even_number_of_queries_lies_between():
    # Ranks 1, 1, 2, 2: the clips' captions of the second kind stand nearer to the other clip.
    audio = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert text_to_audio(audio, text, torch.tensor([0, 0, 1, 1])).median_rank == 1.5
