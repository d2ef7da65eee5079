"""The record, in a real MLflow on SQLite: what was written can be read, and what fails later stops no run."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from ask_ray.config import Settings, SettingsError, flat, load
from ask_ray.storage import Folder, masked
from ask_ray.tracking import EARLIER_TAG, Recorder

mlflow = pytest.importorskip("mlflow")

PICTURE = b"\x89PNG picture"
FIGURES = {"r1": 0.25, "r5": 0.5, "r10": 0.75, "map10": 0.3, "median_rank": 4.0, "n": 20}
RESULT = {"final": {"t2a": FIGURES, "a2t": FIGURES}, "final_injected": {}, "steps_per_second": 3.5, "steps": 40, "name": "a"}
EVENTS = [
    {"kind": "began", "time": 1.0, "step": 0, "epoch": 0, "world_size": 2},
    {"kind": "epoch", "time": 2.0, "epoch": 1, "step": 20, "loss": 2.5, "note": "text is no metric"},
    {"kind": "epoch", "time": 3.0, "epoch": 2, "step": 40, "loss": 1.5},
    {"kind": "validated", "time": 3.5, "epoch": 1, "step": 20, "t2a_r1": 0.25},
    {"kind": "failed", "time": 2.2, "version": 1, "step": 20, "attempt": 1, "problem": "text is no metric"},
    {"kind": "failed", "time": 2.3, "version": 2, "step": 20, "attempt": 2, "problem": "text is no metric"},
    {"kind": "published", "time": 2.5, "version": 1, "encoder_step": 20, "encode_seconds": 2.0, "build_seconds": 0.5},
    {"kind": "swapped", "time": 2.7, "version": 1, "rank": 0, "step": 24, "lag_steps": 4, "swap_ms": 1.5},
    {"kind": "swapped", "time": 2.7, "version": 1, "rank": 1, "step": 24, "lag_steps": 4, "swap_ms": 99.0},
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests: making its tables takes seconds."""
    return tmp_path_factory.mktemp("runs")


def settings_of(storage: Path, **tracking: Any) -> Settings:
    return load({"run": {"storage": str(storage)}, "tracking": {"experiment": "tests", **tracking}})


def folder_of(storage: Path, name: str) -> Folder:
    folder = Folder.at(str(storage / name))
    (folder / "pictures").write("curves.png", PICTURE)
    return folder


def client_of(storage: Path) -> Any:
    return mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")


def run_of(storage: Path, folder: Folder) -> Any:
    return client_of(storage).get_run(folder.read_json("mlflow.json")["run_id"])


def history(storage: Path, run: Any, name: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in client_of(storage).get_metric_history(run.info.run_id, name)]


def test_a_run_is_recorded_with_settings_metrics_and_pictures(storage):
    settings, folder = settings_of(storage), folder_of(storage, "whole")
    with Recorder(settings, folder) as recorder:
        for event in EVENTS:
            recorder.record(event)
        recorder.finish(RESULT, [f"{folder}/pictures/curves.png"])
    run, client = run_of(storage, folder), client_of(storage)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "whole")
    assert client.get_experiment(run.info.experiment_id).name == "tests"
    assert run.data.params == {key: str(value) for key, value in flat(settings.model_dump(mode="json")).items()}
    assert history(storage, run, "loss") == [(20, 2.5), (40, 1.5)]
    assert history(storage, run, "t2a_r1") == [(20, 0.25)]
    assert history(storage, run, "refresh_encode_seconds") == [(20, 2.0)]
    assert history(storage, run, "refresh_failures") == [(20, 1.0), (20, 2.0)]
    assert history(storage, run, "swap_ms") == [(24, 1.5)]  # rank 0's alone
    assert history(storage, run, "swap_lag_steps") == [(24, 4.0)]
    assert history(storage, run, "final.t2a.r1") == [(40, 0.25)]
    assert run.data.metrics["steps_per_second"] == 3.5
    assert not {"note", "kind", "time", "step"} & run.data.metrics.keys()
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {"settings.yaml", "result.json", "pictures"}
    local = Path(client.download_artifacts(run.info.run_id, "pictures/curves.png", None))
    assert local.read_bytes() == PICTURE
    assert json.loads(Path(client.download_artifacts(run.info.run_id, "result.json")).read_text()) == RESULT
    assert load(Path(client.download_artifacts(run.info.run_id, "settings.yaml")).read_text()) == settings
    for told in (f"sqlite:///{storage}/mlflow.db", "tests", run.info.run_id):
        assert told in recorder.where


