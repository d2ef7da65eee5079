"""Retrieval metrics against a slow reference that sorts one query at a time, and against scikit-learn."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, top_k_accuracy_score
from torch import Tensor
from torch.nn import functional

from ask_ray.training.metrics import FIGURES, Ranked, audio_to_text, rank_of_right, text_to_audio

WAYS = (text_to_audio, audio_to_text)
PERFECT = dict(zip(FIGURES, [1.0] * 6, strict=True))


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
        made[way] |= {"map10": np.mean(precisions), "median_rank": np.median(ranks), "mean_rank": np.mean(ranks)}
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


@settings(max_examples=60, deadline=None)
@given(splits(), st.integers(1, 20))
def test_figures_are_those_of_the_slow_reference_in_any_chunks(split, chunk):
    expected = reference(*(part.numpy() for part in split))
    for way, name in zip(WAYS, ("t2a", "a2t"), strict=True):
        whole, chunked = way(*split), way(*split, chunk=chunk)
        assert np.array_equal(whole.rank, chunked.rank)
        assert np.array_equal(whole.precision, chunked.precision)
        assert whole.figures() == pytest.approx(expected[name], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(splits(), st.integers(0, 9))
def test_a_bias_ranks_as_one_more_dimension_does(split, seed):
    audio, text, owner = split
    rng = np.random.default_rng(seed)
    for way, places in zip(WAYS, (len(audio), len(text)), strict=True):
        bias = torch.from_numpy(rng.integers(-3, 4, places)).float()
        one = torch.ones(len(audio) + len(text) - places, 1)
        columns = (bias[:, None], one) if way is text_to_audio else (one, bias[:, None])
        wider = [torch.cat(pair, 1) for pair in zip((audio, text), columns, strict=True)]
        assert np.array_equal(way(audio, text, owner, bias).rank, way(*wider, owner).rank)


@settings(max_examples=30, deadline=None)
@given(splits(), st.integers(0, 9), st.integers(1, 20))
def test_scores_of_tokens_rank_as_more_dimensions_do_in_any_chunks(split, seed, chunk):
    audio, text, owner = split
    rng = np.random.default_rng(seed)
    tokenwise = torch.from_numpy(rng.integers(-3, 4, (len(audio), len(text)))).float()
    wider = torch.cat([audio, tokenwise], 1), torch.cat([text, torch.eye(len(text))], 1)
    for way in WAYS:
        expected = way(*wider, owner)
        for made in (way(*split, tokenwise=tokenwise), way(*split, chunk=chunk, tokenwise=tokenwise)):
            assert np.array_equal(made.rank, expected.rank)
            assert np.array_equal(made.precision, expected.precision)


def real(clips: int = 30, noise: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    owner = counted(([1, 5, 3, 2, 12, 1, 5, 5, 4, 2] * clips)[:clips])
    audio = functional.normalize(torch.randn(clips, 8, generator=rng), dim=1)
    return audio, functional.normalize(audio[owner] + noise * torch.randn(len(owner), 8, generator=rng), dim=1), owner


def test_figures_of_real_embeddings_are_those_of_the_slow_reference():
    split = real()
    expected = reference(*(part.double().numpy() for part in split[:2]), split[2].numpy())
    for way, name in zip(WAYS, ("t2a", "a2t"), strict=True):
        figures = way(*split, chunk=7).figures()
        assert figures == pytest.approx(expected[name], abs=1e-6)
        assert 0.1 < figures["r1"] < 0.99
        assert figures["r1"] <= figures["r5"] <= figures["r10"]


def test_figures_are_those_of_scikit_learn():
    audio, text, owner = real()
    scores, figures = (text @ audio.T).numpy(), text_to_audio(audio, text, owner).figures()
    for cutoff in (1, 5, 10):
        assert figures[f"r{cutoff}"] == pytest.approx(top_k_accuracy_score(owner, scores, k=cutoff, labels=range(30)))
    few = owner < 2  # with six captions in all, nothing is cut off after ten
    back = audio_to_text(audio[:2], text[few], owner[few])
    expected = [average_precision_score(owner[few] == n, (audio[n] @ text[few].T).numpy()) for n in range(2)]
    assert back.precision == pytest.approx(np.array(expected))


def test_a_perfect_model_and_the_worst():
    owner = counted([2, 1, 3])
    audio = torch.eye(3)
    for way in WAYS:
        assert way(audio, audio[owner], owner).figures() == PERFECT
    worst = text_to_audio(audio, -audio[owner], owner).figures()
    assert (worst["r1"], worst["median_rank"], worst["mean_rank"]) == (0.0, 3.0, 3.0)


@pytest.mark.parametrize("value", [0.5, 0.0, torch.nan])
def test_a_model_that_gives_every_input_the_same_or_nan_finds_nothing(value):
    owner = counted([3] * 20)
    audio, text = torch.full((20, 4), value), torch.full((60, 4), value)
    there, back = (way(audio, text, owner).figures() for way in WAYS)
    for figures in (there, back):
        assert [figures[name] for name in ("r1", "r5", "r10", "map10")] == [0.0] * 4
    assert there["median_rank"] == 20
    assert back["median_rank"] == 58  # 57 wrong captions before the best of three


def test_one_clip_is_always_found():
    for way in WAYS:
        assert way(torch.ones(1, 2), torch.ones(4, 2), counted([4])).figures() == PERFECT


def test_one_clip_that_is_nan_never_helps():
    owner = counted([1] * 30)
    audio, text = torch.eye(30), torch.eye(30)
    audio[3] = torch.nan
    assert text_to_audio(audio, text, owner).figures()["r1"] < 1
    assert audio_to_text(audio, text, owner).figures()["r1"] == pytest.approx(29 / 30)


def test_a_caption_that_is_nan_ranks_behind_its_clip_s_good_one():
    text = torch.eye(20)[counted([2] * 20)]
    text[1] = torch.nan
    found = audio_to_text(torch.eye(20), text, counted([2] * 20))
    assert found.rank[0] == 1
    assert found.precision[0] == pytest.approx(0.5)
    assert (found.rank[1:] == 2).all(), "a NaN that is wrong stands before everything"


def test_a_clip_without_caption_is_told():
    with pytest.raises(ValueError, match="clip 1 has no caption"):
        audio_to_text(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 2]))


def test_the_median_rank_of_an_even_number_of_queries_lies_between():
    # Ranks 1, 1, 2, 2: the clips' captions of the second kind stand nearer to the other clip.
    audio = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert text_to_audio(audio, text, torch.tensor([0, 0, 1, 1])).figures()["median_rank"] == 1.5


def test_ten_thousand_clips_and_fifty_thousand_captions_are_ranked_in_little_memory():
    program = """
