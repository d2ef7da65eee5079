"""A sweep's record while it runs: no event ends it, and every run of a trial ends in MLflow as what became of it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ask_ray.config import Settings, SweepSettings, load
from ask_ray.storage import Folder
from ask_ray.tracking import Recorder
from ask_ray.tuning import outcome
from ask_ray.tuning.board import Board
from ask_ray.tuning.trial import run_name

#: As gloo says that a worker's neighbour is gone: markup to Rich, that closes what never began.
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error: Connection reset by peer"

#: Where a run keeps the first version of its knowledge base.
VERSION = "knowledge/v000001"


def settings_of(home: Path, **tracking: Any) -> Settings:
    return load({"run": {"storage": str(home)}, "tracking": {"experiment": "boards", **tracking}})


def board_of(home: Path, **of: Any) -> tuple[Board, io.StringIO]:
    """The board of a sweep that has no record in MLflow, and what it prints."""
    folder, told = Folder.at(str(home / "sweep")), io.StringIO()
    recorder = Recorder(settings_of(home, enabled=False), folder)
    return Board(folder, SweepSettings(**of), recorder, Console(file=told, width=200)), told


def event(kind: str, trial: str = "a", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "trial": trial, "point": {"ask.rho": 0.5}, **more}


@pytest.mark.parametrize("reason", [GLOO, "[rank0] lost"])
def test_a_reason_is_told_as_it_is_whatever_brackets_it_holds(tmp_path, reason):
    board, told = board_of(tmp_path)
    board.heed([event("started"), event("reason", reason=reason), event("failed"), event("started", "b")], over=False)
    assert [(row["status"], row["reason"]) for row in board.rows.values()] == [("failed", reason), ("running", "")]
    assert f"a failed ({reason})" in told.getvalue()


def test_an_event_that_cannot_be_taken_in_costs_no_other(tmp_path):
    board, told = board_of(tmp_path)
    board.heed([event("result", age=1, value="no number"), event("started", "b")], over=False)
    assert board.rows["b"]["status"] == "running"
    assert "sweep.json is not up to date: ValueError" in told.getvalue()


def test_a_trial_that_is_tried_again_does_not_fail_for_the_reason_of_before(tmp_path):
    board, _ = board_of(tmp_path)
    board.heed([event("started"), event("reason", reason="diverged"), event("failed")], over=False)
    again, _ = board_of(tmp_path)
    again.heed([event("started"), event("failed")], over=False)
    assert again.rows["a"]["reason"].startswith("its process ended without a word")


@pytest.mark.parametrize(
    ("statuses", "kept"),
    [
        (["finished", "interrupted", "failed"], "abc"),
        (["finished", "finished", "failed"], "abc"),  # it is tried again when the sweep is continued
        (["finished", "finished"], "ab"),  # the third has not begun
        (["finished", "finished", "finished"], "c"),
    ],
)
def test_a_population_keeps_its_weights_and_knowledge_until_all_of_it_is_finished(tmp_path, statuses, kept):
    board, _ = board_of(tmp_path, algorithm="pbt", trials=3)
    for value, (trial, status) in enumerate(zip("abc", statuses, strict=False)):
        board.rows[trial] = {"trial": trial, "status": status, "value": float(value)}
        (board.trials / run_name(trial, 0) / "checkpoint_a").write("state.json", b"{}")
        (board.trials / run_name(trial, 0) / VERSION).write("manifest.json", b"{}")
    board.prune()
    for left in ("checkpoint_a", f"{VERSION}/manifest.json"):
        assert [name[0] for name in board.trials.names() if (board.trials / name).exists(left)] == [*kept]


@pytest.mark.parametrize(
    ("of", "runs", "kind", "expected"),
    [
        ({"seeds": [0, 1]}, {run_name("a", 0): True, run_name("a", 1): False}, "failed", ["FINISHED", "FAILED"]),
        ({"algorithm": "pbt"}, {run_name("a", 0): False, run_name("a", 0, 1): True}, "ended", ["FINISHED", "FINISHED"]),
        ({"algorithm": "pbt"}, {run_name("a", 0): False, run_name("a", 0, 1): False}, "failed", ["FINISHED", "FAILED"]),
    ],
    ids=["second-seed-fails", "part-left", "later-part-fails"],
)
def test_every_run_of_a_trial_is_ended_in_mlflow_as_what_became_of_it(tmp_path, of, runs, kind, expected):
    mlflow = pytest.importorskip("mlflow")
    settings, folder = settings_of(tmp_path), Folder.at(str(tmp_path / "sweep"))
    for name, whole in runs.items():
        Recorder(settings, folder / "trials" / name).__enter__()  # its process dies before it can say how it ended
        if whole:
            result = {"final": {}, "refreshes": [], "training_seconds": 1.0}
            (folder / "trials" / name).write_json("result.json", result)
    with Recorder(settings, folder) as recorder:
        board = Board(folder, SweepSettings(**of), recorder, Console(quiet=True))
        board.heed([event(kind, whole=True)], over=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    ended = [client.get_run((folder / "trials" / name).read_json("mlflow.json")["run_id"]) for name in runs]
    assert [run.info.status for run in ended] == expected
    assert {run.data.tags["sweep.status"] for run in ended} == {outcome.FAILED if kind == "failed" else outcome.FINISHED}


def test_every_run_of_a_trial_has_the_mean_over_its_seeds_in_mlflow(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    settings, folder = settings_of(tmp_path), Folder.at(str(tmp_path / "sweep"))
    runs = [folder / "trials" / run_name("a", seed) for seed in (0, 1)]
    for run, value in zip(runs, (0.2, 0.4), strict=True):
        with Recorder(settings, run):
            run.write_json("history.json", [{"kind": "epoch", "epoch": 1, "step": 1, "t2a_r1": value, "mean_r1": value}])
    with Recorder(settings, folder) as recorder:
        board = Board(folder, SweepSettings(seeds=[0, 1]), recorder, Console(quiet=True))
        board.heed([event("ended", whole=False)], over=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    told = [client.get_run(run.read_json("mlflow.json")["run_id"]).data.metrics for run in runs]
    assert [metrics["sweep.mean_r1"] for metrics in told] == pytest.approx([0.3, 0.3])
