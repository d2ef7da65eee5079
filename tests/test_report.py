"""The pictures and tables of a run, from a journal as a run writes it."""

import io
import struct
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ask_ray import report
from ask_ray.storage import Folder

FIGURES = {"r1": 0.25, "r5": 0.5, "r10": 0.75, "map10": 0.333, "median_rank": 4.0, "n": 1000}
RESULT = {"final": {"t2a": FIGURES, "a2t": {**FIGURES, "r1": 0.375, "median_rank": 3.5}}}
REQUIRED = {"version", "encoder_step", "swap_step", "lag_steps", "encode_seconds", "build_seconds", "swap_ms", "entries"}


def published(version: int, step: int, at: float) -> dict[str, Any]:
    return {
        "kind": "published", "time": at, "version": version, "encoder_step": step, "entries": 800, "prototypes": 16,
        "started": at - 3.0, "encode_seconds": 2.5, "build_seconds": 0.5, "reason": "20 steps since the last",
    }  # fmt: skip


def swapped(version: int, rank: int, step: int, lag: int, at: float, ms: float = 2.0) -> dict[str, Any]:
    return {
        "kind": "swapped", "time": at, "version": version, "rank": rank, "step": step, "lag_steps": lag, "swap_ms": ms,
    }  # fmt: skip


def journal() -> list[dict[str, Any]]:
    """Two workers, four epochs, three versions of which the last was never swapped in."""
    events: list[dict[str, Any]] = [{"kind": "began", "time": 99.0, "step": 0, "epoch": 0, "world_size": 2}]
    for step in range(0, 80, 10):
        event = {"kind": "step", "time": 100.0 + step, "step": step, "version": 0, "loss": 3.0 / (1 + step)}
        if step >= 30:
            event |= {"rdm_audio": 0.01 * step, "rdm_text": float("nan") if step == 40 else 0.02 * step}
        events.append(event)
        if step % 20 == 10:
            epoch = (step + 10) // 20
            events.append(
                {"kind": "epoch", "time": 105.0 + step, "epoch": epoch, "step": step + 10, "loss": 2.0, "loss_a2t": 1.9,
                 "loss_t2a": 2.1, "t2a_r1": 0.1 * epoch, "a2t_r1": 0.12 * epoch, "probe_rdm_audio": 0.1}
            )  # fmt: skip
    events += [published(1, 20, 125.0), swapped(1, 0, 24, 4, 126.0), swapped(1, 1, 24, 4, 126.1, ms=7.5)]
    events += [published(2, 40, 147.0), swapped(2, 0, 48, 8, 150.0), swapped(2, 1, 48, 8, 150.0), published(3, 60, 170.0)]
    return events


def test_a_row_for_every_version_that_was_swapped_in():
    rows = report.refreshes(journal())
    assert [row["version"] for row in rows] == [1, 2]
    assert all(row.keys() >= REQUIRED for row in rows)
    assert {name: rows[0][name] for name in sorted(REQUIRED)} == {
        "version": 1, "encoder_step": 20, "swap_step": 24, "lag_steps": 4, "encode_seconds": 2.5, "build_seconds": 0.5,
        "swap_ms": 7.5, "entries": 800,
    }  # fmt: skip
    assert all(row["swap_step"] - row["encoder_step"] == row["lag_steps"] for row in rows)
    assert [row["ranks"] for row in rows] == [2, 2]


def test_a_version_that_a_restart_swapped_in_again_counts_once_with_its_last_swap():
    again = [swapped(2, rank, 52, 12, 190.0 + rank, ms=1.0) for rank in (0, 1)]
    rows = report.refreshes([*journal(), *again])
    assert [row["version"] for row in rows] == [1, 2]
    assert (rows[1]["swap_step"], rows[1]["lag_steps"], rows[1]["swap_ms"], rows[1]["ranks"]) == (52, 12, 1.0, 2)


def test_a_version_that_fewer_workers_swapped_in_again_has_what_these_did():
    before = [swapped(3, rank, 100, 40, 190.0, ms=50.0) for rank in range(4)]
    after = [swapped(3, rank, 84, 24, 230.0, ms=1.0) for rank in (1, 0)]
    (row,) = (row for row in report.refreshes([*journal(), *before, *after]) if row["version"] == 3)
    assert (row["swap_step"], row["lag_steps"], row["swap_ms"], row["ranks"]) == (84, 24, 1.0, 2)


