"""Corrected versions against brute force over rows kept by hand, with exact and inverted-list indexes."""

import gc
import weakref
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from ask_ray.knowledge import index as indexes
from ask_ray.knowledge import overlay as overlays
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
    assert newer.share() == 0, "nothing is moved at a swap"
    newer.catch_up()
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


def test_a_state_goes_through_a_file_of_tensors(files, tmp_path):
    overlay = opened(files)
    overlay.write(torch.arange(9), torch.from_numpy(unit(9, 8)), torch.from_numpy(unit(9, 9)), STEP + 1)
    told = overlay.state()
    save_file(told, tmp_path / "memory.safetensors")
    again = Overlay.of(load_file(tmp_path / "memory.safetensors"))
    for name, value in again.state().items():
        np.testing.assert_array_equal(value, told[name], err_msg=name)
    overlay.write(torch.arange(9), torch.from_numpy(unit(9, 1)), torch.from_numpy(unit(9, 2)), STEP + 2)
    assert (told["written"][:9] == STEP + 1).all()  # what was told is a copy
    np.testing.assert_array_equal(told["audio"][:9], unit(9, 8))


def test_a_newer_version_catches_up_the_freshest_first(files):
    older, newer = opened(files), opened(files, step=STEP + 50)
    for first, step in ((0, STEP + 60), (10, STEP + 80), (20, STEP + 70), (30, STEP + 50)):
        older.write(torch.arange(first, first + 10), *(torch.from_numpy(unit(10, step + side)) for side in (0, 1)), step)
    assert newer.carry_over(older) == 30
    newer.catch_up(15)
    np.testing.assert_array_equal(np.flatnonzero(newer.written >= 0), np.arange(10, 25))
    np.testing.assert_array_equal(newer.written[10:25], [STEP + 80] * 10 + [STEP + 70] * 5)
    np.testing.assert_array_equal(newer.audio[10:20], unit(10, STEP + 80))
    check(newer)
    newer.catch_up(100)
    np.testing.assert_array_equal(np.flatnonzero(newer.written >= 0), np.arange(30))
    check(newer)


def test_what_was_overwritten_since_a_swap_is_fresher_than_what_the_older_version_had(files):
    older, newer = opened(files), opened(files, step=STEP + 50)
    older.write(torch.arange(20), torch.from_numpy(unit(20, 8)), torch.from_numpy(unit(20, 9)), STEP + 60)
    newer.carry_over(older)
    newer.write(torch.arange(5), torch.from_numpy(unit(5, 1)), torch.from_numpy(unit(5, 2)), STEP + 61)
    newer.catch_up()
    np.testing.assert_array_equal(newer.audio[:5], unit(5, 1))
    np.testing.assert_array_equal(newer.text[5:20], unit(20, 9)[5:])
    np.testing.assert_array_equal(newer.since[:20], [STEP + 61] * 5 + [STEP + 60] * 15)


def test_a_map_moves_also_what_was_still_to_be_taken(files):
    """Else it would be put beside entries that the map has moved, and never follow it."""
    older, later, at_once = opened(files), opened(files, step=STEP + 50), opened(files, step=STEP + 50)
    older.write(torch.arange(20), torch.from_numpy(unit(20, 8)), torch.from_numpy(unit(20, 9)), STEP + 60)
    for made in (later, at_once):
        made.carry_over(older)
    at_once.catch_up()
    later.catch_up(3)
    for made in (later, at_once):
        made.apply(near_rotation(1), near_rotation(2), STEP + 65, after=STEP + 61)
    np.testing.assert_array_equal(later.audio, at_once.audio)
    np.testing.assert_array_equal(later.since, at_once.since)
    check(later)


def test_a_version_that_never_caught_up_hands_on_what_is_fresher_than_the_next(files):
    first, second, third = (opened(files, step) for step in (STEP, STEP + 50, STEP + 70))
    for begin, step in ((0, STEP + 60), (10, STEP + 80)):
        first.write(torch.arange(begin, begin + 10), *(torch.from_numpy(unit(10, step + side)) for side in (0, 1)), step)
    assert second.carry_over(first) == 20
    second.write(torch.arange(30, 34), torch.from_numpy(unit(4, 1)), torch.from_numpy(unit(4, 2)), STEP + 90)
    assert third.carry_over(second) == 14
    third.catch_up()
    np.testing.assert_array_equal(np.flatnonzero(third.written >= 0), [*range(10, 20), *range(30, 34)])
    np.testing.assert_array_equal(third.text[10:20], unit(10, STEP + 81))


