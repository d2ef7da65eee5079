"""The index against brute force, with exclusions; what is lost by inverted lists; files; prototypes."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_ray.knowledge import index


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_rows(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def blobs(centres: int, each: int, dim: int, spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = np.repeat(unit(rng.normal(size=(centres, dim))), each, axis=0)
    return unit(middle + spread * rng.normal(size=middle.shape))


def exact(rows: np.ndarray) -> faiss.Index:
    return index.build(rows, exact_below=len(rows) + 1, probes=1, seed=0)


def check_against_brute_force(
    found: index.Neighbours, rows: np.ndarray, queries: np.ndarray, k: int, numbers: np.ndarray, excluded: np.ndarray
) -> None:
    """Entries by name where similarities tell them apart; their similarities in any case."""
    assert found.similarity.shape == found.entry.shape == (len(queries), k)
    assert found.similarity.dtype == np.float32
    assert found.entry.dtype == np.int64
    for query, similarity, entry, barred in zip(queries, *found, excluded, strict=True):
        allowed = [n for n in range(len(rows)) if numbers[n] not in set(barred.tolist())]
        truth = sorted(((float(rows[n].astype(np.float64) @ query), n) for n in allowed), reverse=True)[:k]
        there = len(truth)
        assert len(set(entry[:there])) == there
        assert (entry[there:] == -1).all()
        assert (similarity[there:] == -np.inf).all()
        assert not set(numbers[entry[:there]].tolist()) & set(barred.tolist())
        assert (np.diff(similarity[:there]) <= 0).all()
        np.testing.assert_allclose(similarity[:there], [score for score, _ in truth], atol=1e-6)
        np.testing.assert_allclose(rows[entry[:there]].astype(np.float64) @ query, similarity[:there], atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    captions=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    batch=st.integers(1, 7),
    k=st.integers(1, 14),
    exclude=st.sampled_from(["self", "batch", "none"]),
    seed=st.integers(0, 2**16),
)
def test_exact_search_is_brute_force_without_the_excluded(captions, batch, k, exclude, seed):
    rng = np.random.default_rng(seed)
    numbers = np.repeat(rng.permutation(1000)[: len(captions)], captions).astype(np.int64)
    rows = random_rows(len(numbers), seed=seed)
    # Queries near stored rows of their own clip, so that what is excluded would have come first.
    own = rng.integers(0, len(rows), batch)
    queries = unit(rows[own] + 0.1 * rng.normal(size=(batch, 8)))
    ids = numbers[own][:, None]
    excluded = {"self": ids, "batch": np.broadcast_to(np.unique(ids), (batch, len(np.unique(ids)))), "none": ids[:, :0]}[exclude]
    found = index.retrieve(exact(rows), queries, k, numbers, excluded, max(captions))
    check_against_brute_force(found, rows, queries, k, numbers, excluded)


def test_every_query_has_exclusions_of_its_own_even_several():
    numbers = np.repeat(np.arange(10), 3).astype(np.int64)
    rows = random_rows(30)
    queries = random_rows(6, seed=1)
    excluded = np.array([[0, 1], [1, 2], [3, 4], [9, 0], [5, 5], [77, 78]])
    found = index.retrieve(exact(rows), queries, 12, numbers, excluded, 3)
    check_against_brute_force(found, rows, queries, 12, numbers, excluded)


def test_a_clip_that_is_all_there_is_leaves_nothing():
    rows = random_rows(3)
    found = index.retrieve(exact(rows), rows, 2, np.zeros(3, np.int64), np.zeros((3, 1), np.int64), 3)
    assert (found.entry == -1).all()
    assert (found.similarity == -np.inf).all()


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, faiss.Index]:
    rows = blobs(200, 20, 32, 0.15)
    return rows, index.build(rows, exact_below=3000, probes=16, seed=0)


def test_size_decides_between_exact_search_and_inverted_lists(large):
    rows, lists = large
    assert isinstance(lists, faiss.IndexIVF)
    assert 1 < lists.nprobe < lists.nlist
    assert isinstance(index.build(rows[:2999], 3000, 16, 0), faiss.IndexFlat)
    assert isinstance(index.build(rows[:3000], 3000, 16, 0), faiss.IndexIVF)


def test_inverted_lists_find_nine_in_ten_and_never_an_excluded_entry(large):
    rows, lists = large
    rng = np.random.default_rng(1)
    own = rng.choice(len(rows), 300, replace=False)
    queries, numbers = unit(rows[own] + 0.05 * rng.normal(size=(300, 32))), np.arange(len(rows)) // 2
    excluded = numbers[own][:, None]
    truth = index.retrieve(exact(rows), queries, 10, numbers, excluded, 2)
    found = index.retrieve(lists, queries, 10, numbers, excluded, 2)
    assert not (numbers[np.maximum(found.entry, 0)] == excluded)[found.entry >= 0].any()
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth.entry, found.entry, strict=True)])
    assert recall >= 0.9


def test_building_twice_gives_the_same_index(large):
    rows, lists = large
    again = index.build(rows, exact_below=3000, probes=16, seed=0)
    assert (faiss.serialize_index(again) == faiss.serialize_index(lists)).all()


@pytest.mark.parametrize("exact_below", [5000, 3000])
def test_an_index_from_a_file_answers_the_same(tmp_path: Path, large, exact_below):
    rows = large[0]
    built = index.build(rows, exact_below, 16, 0)
    index.save(built, tmp_path / "rows.index")
    opened = index.open_mapped(tmp_path / "rows.index")
    assert opened.ntotal == len(rows)
    for one, other in zip(built.search(rows[:64], 10), opened.search(rows[:64], 10), strict=True):
        np.testing.assert_array_equal(one, other)


def test_asking_for_a_gpu_that_is_not_there_searches_on_the_cpu(tmp_path: Path):
    rows = random_rows(20)
    index.save(exact(rows), tmp_path / "rows.index")
    opened = index.open_mapped(tmp_path / "rows.index", device=99)
    assert (opened.search(rows, 1)[1][:, 0] == np.arange(20)).all()


# --- prototypes ---


def test_each_prototype_is_the_normalised_mean_of_its_cluster_in_both_modalities():
    audio, text = blobs(12, 25, 16, 0.03, seed=1), blobs(12, 25, 16, 0.03, seed=2)
    shuffled = np.random.default_rng(0).permutation(len(audio))
    audio, text = audio[shuffled], text[shuffled]
    ours, theirs = index.prototypes(audio, text, 12, seed=3)
    assert ours.shape == theirs.shape
    assert 2 <= len(ours) <= 12
    cluster = np.argmax(audio @ ours.T + text @ theirs.T, axis=1)
    for rows, prototypes in ((audio, ours), (text, theirs)):
        means = np.stack([rows[cluster == number].astype(np.float64).mean(0) for number in range(len(prototypes))])
        np.testing.assert_allclose(prototypes, unit(means), atol=1e-5)


def test_prototypes_are_as_good_as_those_of_another_k_means():
    from sklearn.cluster import KMeans

    audio, text = random_rows(400, 8, 1), random_rows(400, 8, 2)
    pairs = np.concatenate([audio, text], axis=1)
    other = unit(KMeans(16, n_init=4, random_state=0).fit(pairs).cluster_centers_)
    ours = np.concatenate(index.prototypes(audio, text, 16, seed=0), axis=1)
    assert (pairs @ ours.T).max(1).mean() >= 0.97 * (pairs @ unit(ours).T).max(1).mean() > 0
    assert (pairs @ unit(ours).T).max(1).mean() >= 0.97 * (pairs @ other.T).max(1).mean()


def test_one_prototype_is_the_mean_of_all_rows_also_of_those_k_means_did_not_see():
    audio, text = random_rows(1000, seed=1) + 0.1, random_rows(1000, seed=2) + 0.1
    audio, text = unit(audio), unit(text)
    ours, theirs = index.prototypes(audio, text, 1, seed=0)
    np.testing.assert_allclose(ours, unit(audio.mean(0, keepdims=True)), atol=1e-5)
    np.testing.assert_allclose(theirs, unit(text.mean(0, keepdims=True)), atol=1e-5)


@pytest.mark.parametrize(("entries", "count"), [(200, 16), (9, 16), (16, 16), (1, 3)])
def test_prototypes_are_unit_paired_finite_and_no_more_than_asked_or_entries(entries, count):
    audio, text = random_rows(entries, seed=1), random_rows(entries, seed=2)
    ours, theirs = index.prototypes(audio, text, count, seed=0)
    assert ours.shape == theirs.shape
    assert 1 <= len(ours) <= min(entries, count)
    assert ours.dtype == theirs.dtype == np.float32
    for prototypes in (ours, theirs):
        np.testing.assert_allclose(np.linalg.norm(prototypes, axis=1), 1, atol=1e-6)


def test_as_many_prototypes_as_entries_are_the_entries():
    audio, text = random_rows(9, seed=1), random_rows(9, seed=2)
    ours, theirs = index.prototypes(audio, text, 9, seed=0)
    order = np.argmax(audio @ ours.T + text @ theirs.T, axis=1)
    assert sorted(order) == list(range(9))
    np.testing.assert_allclose(ours[order], audio, atol=1e-6)
    np.testing.assert_allclose(theirs[order], text, atol=1e-6)


def test_entries_that_repeat_make_no_empty_prototype():
    audio, text = np.repeat(random_rows(3, seed=1), 20, 0), np.repeat(random_rows(3, seed=2), 20, 0)
    ours, theirs = index.prototypes(audio, text, 10, seed=0)
    assert np.isfinite(ours).all()
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose((ours @ audio.T).max(axis=1), 1, atol=1e-5)  # every prototype is one of the three
    np.testing.assert_allclose((ours @ audio.T).max(axis=0), 1, atol=1e-5)  # and every one of them has a prototype


def test_no_prototypes_are_no_prototypes():
    assert [made.shape for made in index.prototypes(random_rows(5), random_rows(5), 0, 0)] == [(0, 8), (0, 8)]
    nothing = np.zeros((0, 8), np.float32)
    assert [made.shape for made in index.prototypes(nothing, nothing, 4, 0)] == [(0, 8), (0, 8)]


def test_the_seed_decides_the_prototypes():
    audio, text = random_rows(300, seed=1), random_rows(300, seed=2)
    first, again, other = (index.prototypes(audio, text, 20, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or not np.allclose(first, other)