@pytest.mark.parametrize(("first", "then"), [(4, 2), (2, 4), (3, 3)])
def test_only_the_workers_of_the_last_attempt_count_though_both_swapped_at_the_same_step(first, then):
    events = journal()
    for attempt, workers in enumerate((first, then)):
        at = 200.0 + 40 * attempt
        events.append({"kind": "began", "time": at, "step": 80, "epoch": 4, "world_size": workers})
        events += [swapped(3, rank, 84, 24, at + 5, ms=50.0 - 40 * attempt + rank) for rank in range(workers)]
    (row,) = (row for row in report.refreshes(events) if row["version"] == 3)
    assert (row["swap_step"], row["ranks"], row["swap_ms"]) == (84, then, 10.0 + then - 1)


def test_a_version_whose_first_worker_s_swap_was_lost_still_has_a_row():
    (row,) = (row for row in report.refreshes([*journal(), swapped(3, 1, 64, 4, 190.0)]) if row["version"] == 3)
    assert (row["swap_step"], row["ranks"]) == (64, 1)


def test_validation_points_come_from_epochs_and_from_evaluations_beside_training_and_the_last_of_a_step_counts():
    later = {"kind": "validated", "time": 300.0, "epoch": 3, "step": 60, "t2a_r1": 0.5, "a2t_r1": 0.6}
    without = [event for event in journal() if event["kind"] != "epoch" or event["epoch"] != 3]
    points = report.validations([*without, later | {"t2a_r1": 0.4}, later])
    assert [(event["step"], event["t2a_r1"]) for event in points] == [(20, 0.1), (40, 0.2), (60, 0.5), (80, 0.4)]


@pytest.mark.parametrize(("step", "left"), [(0, []), (40, [20, 40]), (50, [20, 40]), (80, [20, 40, 60, 80])])
def test_figures_of_weights_that_are_gone_are_left_out_when_training_begins_again(step, left):
    again = [*journal(), {"kind": "began", "time": 400.0, "step": step, "epoch": step // 20, "world_size": 2}]
    assert [event["step"] for event in report.validations(again)] == left
    later = {"kind": "epoch", "time": 410.0, "epoch": 4, "step": 80, "t2a_r1": 0.7}
    assert report.validations([*again, later])[-1] == later


def test_no_refreshes_no_rows():
    assert report.refreshes([]) == []
    assert report.refreshes([event for event in journal() if event["kind"] != "swapped"]) == []


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height, from the header of a PNG file."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", png[16:24])


def test_pictures_are_real_ones_and_where_it_says(tmp_path):
    folder = Folder.at(str(tmp_path / "run"))
    places = report.draw(folder, journal(), RESULT)
    assert [Path(place).name for place in places] == ["curves.png", "drift.png", "refreshes.png"]
    for place in places:
        width, height = size_of(Path(place).read_bytes())
        assert width > 600
        assert height > 250
        pixels = plt.imread(io.BytesIO(Path(place).read_bytes()))
        assert np.unique(pixels[..., :3].reshape(-1, 3), axis=0).shape[0] > 20  # something is drawn
    assert plt.get_fignums() == []  # and nothing stays open


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ({"step", "epoch"}, ["curves.png", "drift.png"]),
        ({"epoch"}, ["curves.png"]),
        ({"epoch", "published"}, ["curves.png", "refreshes.png"]),
        ({"published", "swapped"}, []),
        (set(), []),
    ],
)
def test_a_picture_without_data_is_not_drawn(tmp_path, kinds, names):
    events = [event for event in journal() if event["kind"] in kinds]
    places = report.draw(Folder.at(str(tmp_path)), events, {"final": {}})
    assert [Path(place).name for place in places] == names
    assert sorted(path.name for path in tmp_path.glob("pictures/*")) == names


def test_curves_show_each_step_once_though_a_restart_repeated_some(tmp_path):
    repeated = [{"kind": "step", "time": 300.0, "step": 70, "version": 2, "loss": 9.0}]
    figure = report.curves([*journal(), *repeated], RESULT)
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "objective, single steps"]
    assert list(line.get_xdata()) == list(range(0, 80, 10))
    assert line.get_ydata()[-1] == 9.0
    labels = [line.get_label() for line in figure.axes[1].lines]
    assert "text → audio, test (N = 1000)" in labels
    plt.close(figure)


def test_drift_leaves_out_what_was_not_known_and_marks_the_swaps():
    figure = report.drift(journal())
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines["text, the batch's own entries"] == [30, 50, 60, 70]
    assert [xs for xs in lines.values() if xs in ([24, 24], [48, 48])]
    plt.close(figure)


def test_pictures_of_a_run_on_images_speak_of_images():
    curves, drift = report.curves(journal(), {**RESULT, "modality": "image"}), report.drift(journal(), "image")
    labels = [line.get_label() for figure in (curves, drift) for axes in figure.axes for line in axes.lines]
    assert "text → image" in labels
    assert "image, the batch's own entries" in labels
    assert not [label for label in labels if "audio" in label]
    for figure in (curves, drift):
        plt.close(figure)