def test_a_run_that_fails_is_marked_and_continues_in_the_same_record(storage):
    settings, folder = settings_of(storage), folder_of(storage, "failing")
    with pytest.raises(KeyError), Recorder(settings, folder) as recorder:
        record_then_fail(recorder)
    first = run_of(storage, folder)
    assert first.info.status == "FAILED"
    with Recorder(settings, folder) as recorder:
        assert run_of(storage, folder).info.status == "RUNNING"
        recorder.record(EVENTS[2])
        recorder.finish(RESULT, [])
    again = run_of(storage, folder)
    assert (again.info.run_id, again.info.status) == (first.info.run_id, "FINISHED")
    assert history(storage, again, "loss") == [(20, 2.5), (40, 1.5)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store that no run was recorded at yet."""
    return f"sqlite:///{tmp_path_factory.mktemp('other')}/mlflow.db"


def test_a_run_that_another_store_recorded_goes_on_in_a_record_of_its_own(storage, other):
    folder = folder_of(storage, "moving")
    with pytest.raises(KeyError), Recorder(settings_of(storage), folder) as recorder:
        record_then_fail(recorder)
    first = run_of(storage, folder)
    settings = settings_of(storage, uri=other)
    with Recorder(settings, folder, {"sweep": "a"}) as recorder:
        recorder.record(EVENTS[2])
        recorder.finish(RESULT, [])
    told, client = folder.read_json("mlflow.json"), mlflow.MlflowClient(other)
    assert told == {"run_id": recorder.run_id, "uri": other}
    run = client.get_run(recorder.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "moving")
    assert run.data.params["tracking.uri"] == other
    assert run.data.tags["sweep"] == "a"
    assert run.data.tags[EARLIER_TAG] == f"{first.info.run_id} at sqlite:///{storage}/mlflow.db"
    assert [(one.step, one.value) for one in client.get_metric_history(recorder.run_id, "loss")] == [(40, 1.5)]
    assert client_of(storage).get_run(first.info.run_id).info.status == "FAILED"
    with Recorder(settings, folder) as again:
        assert again.run_id == recorder.run_id


def test_a_run_that_was_deleted_from_the_store_goes_on_in_a_new_record(storage):
    folder = folder_of(storage, "deleted")
    with Recorder(settings_of(storage), folder) as recorder:
        recorder.finish(RESULT, [])
    client_of(storage).delete_run(recorder.run_id)
    with Recorder(settings_of(storage), folder) as again:
        assert run_of(storage, folder).info.status == "RUNNING"
    assert again.run_id != recorder.run_id
    assert run_of(storage, folder).data.tags[EARLIER_TAG].startswith(recorder.run_id)


def test_a_store_that_moved_with_its_runs_has_them_still(storage, tmp_path):
    folder = folder_of(storage, "carried")
    with Recorder(settings_of(storage), folder) as recorder:
        recorder.finish(RESULT, [])
    shutil.copy(storage / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Recorder(settings_of(storage, uri=uri), folder) as again:
        assert again.run_id == recorder.run_id
    assert folder.read_json("mlflow.json") == {"run_id": recorder.run_id, "uri": uri}


def test_a_continued_run_names_the_parent_that_its_sweep_has_now(storage):
    folder = folder_of(storage, "child")
    for parent in ("the first", "the one begun anew"):
        with Recorder(settings_of(storage), folder, {"mlflow.parentRunId": parent}) as recorder:
            recorder.finish(RESULT, [])
    assert run_of(storage, folder).data.tags["mlflow.parentRunId"] == "the one begun anew"


def test_the_record_of_another_run_is_ended_where_the_store_has_it_and_else_left(storage, other, caplog):
    folder = folder_of(storage, "killed trial")
    with Recorder(settings_of(storage), folder) as trial:
        pass
    tags = {"sweep.status": "failed"}
    with Recorder(settings_of(storage, uri=other), folder_of(storage, "sweep elsewhere")) as sweep:
        sweep.end_other(folder, "FAILED", tags, {})
    assert not [record for record in caplog.records if record.name == "ask_ray.tracking"]
    assert run_of(storage, folder).info.status == "RUNNING"
    with Recorder(settings_of(storage), folder_of(storage, "sweep")) as sweep:
        sweep.end_other(folder, "FAILED", tags, {})
    ended = client_of(storage).get_run(trial.run_id)
    assert (ended.info.status, ended.data.tags["sweep.status"]) == ("FAILED", "failed")


def test_a_store_that_fails_to_answer_is_not_taken_for_one_without_the_run(storage, monkeypatch):
    folder = folder_of(storage, "unanswered")
    with Recorder(settings_of(storage), folder):
        pass
    told = folder.read_json("mlflow.json")
    monkeypatch.setattr(mlflow.MlflowClient, "get_run", unavailable)
    with pytest.raises(SettingsError, match=r"tracking\.uri.*try later"), Recorder(settings_of(storage), folder):
        pytest.fail("entered")
    assert folder.read_json("mlflow.json") == told


def unavailable(*_: Any) -> None:
    raise mlflow.MlflowException("try later")


def test_credentials_of_a_store_are_told_nowhere(storage, other, monkeypatch):
    """Neither those in use nor those of the store before."""
    real, asked = mlflow.MlflowClient, []
    monkeypatch.setattr(mlflow, "MlflowClient", lambda uri: asked.append(uri) or real(other))
    folder = folder_of(storage, "secret")
    folder.write_json("mlflow.json", {"run_id": "0" * 32, "uri": "http://me:old-s3cr3t@host"})
    with Recorder(settings_of(storage, uri="http://me:s3cr3t@host"), folder) as recorder:
        pass
    assert asked == ["http://me:s3cr3t@host"]
    tags = real(other).get_run(recorder.run_id).data.tags
    assert tags[EARLIER_TAG] == f"{'0' * 32} at http://***@host"
    for text in (recorder.where, folder.read("mlflow.json").decode()):
        assert "***@host" in text
        assert "s3cr3t" not in text


def record_then_fail(recorder: Recorder, gone: Path | None = None) -> None:
    if gone is not None:
        shutil.rmtree(gone)
    recorder.record(EVENTS[1])
    raise KeyError("training failed")


@pytest.mark.parametrize("uri", ["nonsense://nowhere", "sqlite:////proc/no/such/folder/mlflow.db", "postgresql://x:y@/none"])
def test_a_place_that_cannot_be_recorded_at_is_an_error_before_training(storage, uri):
    with (
        pytest.raises(SettingsError, match=r"tracking\.uri.*tracking\.enabled") as caught,
        Recorder(settings_of(storage, uri=uri), folder_of(storage, "nowhere")),
    ):
        pytest.fail("entered")
    assert masked(uri) in str(caught.value)
    assert "x:y@" not in str(caught.value)


def test_a_store_of_ones_own_is_used(storage):
    uri = f"sqlite:///{storage}/mlflow.db"
    folder = folder_of(storage, "own")
    with Recorder(settings_of(storage, uri=uri), folder) as recorder:
        assert recorder.where.startswith(uri)
    assert folder.read_json("mlflow.json")["uri"] == uri


def test_what_fails_later_is_one_warning_and_never_an_error(storage, caplog, monkeypatch):
    folder = folder_of(storage, "later")
    with caplog.at_level(logging.WARNING, logger="ask_ray.tracking"), Recorder(settings_of(storage), folder) as recorder:
        monkeypatch.setattr(recorder._client, "log_batch", broken)
        for event in EVENTS:
            recorder.record(event)
        recorder.finish(RESULT, [f"{folder}/pictures/curves.png"])
    warnings = [record.getMessage() for record in caplog.records if record.name == "ask_ray.tracking"]
    assert len(warnings) == 1
    assert "disk full" in warnings[0]
    assert str(folder) in warnings[0]


def broken(*_: Any, **__: Any) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "epoch"},
        {"kind": "published"},
        {"kind": "swapped", "rank": 0},
        {},
        {"kind": "epoch", "step": 1, "x": float("nan")},
    ],
    ids=str,
)
def test_no_event_can_stop_a_run(storage, event):
    with Recorder(settings_of(storage), folder_of(storage, "odd")) as recorder:
        recorder.record(event)
        recorder.finish({}, ["nowhere.png"])


def test_a_store_that_disappears_stops_no_run_and_hides_no_error(tmp_path, storage):
    shutil.copy(storage / "mlflow.db", tmp_path / "mlflow.db")
    with pytest.raises(KeyError), Recorder(settings_of(tmp_path), folder_of(tmp_path, "run")) as recorder:
        record_then_fail(recorder, gone=tmp_path)


def test_switched_off_nothing_is_recorded(tmp_path):
    with Recorder(settings_of(tmp_path, enabled=False), Folder.at(str(tmp_path / "run"))) as recorder:
        recorder.record(EVENTS[1])
        recorder.finish(RESULT, [])
    assert recorder.where == ""
    assert list(tmp_path.iterdir()) == []