import resource, torch
from ask_ray.training.metrics import audio_to_text, text_to_audio
rng = torch.Generator().manual_seed(0)
owner = torch.arange(10_000).repeat_interleave(5)
audio = torch.randn(10_000, 4, generator=rng)
text = audio[owner] + 0.01 * torch.randn(50_000, 4, generator=rng)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ways = text_to_audio(audio, text, owner), audio_to_text(audio, text, owner)
ways[0].intervals()
print(*map(len, ways), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert told[:2] == ["50000", "10000"]
    assert int(told[2]) < 250 << 10, f"{told[2]} KiB, where all scores are 2 GB"


def slow_intervals(ranked: Ranked, resamples: int) -> dict[str, tuple[float, float]]:
    """Clips drawn one by one, each with its queries."""
    rng, held = np.random.default_rng(1), [np.flatnonzero(ranked.clip == clip) for clip in np.unique(ranked.clip)]
    drawn = (np.concatenate([held[n] for n in rng.integers(len(held), size=len(held))]) for _ in range(resamples))
    made = [ranked.of(queries).figures() for queries in drawn]
    return {name: tuple(np.quantile([one[name] for one in made], (0.025, 0.975))) for name in FIGURES}


@pytest.mark.parametrize("way", WAYS)
def test_intervals_are_those_of_clips_that_are_drawn_one_by_one(way):
    ranked = way(*real(200, noise=0.8))
    made, expected = ranked.intervals(8000), slow_intervals(ranked, 8000)
    for name, value in ranked.figures().items():
        low, high = made[name]
        assert low <= value <= high
        assert (low, high) == pytest.approx(expected[name], abs=0.06 * (high - low) + 1.01 / 200), name  # one clip more or less


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 99))
def test_intervals_lie_within_what_was_seen_and_depend_on_nothing_but_the_seed(ranks, captions, seed):
    rank = np.array(ranks)
    ranked = Ranked(rank, np.where(rank <= 10, 1 / rank, 0.0), np.arange(len(rank)) // captions)
    made = ranked.intervals(100, seed)
    shuffled = ranked.of(np.random.default_rng(seed).permutation(len(rank)))
    assert made == shuffled.intervals(100, seed)
    assert rank.min() - 1e-9 <= made["mean_rank"][0] <= made["mean_rank"][1] <= rank.max() + 1e-9
    assert all(low <= high for low, high in made.values())
    if len({*ranks}) == 1:
        assert {name: low for name, (low, _) in made.items()} == pytest.approx(ranked.figures())


@pytest.mark.parametrize("captions", [1, 5])
def test_intervals_cover_the_truth_about_as_often_as_they_say(captions):
    """Also where all captions of a clip succeed or fail together."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        rank = np.where(rng.random(300) < 0.3, 1, 2).repeat(captions)
        low, high = Ranked(rank, 1 / rank, np.arange(300).repeat(captions)).intervals(300, seed)["r1"]
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def test_one_right_candidate_of_each_query_is_ranked_whatever_the_candidates_are():
    queries, classes = torch.eye(4)[[0, 1, 2, 3]], torch.eye(4)[:3]
    ranked = rank_of_right(queries, classes, torch.tensor([0, 1, 1, 2]))
    assert ranked.rank.tolist() == [1, 1, 3, 3], "a tie counts against the system"
