"""The MLflow record of a run, kept by the driver: one MLflow run for each training run, SQLite by default."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ask_ray.config import Settings, SettingsError, flat
from ask_ray.storage import Folder, masked

#: MLflow takes at most 100 parameters in a call.
PARAMS_AT_ONCE = 100

#: Tag of a run that was begun anew because the store in use lacks the one before: which that was, and where.
EARLIER_TAG = "earlier_run"

_LOG = logging.getLogger(__name__)


class Recorder:
    """Writes settings, metrics, knowledge-base versions and pictures to MLflow.

    Failing to set up is an error before training; failing later is a warning, once: a record never stops a run.

    Args:
        settings: of the run; with `tracking.enabled` false nothing is recorded.
        folder: of the run; its `mlflow.json` names the MLflow run, which is continued if the store in use has it. Where another
            store has it, or it was deleted, a new one is begun: a record that is gone refuses no training.
        tags: of the MLflow run.
    """

    def __init__(self, settings: Settings, folder: Folder, tags: Mapping[str, str] | None = None) -> None:
        self._settings, self._folder, self._tags = settings, folder, tags or {}
        self._client: Any = None
        self._warned = False
        self._failures = 0
        self.run_id = ""
        self.where = ""

    def __enter__(self) -> Recorder:
        if self._settings.tracking.enabled:
            try:
                self._start()
            except Exception as error:
                cause = masked(f"{uri_of(self._settings)} ({error})")
                raise SettingsError(
                    f"tracking.uri: MLflow cannot record at {cause}; give another tracking.uri or set tracking.enabled to false"
                ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.end("KILLED" if kind is KeyboardInterrupt else "FAILED")

    def record(self, event: dict[str, Any]) -> None:
        """Record what of an event is a metric: epochs and evaluations by step, knowledge-base versions as they are
        published and swapped, and how many tries of refreshes have failed since this job began."""
        self._safely(lambda: self._record(event))

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Record those of the values that are numbers."""
        self._safely(lambda: self._metrics(values, step))

    def finish(self, result: dict[str, Any], pictures: list[str]) -> None:
        """Record the final figures and the pictures, and end the run."""
        self._safely(lambda: self._final(result))
        for picture in pictures:
            self.artifact(self._folder / "pictures", Folder(picture).name, "pictures")
        self.end("FINISHED")

    def artifact(self, folder: Folder, name: str, under: str | None = None) -> None:
        """Keep a copy of a file with the record."""
        self._safely(lambda: self._artifact(folder, name, under))

    def end(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._safely(lambda: self._client.set_terminated(self.run_id, status))

    def end_other(self, folder: Folder, status: str, tags: Mapping[str, str], figures: Mapping[str, float]) -> None:
        """End the MLflow run of another run's folder, if it has one, for it cannot do so itself any more."""
        if folder.exists("mlflow.json"):
            self._safely(lambda: self._end_other(folder.read_json("mlflow.json")["run_id"], status, tags, figures))

    def _start(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow", "mlflow.store.db.utils"):  # they tell of every table they create
            logging.getLogger(name).setLevel(logging.WARNING)
        uri, name = uri_of(self._settings), self._settings.tracking.experiment
        self._client = MlflowClient(uri)
        found = self._client.get_experiment_by_name(name)
        artifacts = None if self._settings.tracking.uri else (_home(self._settings) / "mlflow-artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=artifacts)
        told = self._folder.read_json("mlflow.json") if self._folder.exists("mlflow.json") else None
        there = told["run_id"] if told is not None and self._has(told["run_id"]) else None
        self.run_id = self._begun(experiment, told) if there is None else self._continued(there)
        self._folder.write_json("mlflow.json", {"run_id": self.run_id, "uri": masked(uri)})
        if there is None:
            self._log_settings()
        self.where = f"{masked(uri)}  experiment {name}, run {self.run_id}"

    def _has(self, run_id: str) -> bool:
        """Whether the store in use has a run that is not deleted.

        It alone is asked, not the URI that the run was recorded at: a store may have moved, or have got another password.
        """
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _continued(self, run_id: str) -> str:
        """Go on with a run. Its tags are set again: the parent that they name may have been begun anew."""
        self._client.update_run(run_id, status="RUNNING")
        for key, value in self._tags.items():
            self._client.set_tag(run_id, key, value)
        return run_id

    def _begun(self, experiment: str, earlier: dict[str, str] | None) -> str:
        """A new run, which names the earlier one that the store lacks, if there was one."""
        tag = {} if earlier is None else {EARLIER_TAG: masked(f"{earlier['run_id']} at {earlier['uri']}")}
        made = self._client.create_run(experiment, tags={**self._tags, **tag}, run_name=self._folder.name)
        return str(made.info.run_id)

    def _log_settings(self) -> None:
        from mlflow.entities import Param

        values = flat(self._settings.model_dump(mode="json"))
        params = [Param(key, masked(str(value))) for key, value in values.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=params[start : start + PARAMS_AT_ONCE])
        self._client.log_text(self.run_id, masked(self._settings.to_yaml()), "settings.yaml")

    def _record(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind in ("epoch", "validated"):
            self._metrics({key: event[key] for key in event if key not in ("kind", "time", "step")}, event["step"])
        elif kind == "published":
            self._metrics({f"refresh_{key}": event[key] for key in ("encode_seconds", "build_seconds")}, event["encoder_step"])
        elif kind == "failed":
            self._failures += 1
            self._metrics({"refresh_failures": self._failures}, event["step"])
        elif kind == "swapped" and event["rank"] == 0:
            swap = {f"swap_{key.removeprefix('swap_')}": event[key] for key in ("version", "lag_steps", "swap_ms")}
            self._metrics(swap, event["step"])

    def _metrics(self, values: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        made = [Metric(key, float(value), now, step) for key, value in values.items() if isinstance(value, int | float)]
        self._client.log_batch(self.run_id, metrics=made)

    def _final(self, result: dict[str, Any]) -> None:
        final = {key: result[key] for key in ("final", "final_injected")}
        self._metrics(flat(final) | {"steps_per_second": result["steps_per_second"]}, result["steps"])
        self._client.log_dict(self.run_id, result, "result.json")

    def _artifact(self, folder: Folder, name: str, under: str | None) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / name).write_bytes(folder.read(name))
            self._client.log_artifact(self.run_id, str(Path(temporary) / name), under)

    def _end_other(self, run_id: str, status: str, tags: Mapping[str, str], figures: Mapping[str, float]) -> None:
        if not self._has(run_id):  # its record is in another store, or was deleted: there is nothing to end
            return
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value)
        for key, figure in figures.items():
            self._client.log_metric(run_id, key, figure)
        self._client.set_terminated(run_id, status)

    def _safely(self, act: Any) -> None:
        if self._client is None:
            return
        try:
            act()
        except Exception as error:
            if not self._warned:
                _LOG.warning("MLflow stopped recording (%s); the run goes on, its history is in %s", error, self._folder)
            self._warned = True


def uri_of(settings: Settings) -> str:
    """Where a run is recorded: `tracking.uri`, else SQLite beside the runs if they are local, else in the current folder."""
    return settings.tracking.uri or f"sqlite:///{_home(settings)}/mlflow.db"


def _home(settings: Settings) -> Path:
    """Where the default store is."""
    home = Folder.at(settings.run.storage).local or Path.cwd()
    home.mkdir(parents=True, exist_ok=True)
    return home
