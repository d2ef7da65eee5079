"""Corrected versions against brute force over rows kept by hand, with exact and inverted-list indexes."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch.nn import functional

from ask_ray.knowledge import index as indexes
from ask_ray.knowledge.overlay import Overlay
from ask_ray.knowledge.snapshot import Embeddings

ENTRIES, DIM, PROTOTYPES, STEP = 400, 16, 5, 100


def unit(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def near_rotation(seed: int) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(size=(2, DIM, DIM))
    return torch.from_numpy(np.linalg.qr(np.eye(DIM) + 0.2 * noise[0])[0] + 0.02 * noise[1]).float()


@pytest.fixture(scope="module", params=["exact", "inverted lists"])
def files(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both indexes of a version on disk; all lists are probed, so that only 16-bit rounding is between them and exactness."""
    folder = tmp_path_factory.mktemp("indexes")
    for name, seed in (("audio", 1), ("text", 2)):
        built = indexes.build(unit(ENTRIES, seed), 10**6 if request.param == "exact" else 0, 10**6, 0)
        indexes.save(built, folder / name)
    return folder / "audio", folder / "text"


def opened(files: tuple[Path, Path], step: int = STEP) -> Overlay:
    mutable = indexes.open_mutable(files[0]), indexes.open_mutable(files[1])
    prototypes = Embeddings(unit(PROTOTYPES, 3), unit(PROTOTYPES, 4))
    return Overlay(Embeddings(unit(ENTRIES, 1), unit(ENTRIES, 2)), prototypes, mutable, step)


def nearest(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return -np.sort(-(queries @ rows.T), axis=1)[:, :10]


def check(overlay: Overlay) -> None:
    """Both indexes answer as brute force over the overlay's rows does."""
    queries = unit(20, 77)
    for index, rows in ((overlay.audio_index, overlay.audio), (overlay.text_index, overlay.text)):
        assert index.ntotal == ENTRIES
        np.testing.assert_allclose(index.search(queries, 10)[0], nearest(rows.numpy(), queries), atol=2e-3)
        found = index.search(rows.numpy(), 1)[1][:, 0]  # every entry is found under its own number
        assert (np.abs((rows.numpy() * rows.numpy()[found]).sum(1) - 1) < 2e-3).all()


@budget(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(["write", "map"]), st.integers(0, 10**6)), min_size=1, max_size=5))
def test_any_sequence_of_corrections_is_what_rows_kept_by_hand_say(files, operations):
    overlay, again = opened(files), opened(files)
    rows, since = {"audio": unit(ENTRIES, 1), "text": unit(ENTRIES, 2)}, np.full(ENTRIES, STEP)
    for number, (kind, seed) in enumerate(operations):
        step, rng = STEP + 10 * (number + 1), np.random.default_rng(seed)
        if kind == "write":
            entry = rng.integers(ENTRIES, size=rng.integers(0, 60))
            fresh = unit(len(entry), seed), unit(len(entry), seed + 1)
            for made in (overlay, again):
                made.write(torch.from_numpy(entry), torch.from_numpy(fresh[0]), torch.from_numpy(fresh[1]), step)
            for place, one in enumerate(entry):  # in order: the last one stays
                rows["audio"][one], rows["text"][one] = fresh[0][place], fresh[1][place]
            since[entry] = step
        else:
            maps, after = (near_rotation(seed), near_rotation(seed + 1)), int(rng.integers(STEP, step + 1))
            for made in (overlay, again):
                made.apply(*maps, step=step - 5, after=after)
            stale = since < after
            for name, matrix in zip(("audio", "text"), maps, strict=True):
                rows[name][stale] = functional.normalize(torch.from_numpy(rows[name][stale]) @ matrix, dim=1)
            since[stale] = step - 5
    np.testing.assert_allclose(overlay.audio, rows["audio"], atol=1e-6)
    np.testing.assert_allclose(overlay.text, rows["text"], atol=1e-6)
    np.testing.assert_array_equal(overlay.since, since)
    check(overlay)
    for name, value in overlay.state().items():  # another rank is the same, to the bit
        np.testing.assert_array_equal(value, again.state()[name], err_msg=name)


