"""Sweeps that are killed, interrupted, or lose a worker: what was finished stays, what was not goes on, nothing runs on."""

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from sabotage import WORKER, until
from sweeps import start, write_space

from ask_ray import tracking
from ask_ray.config import load

pytestmark = pytest.mark.survival

#: Runs with a knowledge base, so that a refiner and a pool belong to each trial.
ASK = {"ask": {"enabled": True, "prototypes": 8}}
SPACE = {"ask.rho": {"grid": [0.4, 0.6, 0.8]}, "ask.beta": {"grid": [0.0, 0.3]}}
GRID = {"algorithm": "grid", "concurrent": 2}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The trials in ``sweep.json``, none before there is one."""
    file = folder / "sweep.json"
    return json.loads(file.read_text())["trials"] if file.exists() else []


def ended(folder: Path, status: str) -> list[dict[str, Any]]:
    return [row for row in rows_of(folder) if row["status"] == status]


def members(job: subprocess.Popen, title: str = "") -> list[psutil.Process]:
    """The processes of a sweep's session that run, the job's own too."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = os.getsid(process.pid) == job.pid and process.status() != psutil.STATUS_ZOMBIE
            if ours and " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def finish(job: subprocess.Popen) -> str:
    told, _ = job.communicate(timeout=540)
    assert job.returncode == 0, told
    return told


def test_a_sweep_killed_half_way_and_continued_ends_with_the_same_trials(tmp_path):
    of = {"algorithm": "optuna", "trials": 6, "early_stopping": True, "grace_epochs": 1, "reduction": 2, "concurrent": 2}
    ranges = {"ask.rho": {"uniform": [0.2, 0.9]}, "ask.beta": {"choice": [0.0, 0.3]}}
    file, folder = write_space(tmp_path, ranges, of, ASK), tmp_path / "runs/sweep"
    job = start(file, "sweep")
    until(lambda: len(ended(folder, "finished")) >= 2 and ended(folder, "running"), 300, "two finished trials")
    job.kill()
    job.wait()
    valued = {row["trial"]: row["point"] for row in rows_of(folder) if row["value"] is not None}
    before = {row["trial"]: row for row in ended(folder, "finished")}
    results = {trial: (folder / f"trials/{trial}-seed-0/result.json").stat().st_mtime_ns for trial in before}
    until(lambda: not members(job), 180, "the end of the killed sweep's processes")

    assert "Continuing sweep" in finish(start(file, "sweep"))
    rows = rows_of(folder)
    assert len(rows) == 6
    assert {row["status"] for row in rows} <= {"finished", "stopped early"}
    after = {row["trial"]: row for row in rows}
    for trial, row in before.items():
        assert after[trial]["values"] == row["values"]
        assert (folder / f"trials/{trial}-seed-0/result.json").stat().st_mtime_ns == results[trial]
    assert len(list((folder / "trials").iterdir())) == 6
    assert {trial: after[trial]["point"] for trial in valued} == valued
    best = json.loads((folder / "sweep.json").read_text())["best"]["trial"]
    manifests = [*folder.glob("trials/*/knowledge/v*/manifest.json")]
    assert {path.parents[2].name for path in manifests} == {f"{best}-seed-0"}
    assert {json.loads(path.read_text())["run"] for path in manifests} == {f"{best}-seed-0"}


def test_an_interrupted_sweep_leaves_a_record_and_no_processes_and_goes_on(tmp_path):
    file, folder = write_space(tmp_path, SPACE, GRID, ASK), tmp_path / "runs/sweep"
    job = start(file, "sweep")
    until(lambda: ended(folder, "finished") and len(ended(folder, "running")) == 2, 300, "a finished and two running trials")
    job.send_signal(signal.SIGINT)
    told, _ = job.communicate(timeout=120)
    assert job.returncode == 130, told
    assert "the same command with --sweep.name sweep goes on" in told.replace("\n", " ")
    until(lambda: not members(job), 60, "the end of the interrupted sweep's processes")
    assert ended(folder, "finished")
    assert not ended(folder, "running")
    assert _record(folder) == {"FINISHED", "KILLED"}
    assert json.loads((folder / "sweep.json").read_text())["best"]["status"] == "finished"

    finish(start(file, "sweep"))
    points = [(row["point"]["ask.rho"], row["point"]["ask.beta"]) for row in ended(folder, "finished")]
    assert sorted(points) == [*itertools.product(SPACE["ask.rho"]["grid"], SPACE["ask.beta"]["grid"])]
    assert _record(folder) == {"FINISHED"}


def _record(folder: Path) -> set[str]:
    """How MLflow says that the sweep's trials stand."""
    import mlflow

    client = mlflow.MlflowClient(tracking.uri_of(load({"run": {"storage": str(folder.parent)}})))
    parent = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return {run.info.status for run in found}


def test_a_trial_whose_worker_is_killed_fails_alone_and_says_why(tmp_path):
    longer = {"training": {"epochs": 12, "evaluate_every": 1, "batch_size": 16, "max_failures": 0}}
    file, folder = write_space(tmp_path, {"ask.rho": {"grid": [0.4, 0.6, 0.8]}}, GRID, ASK | longer), tmp_path / "runs/sweep"
    job = start(file, "sweep")
    until(lambda: [*folder.glob("trials/*/history.json")], 200, "an epoch")  # before it, Ray Train starts a worker again
    until(lambda: members(job, WORKER), 20, "a training worker")[-1].kill()
    finish(job)
    failed = ended(folder, "failed")
    assert len(failed) == 1
    assert len(ended(folder, "finished")) == 2
    assert "training failed" in failed[0]["reason"]

    finish(start(file, "sweep"))
    assert len(ended(folder, "finished")) == 3, "what failed is tried again when the sweep is continued"


def test_a_population_takes_over_weights_and_finishes(tmp_path):
    population = {"algorithm": "pbt", "trials": 3, "perturb_epochs": 1}
    space = {"ask.rho": {"uniform": [0.2, 0.9]}, "ask.beta": {"uniform": [0.0, 0.5]}}
    longer = {"training": {"epochs": 8, "evaluate_every": 1, "batch_size": 16, "learning_rate": 3e-3, "max_failures": 0}}
    file, folder = write_space(tmp_path, space, population, ASK | longer), tmp_path / "runs/sweep"
    finish(start(file, "sweep"))
    rows = rows_of(folder)
    assert {row["status"] for row in rows} == {"finished"}
    parts = [path for path in (folder / "trials").iterdir() if "-part-" in path.name]
    assert parts
    assert "# These are the settings of the last part alone." in (folder / "best.yaml").read_text()
    for part in parts:
        settings = load((part / "settings.yaml").read_text())
        donor = Path(str(settings.run.fork)).name
        assert donor.split("-seed-")[0] in {row["trial"] for row in rows}
        history = json.loads((part / "history.json").read_text())
        begun = next(event for event in history if event["kind"] == "began")
        assert 0 < begun["epoch"] < 8  # with the weights of a run that had trained so long
        reason = next(event["reason"] for event in history if event["kind"] == "published")
        # At the end of the first epoch, which is warm-up, the run that is taken over has no knowledge base itself.
        assert reason.startswith("begun from") or (begun["epoch"], reason) == (1, "warm-up is over")
