"""Windows of corrections on a real overlay, driven by steps of encoders that drift by a known rotation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from ask_ray.config import CorrectionSettings
from ask_ray.knowledge import index as indexes
from ask_ray.knowledge.overlay import Overlay
from ask_ray.knowledge.snapshot import Embeddings
from ask_ray.training.corrections import Corrections
from ask_ray.training.step import Pairs

ENTRIES, DIM, BATCH = 120, 8, 10


def unit(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    rows = Embeddings(unit(ENTRIES, 1), unit(ENTRIES, 2))
    for name in ("audio", "text"):
        indexes.save(indexes.build(getattr(rows, name), 10**6, 1, 0), tmp_path / name)
    mutable = indexes.open_mutable(tmp_path / "audio"), indexes.open_mutable(tmp_path / "text")
    return Overlay(rows, Embeddings(unit(4, 3), unit(4, 4)), mutable, encoder_step=0)


def encoders(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ENTRIES, DIM) rows of both modalities by the weights of a step: all turn in one plane, by the same angle each step."""
    angle = torch.tensor(0.05 * step)
    turn = torch.eye(DIM)
    turn[0, 0] = turn[1, 1] = angle.cos()
    turn[0, 1], turn[1, 0] = angle.sin(), -angle.sin()
    return torch.from_numpy(unit(ENTRIES, 1)) @ turn, torch.from_numpy(unit(ENTRIES, 2)) @ turn.T


def run(corrections: Corrections, overlay: Overlay, first: int, last: int) -> None:
    for step in range(first, last):
        entry = torch.from_numpy(np.random.default_rng(step).choice(ENTRIES, BATCH, replace=False))
        audio, text = (rows[entry] for rows in encoders(step))
        corrections.after_step(overlay, Pairs(entry, audio, text), step + 1)


def error(overlay: Overlay, step: int) -> float:
    return float((overlay.audio - encoders(step)[0]).norm(dim=1).mean())


def made(write_back: bool, drift_map: bool) -> Corrections:
    corrections = Corrections(CorrectionSettings(write_back=write_back, drift_map=drift_map, map_interval=0.5, ridge=0.01), 20)
    corrections.begin(1)
    return corrections


def test_each_correction_brings_entries_nearer_to_the_encoders(overlay):
    static = error(overlay, 41)
    errors = {}
    for write_back, drift_map in ((True, False), (False, True), (True, True)):
        again = Overlay.of(overlay.state())
        run(made(write_back, drift_map), again, 1, 41)
        errors[write_back, drift_map] = error(again, 41)
        assert 0 < again.share() <= 1
        assert again.age(41) < again.age_without(41) == 41
    assert max(errors.values()) < 0.7 * static
    assert errors[True, True] < errors[True, False]
    assert errors[True, True] < 1.1 * errors[False, True], "a rotation is all of this drift: maps leave little to overwrite"


def test_a_map_stands_for_the_middle_of_its_window(overlay):
    run(made(False, True), overlay, 1, 11)
    assert set(overlay.since.tolist()) == {6}
    turned = functional.normalize(encoders(6)[0], dim=1)
    np.testing.assert_allclose(overlay.audio, turned, atol=0.1)
    assert error(overlay, 6) < 0.1 * float((encoders(0)[0] - encoders(6)[0]).norm(dim=1).mean()) + 0.02


def test_entries_encoded_at_the_very_start_of_a_window_are_mapped(overlay):
    """As after a refresh that training waited for."""
    corrections = made(False, True)
    corrections.begin(0)
    run(corrections, overlay, 0, 10)
    assert overlay.share() == 1


def test_what_a_window_overwrites_is_not_mapped(overlay):
    run(made(True, True), overlay, 1, 11)
    written = overlay.written >= 0
    assert written.any()
    for entry in np.flatnonzero(written):
        np.testing.assert_allclose(overlay.audio[entry], encoders(int(overlay.written[entry]) - 1)[0][entry], atol=1e-6)
    assert (overlay.since[~written] == 6).all()


def test_an_open_window_survives_a_checkpoint(overlay):
    unbroken, broken = Overlay.of(overlay.state()), Overlay.of(overlay.state())
    run(made(True, True), unbroken, 1, 30)
    first, second = made(True, True), made(True, True)
    run(first, broken, 1, 17)
    second.restore({name: value.clone() for name, value in first.state().items()})
    resumed = Overlay.of(broken.state())
    run(second, resumed, 17, 30)
    for name, value in unbroken.state().items():
        np.testing.assert_array_equal(value, resumed.state()[name], err_msg=name)


@pytest.mark.parametrize("missing", ["since", "fresh_text"])
def test_a_window_of_which_a_checkpoint_holds_less_is_given_up_for_a_new_one(overlay, missing):
    first, second, fresh = (made(True, True) for _ in range(3))
    run(first, overlay, 1, 5)
    for corrections in (second, fresh):
        corrections.begin(5)
    second.restore({name: value for name, value in first.state().items() if name != missing})
    resumed, begun = Overlay.of(overlay.state()), Overlay.of(overlay.state())
    run(second, resumed, 5, 20)
    run(fresh, begun, 5, 20)
    for name, value in begun.state().items():
        np.testing.assert_array_equal(value, resumed.state()[name], err_msg=name)


def test_a_window_without_pairs_maps_nothing(overlay):
    corrections, before = made(False, True), overlay.state()
    nothing = Pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, DIM), torch.zeros(0, DIM))
    corrections.after_step(overlay, nothing, 50)
    np.testing.assert_array_equal(overlay.state()["audio"], before["audio"])


def test_a_map_leaves_entries_that_are_much_fresher_than_those_it_starts_from(overlay):
    """After a swap: what the version took over needs a small part of the drift that its own entries need."""
    older, newer = overlay, Overlay.of(overlay.state())
    run(made(True, False), older, 38, 40)
    newer.carry_over(older)
    newer.catch_up()
    taken = newer.written >= 0
    corrections = made(False, True)
    corrections.begin(40)
    run(corrections, newer, 40, 50)
    assert (newer.since[~taken] == 45).all()
    np.testing.assert_array_equal(newer.audio[taken], older.audio[taken])
    assert (newer.since[taken] <= 40).all()


def test_a_map_finds_nothing_left_to_be_taken_over(overlay):
    newer = Overlay.of(overlay.state())
    overlay.write(torch.arange(ENTRIES), *encoders(40), 40)
    newer.carry_over(overlay)
    corrections = Corrections(CorrectionSettings(write_back=True, drift_map=True, map_interval=0.2), 20)
    corrections.begin(40)
    left = [newer.waiting]
    for step in range(40, 44):
        run(corrections, newer, step, step + 1)
        left.append(newer.waiting)
    assert left == [ENTRIES, 90, 60, 30, 0]


def test_each_step_takes_as_many_of_an_older_versions_entries_as_it_overwrites(overlay):
    newer, corrections = Overlay.of(overlay.state()), made(True, False)
    run(corrections, overlay, 1, 6)
    fresher = set(np.flatnonzero(overlay.written >= 0))
    assert newer.carry_over(overlay) == len(fresher)
    own: set[int] = set()
    for step in range(6, 6 + -(-len(fresher) // BATCH)):
        run(corrections, newer, step, step + 1)
        own |= set(np.flatnonzero(newer.written == step + 1))
        taken = set(np.flatnonzero(newer.written >= 0)) - own
        assert taken <= fresher
        assert len(taken) <= (step - 5) * BATCH
    assert set(np.flatnonzero(newer.written >= 0)) == own | fresher
