"""The index against brute force, with exclusions; what is lost by inverted lists; files; changes in place; prototypes."""

from pathlib import Path
from typing import Any

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
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    for score, similarity, entry, barred in zip(scores, *found, excluded, strict=True):
        truth = np.sort(score[~np.isin(numbers, barred)])[::-1][:k]
        there = len(truth)
        assert len(set(entry[:there])) == there
        assert (entry[there:] == -1).all()
        assert (similarity[there:] == -np.inf).all()
        assert not set(numbers[entry[:there]].tolist()) & set(barred.tolist())
        assert (np.diff(similarity[:there]) <= 0).all()
        np.testing.assert_allclose(similarity[:there], truth, atol=1e-6)
        np.testing.assert_allclose(score[entry[:there]], similarity[:there], atol=1e-6)


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
    opened = index.on_gpu(index.open_mapped(tmp_path / "rows.index"), 99)
    assert (opened.search(rows, 1)[1][:, 0] == np.arange(20)).all()


# --- changing an index in place ---


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, large) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("indexes")
    index.save(exact(large[0]), folder / "exact")
    index.save(large[1], folder / "lists")
    return {"exact": folder / "exact", "lists": folder / "lists"}


def opened(on_disk: dict[str, Path], kind: str) -> Any:
    """Mutable, with all lists probed, so that only the rounding of the codes is between inverted lists and exactness."""
    made = index.open_mutable(on_disk[kind])
    if kind == "lists":
        made.nprobe = made.nlist
    return made


def held(mutable: Any) -> np.ndarray:
    return mutable.reconstruct_batch(np.arange(mutable.ntotal))


def check_holds(mutable: Any, rows: np.ndarray) -> None:
    """The index holds exactly `rows`, to 16 bits in lists, and every search is brute force over what it holds."""
    stored = held(mutable)
    tolerance = 0 if isinstance(mutable, faiss.IndexFlat) else 2.0**-11
    np.testing.assert_allclose(stored, rows, rtol=0, atol=tolerance)
    queries, everything = random_rows(40, rows.shape[1], seed=9), np.zeros((40, 0), np.int64)
    found = index.retrieve(mutable, queries, 10, np.arange(len(rows)), everything, 1)
    check_against_brute_force(found, stored, queries, 10, np.arange(len(rows)), everything)
    if isinstance(mutable, faiss.IndexIVF):
        places = [faiss.rev_swig_ptr(mutable.invlists.get_ids(at), mutable.get_list_size(at)) for at in range(mutable.nlist)]
        np.testing.assert_array_equal(np.sort(np.concatenate(places)), np.arange(len(rows)))  # each entry once, in one list


def turned(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A map near a rotation, and the rows it leads to."""
    noise = np.random.default_rng(seed).normal(size=(2, rows.shape[1], rows.shape[1]))
    matrix = (np.linalg.qr(np.eye(rows.shape[1]) + 0.2 * noise[0])[0] + 0.02 * noise[1]).astype(np.float32)
    return matrix, unit(rows @ matrix)


@pytest.mark.parametrize("kind", ["exact", "lists"])
@pytest.mark.parametrize("count", [0, 1, 19, 64, 3000])
def test_rows_are_overwritten_and_the_last_of_an_entry_stays(on_disk, large, kind, count):
    mutable, rows, rng = opened(on_disk, kind), large[0].copy(), np.random.default_rng(count)
    for _ in range(2):
        entries = rng.integers(len(rows), size=count)
        entries[count // 2 :] = rng.choice(entries, count - count // 2) if count else entries  # many come several times
        fresh = unit(rng.normal(size=(count, rows.shape[1])))
        index.update(mutable, entries, fresh)
        for entry, row in zip(entries, fresh, strict=True):
            rows[entry] = row
    check_holds(mutable, rows)


@pytest.mark.parametrize("kind", ["exact", "lists"])
def test_a_map_and_updates_in_any_order(on_disk, large, kind):
    mutable, rows = opened(on_disk, kind), large[0].copy()
    for turn in range(3):
        entries, fresh = np.arange(turn, len(rows), 7), random_rows(len(rows), rows.shape[1], seed=turn)[turn::7]
        index.update(mutable, entries, fresh)
        rows[entries] = fresh
        matrix, rows = turned(rows, turn)
        index.remap(mutable, matrix, rows)
        check_holds(mutable, rows)


def test_overwritten_and_mapped_lists_find_what_lists_built_anew_find(on_disk, large):
    """At the usual number of probes: an overwritten row must be in the list where it is now looked for."""
    mutable, (matrix, moved) = index.open_mutable(on_disk["lists"]), turned(large[0], seed=1)
    assert mutable.nprobe == 16
    index.remap(mutable, matrix, moved)
    replaced = np.arange(0, len(moved), 3)
    rows = moved.copy()
    rows[replaced] = moved[::-1][replaced]
    index.update(mutable, replaced, rows[replaced])
    queries = unit(rows[replaced[:300]] + 0.05 * np.random.default_rng(2).normal(size=(300, 32)))
    truth = exact(rows).search(queries, 10)[0][:, -1:]

    def recall(searched: Any) -> float:
        entry = searched.search(queries, 10)[1]
        return float(np.mean(np.einsum("qkd,qd->qk", rows[entry], queries) >= truth - 1e-6))

    assert recall(mutable) > recall(index.build(rows, 3000, 16, 0)) - 0.03 > 0.85


@pytest.mark.parametrize("kind", ["exact", "lists"])
def test_the_same_changes_give_the_same_bytes_also_through_a_file(tmp_path: Path, on_disk, large, kind):
    first, second = opened(on_disk, kind), opened(on_disk, kind)
    fresh, (matrix, moved) = random_rows(50, 32, seed=3), turned(large[0], seed=4)
    for mutable in (first, second):
        index.update(mutable, np.arange(100, 150), fresh)
    index.save(second, tmp_path / "index")
    second = index.open_mutable(tmp_path / "index")
    for mutable in (first, second):
        index.remap(mutable, matrix, moved)
        index.update(mutable, np.arange(120, 170), fresh)
    np.testing.assert_array_equal(faiss.serialize_index(first), faiss.serialize_index(second))


@pytest.mark.parametrize("kind", ["exact", "lists"])
def test_what_cannot_be_held_is_refused_before_anything_changes(on_disk, large, kind):
    mutable, rows, bad = opened(on_disk, kind), large[0], random_rows(2, 32)
    bad[1, 3] = np.nan
    before = faiss.serialize_index(mutable)
    for entries, fresh, problem in (
        ([0, -1], rows[:2], "entries"),
        ([0, len(rows)], rows[:2], "entries"),
        ([0, 1], bad, "finite"),
    ):
        with pytest.raises(ValueError, match=problem):
            index.update(mutable, np.array(entries), fresh)
    for matrix, moved, problem in (
        (np.eye(32), rows[1:], "fit"),
        (np.eye(31), rows, "fit"),
        (np.full((32, 32), np.inf), rows, "finite"),
        (np.eye(32), rows * np.nan, "finite"),
    ):
        with pytest.raises(ValueError, match=problem):
            index.remap(mutable, matrix.astype(np.float32), moved)
    np.testing.assert_array_equal(faiss.serialize_index(mutable), before)


def test_the_file_of_a_mutable_index_stays_as_it_is(on_disk, large):
    for kind, path in on_disk.items():
        before, mutable = path.read_bytes(), opened(on_disk, kind)
        index.update(mutable, np.arange(50), random_rows(50, 32, seed=3))
        index.remap(mutable, *turned(large[0], seed=4))
        assert path.read_bytes() == before


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