def test_maps_move_prototypes_and_leave_what_is_fresher(files):
    overlay = opened(files)
    entry = torch.arange(30)
    overlay.write(entry, torch.from_numpy(unit(30, 8)), torch.from_numpy(unit(30, 9)), STEP + 20)
    overlay.apply(near_rotation(5), near_rotation(6), step=STEP + 15, after=STEP + 10)
    np.testing.assert_array_equal(overlay.audio[:30], unit(30, 8))
    expected = functional.normalize(torch.from_numpy(unit(PROTOTYPES, 4)) @ near_rotation(6), dim=1)
    np.testing.assert_allclose(overlay.prototypes_text, expected, atol=1e-6)
    assert overlay.share() == 1.0
    assert overlay.age(STEP + 25) == pytest.approx((30 * 5 + (ENTRIES - 30) * 10) / ENTRIES)
    assert overlay.age_without(STEP + 25) == 25


def test_a_newer_version_takes_over_what_was_overwritten_since_its_encoding(files):
    older, newer = opened(files), opened(files, step=STEP + 50)
    for first, step in ((0, STEP + 40), (20, STEP + 60)):
        rows = torch.from_numpy(unit(20, step)), torch.from_numpy(unit(20, step + 1))
        older.write(torch.arange(first, first + 20), *rows, step)
    older.apply(near_rotation(1), near_rotation(2), STEP + 61, after=STEP + 1)
    assert newer.carry_over(older) == 20
    np.testing.assert_array_equal(newer.audio[20:40], unit(20, STEP + 60))
    np.testing.assert_array_equal(newer.audio[:20], unit(ENTRIES, 1)[:20])
    assert newer.share() == 20 / ENTRIES
    assert newer.since[25] == STEP + 60
    check(newer)


def test_an_overlay_from_a_checkpoint_goes_on_to_the_bit(files):
    overlay = opened(files)
    rows = torch.from_numpy(unit(50, 8)), torch.from_numpy(unit(50, 9))
    overlay.write(torch.arange(100, 150), *rows, STEP + 1)
    overlay.apply(near_rotation(1), near_rotation(2), STEP + 2, after=STEP + 1)
    again = Overlay.of(overlay.state())
    for made in (overlay, again):
        made.write(torch.arange(120, 170), *rows, STEP + 3)
        made.apply(near_rotation(3), near_rotation(4), STEP + 4, after=STEP + 3)
    for name, value in overlay.state().items():
        np.testing.assert_array_equal(value, again.state()[name], err_msg=name)
    check(again)


def test_a_map_keeps_the_recall_of_inverted_lists(tmp_path):
    """With few lists probed, mapped lists find what lists built anew would, within a few percent."""
    rows, queries = unit(4000, 1), unit(100, 5)
    indexes.save(indexes.build(rows, 0, 8, 0), tmp_path / "index")
    mapped, matrix = indexes.open_mutable(tmp_path / "index"), near_rotation(3)
    moved = functional.normalize(torch.from_numpy(rows) @ matrix, dim=1).numpy()
    indexes.remap(mapped, matrix.numpy(), moved)
    built = indexes.build(moved, 0, 8, 0)
    truth = np.argsort(-(queries @ moved.T), axis=1)[:, :10]

    def recall(index: faiss.Index) -> float:
        found = index.search(queries, 10)[1]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]))

    assert recall(mapped) > recall(built) - 0.05 > 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_change_nothing(files, bad):
    overlay, before = opened(files), opened(files).state()
    rows = torch.from_numpy(unit(3, 8))
    rows[1, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        overlay.write(torch.arange(3), rows, rows, STEP + 1)
    with pytest.raises(ValueError, match="finite"):
        overlay.apply(torch.full((DIM, DIM), bad), near_rotation(1), STEP + 1, STEP + 1)
    for entry in ([-1], [ENTRIES]):
        with pytest.raises(ValueError, match="entries"):
            overlay.write(torch.tensor(entry), torch.from_numpy(unit(1, 8)), torch.from_numpy(unit(1, 8)), STEP + 1)
    for name, value in overlay.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
