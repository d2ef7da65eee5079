"""A whole sweep as a user starts it: twelve trials on two cores, of which some are stopped and some fail (make survival)."""

import json
import math
from pathlib import Path

import pytest
import yaml
from sweeps import QUICK, start, write_space

from ask_ray import tracking
from ask_ray.config import load

mlflow = pytest.importorskip("mlflow")

pytestmark = pytest.mark.survival

GRID = {"algorithm": "grid"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep of 12 trials on two CPUs, a quarter of which diverge, with early stopping: its folder and what it printed."""
    home = tmp_path_factory.mktemp("swept")
    rates = {"training.learning_rate": {"grid": [1e-3, 3e-3, 1e-2, 1e30]}, "model.temperature": {"grid": [0.05, 0.07, 0.1]}}
    own = {"run": {"storage": "runs"}, "data": {**QUICK["data"], "prepared": "prepared"}}  # relative, as people give them
    of = {**GRID, "early_stopping": True, "grace_epochs": 1, "reduction": 2, "concurrent": 2}
    job = start(write_space(home, rates, of, own), "sweep", cwd=home, on_two_cores=True)
    told, _ = job.communicate(timeout=540)
    assert job.returncode == 0, told
    return home / "runs/sweep", told


def test_twelve_trials_with_early_stopping_come_to_an_end(swept):
    folder, told = swept
    found = json.loads((folder / "sweep.json").read_text())
    rows = found["trials"]
    points = {(row["point"]["training.learning_rate"], row["point"]["model.temperature"]) for row in rows}
    assert len(rows) == len(points) == 12
    by_status = {status: [row for row in rows if row["status"] == status] for status in ("finished", "stopped early", "failed")}
    assert sum(map(len, by_status.values())) == 12
    assert by_status["stopped early"]
    assert {row["point"]["training.learning_rate"] for row in by_status["failed"]} == {1e30}
    assert found["best"]["value"] == max(row["value"] for row in by_status["finished"])
    assert found["verdict"][0] in told
    page = (folder / "sweep.md").read_text()
    assert found["verdict"][0] in page
    assert all(row["trial"] in page for row in rows)


def test_all_trials_read_one_prepared_corpus(swept):
    folder = swept[0]
    (corpus,) = (folder.parents[1] / "prepared").iterdir()
    read = [yaml.safe_load(file.read_text())["data"]["prepared"] for file in folder.glob("trials/*/settings.yaml")]
    assert read == [str(corpus.parent)] * 12
    kept = {json.loads(file.read_text())["place"]["corpus"] for file in folder.glob("trials/*/checkpoint_*/state.json")}
    assert kept == {str(corpus)}


def test_a_failed_trial_is_recorded_with_its_reason(swept):
    rows = json.loads((swept[0] / "sweep.json").read_text())["trials"]
    for row in rows:
        assert bool(row["reason"]) == (row["status"] == "failed")
        assert "not finite" in row["reason"] or row["status"] != "failed"


def test_values_are_what_the_runs_reported(swept):
    folder = swept[0]
    for row in json.loads((folder / "sweep.json").read_text())["trials"]:
        if row["value"] is not None:
            history = json.loads((folder / f"trials/{row['trial']}-seed-0/history.json").read_text())
            epochs = [event for event in history if event["kind"] == "epoch"]
            assert all(one["mean_r1"] == (one["t2a_r1"] + one["a2t_r1"]) / 2 for one in epochs)
            if row["status"] == "finished":
                assert (row["value"], 3) == (epochs[-1]["mean_r1"], epochs[-1]["epoch"])
            else:  # a run may be an epoch further before it hears that it is stopped
                assert row["value"] in [one["mean_r1"] for one in epochs]


def test_only_the_best_trial_keeps_its_weights(swept):
    folder = swept[0]
    best = json.loads((folder / "sweep.json").read_text())["best"]["trial"]
    assert {path.parents[1].name for path in folder.glob("trials/*/checkpoint_*/model.safetensors")} == {f"{best}-seed-0"}


def test_best_yaml_is_the_best_trials_settings(swept):
    folder = swept[0]
    best = json.loads((folder / "sweep.json").read_text())["best"]
    made = load((folder / "best.yaml").read_text())
    assert made.training.learning_rate == best["point"]["training.learning_rate"]
    assert made.model.temperature == best["point"]["model.temperature"]
    assert (made.run.name, made.training.epochs) == (None, 3)


def test_every_picture_that_is_told_of_is_there(swept):
    folder, told = swept
    names = json.loads((folder / "sweep.json").read_text())["pictures"]
    assert {"settings.png", "parallel.png"} <= {*names}
    assert all((folder / "pictures" / name).read_bytes().startswith(b"\x89PNG") and name in told for name in names)


def test_each_trial_is_an_mlflow_run_below_the_sweeps(swept):
    folder = swept[0]
    client = mlflow.MlflowClient(tracking.uri_of(load({"run": {"storage": str(folder.parent)}})))
    parent = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
    rows = {row["trial"]: row for row in json.loads((folder / "sweep.json").read_text())["trials"]}
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials_ended"] == 12
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    status = {"finished": "FINISHED", "stopped early": "FINISHED", "failed": "FAILED"}
    assert {run.data.tags["sweep.trial"]: run.info.status for run in found} == {
        trial: status[row["status"]] for trial, row in rows.items()
    }
    for run in found:
        row = rows[run.data.tags["sweep.trial"]]
        assert run.data.tags["sweep.status"] == row["status"]
        assert float(run.data.params["training.learning_rate"]) == row["point"]["training.learning_rate"]
        assert row["status"] != "finished" or math.isclose(run.data.metrics["mean_r1"], row["value"])
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {
        "sweep.json",
        "sweep.md",
        "best.yaml",
        "pictures",
    }