def test_what_is_still_to_be_taken_survives_a_checkpoint(files, tmp_path):
    older, newer = opened(files), opened(files, step=STEP + 50)
    older.write(torch.arange(20), torch.from_numpy(unit(20, 8)), torch.from_numpy(unit(20, 9)), STEP + 60)
    newer.carry_over(older)
    newer.catch_up(7)
    save_file(newer.state(), tmp_path / "memory.safetensors")
    again = Overlay.of(load_file(tmp_path / "memory.safetensors"))
    for made in (newer, again):
        made.catch_up(5)
    for name, value in newer.state().items():
        np.testing.assert_array_equal(value, again.state()[name], err_msg=name)
    assert (again.written >= 0).sum() == 12
    for made in (newer, again):
        made.catch_up()
    np.testing.assert_array_equal(again.audio, newer.audio)
    assert (again.written >= 0).sum() == 20


def test_an_older_version_is_let_go_when_nothing_of_it_is_left_to_take(files):
    older, newer = opened(files), opened(files, step=STEP + 50)
    older.write(torch.arange(4), torch.from_numpy(unit(4, 8)), torch.from_numpy(unit(4, 9)), STEP + 60)
    newer.carry_over(older)
    held = weakref.ref(older.audio)
    del older
    assert held() is not None
    newer.catch_up(4)
    gc.collect()
    assert held() is None


def test_a_row_written_with_the_weights_of_the_encoding_is_no_fresher_than_it(files):
    older, newer = opened(files), opened(files, step=STEP + 50)
    older.write(torch.arange(5), torch.from_numpy(unit(5, 8)), torch.from_numpy(unit(5, 9)), STEP + 50)
    assert newer.carry_over(older) == 0
    assert newer.share() == 0
    assert older.share() == 5 / ENTRIES


def test_versions_of_different_sizes_are_not_of_one_run(files):
    state = opened(files).state()
    shorter = Overlay.of({**state, "since": state["since"][1:], "written": state["written"][1:]})
    with pytest.raises(ValueError, match="versions of one run"):
        opened(files).carry_over(shorter)


def test_maps_go_through_large_bases_in_blocks(files, monkeypatch):
    whole, blocks = opened(files), opened(files)
    whole.apply(near_rotation(1), near_rotation(2), STEP + 1, after=STEP + 1)
    monkeypatch.setattr(overlays, "BLOCK", 37)
    blocks.apply(near_rotation(1), near_rotation(2), STEP + 1, after=STEP + 1)
    np.testing.assert_allclose(blocks.audio, whole.audio, atol=1e-6)
    check(blocks)


@pytest.mark.parametrize("mode", ["c", "r"])
def test_mapped_files_are_corrected_in_memory_only(files, tmp_path, mode):
    np.save(tmp_path / "rows.npy", unit(ENTRIES, 1))
    np.save(tmp_path / "prototypes.npy", unit(PROTOTYPES, 3))
    rows, prototypes = (np.load(tmp_path / f"{name}.npy", mmap_mode=mode) for name in ("rows", "prototypes"))
    mutable = indexes.open_mutable(files[0]), indexes.open_mutable(files[0])
    overlay = Overlay(Embeddings(rows, unit(ENTRIES, 1)), Embeddings(prototypes, unit(PROTOTYPES, 3)), mutable, STEP)
    assert np.shares_memory(overlay.audio.numpy(), rows) == (mode == "c")
    overlay.apply(near_rotation(1), near_rotation(2), STEP + 1, after=STEP + 1)
    assert (overlay.audio.numpy() != unit(ENTRIES, 1)).any()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), unit(ENTRIES, 1))
    np.testing.assert_array_equal(np.load(tmp_path / "prototypes.npy"), unit(PROTOTYPES, 3))


def test_half_precision_rows_with_gradient_are_stored_without(files):
    overlay = opened(files)
    rows = torch.from_numpy(unit(4, 8)).to(torch.bfloat16).requires_grad_()
    overlay.write(torch.tensor([9, 3, 7, 1]), rows, rows, STEP + 1)
    assert overlay.audio.dtype == torch.float32
    assert not overlay.audio.requires_grad
    np.testing.assert_array_equal(overlay.text[[9, 3, 7, 1]], rows.detach().float())
    for index in (overlay.audio_index, overlay.text_index):
        held = index.reconstruct_batch(np.array([9, 3, 7, 1]))
        np.testing.assert_allclose(held, rows.detach().float(), atol=2.0**-11)


def test_shapes_that_do_not_fit_change_nothing(files):
    overlay, before = opened(files), opened(files).state()
    two, three = torch.from_numpy(unit(2, 8)), torch.from_numpy(unit(3, 8))
    for audio, text, wrong in ((two, three, "audio"), (three, two, "text"), (three, three[:, :-1], "text")):
        with pytest.raises(ValueError, match=wrong):
            overlay.write(torch.arange(3), audio, text, STEP + 1)
    with pytest.raises(ValueError, match="text_map"):
        overlay.apply(near_rotation(1), near_rotation(1)[:-1], STEP + 1, STEP + 1)
    for name, value in overlay.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
