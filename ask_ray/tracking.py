"""The MLflow record of a run, kept by the driver: one MLflow run for each training run, SQLite by default."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from ask_ray.config import Settings, SettingsError, flat
from ask_ray.storage import Folder, masked

#: MLflow takes at most 100 parameters in a call.
PARAMS_AT_ONCE = 100

_LOG = logging.getLogger(__name__)


class Recorder:
    """Writes settings, metrics, knowledge-base versions and pictures to MLflow.

    Failing to set up is an error before training; failing later is a warning, once: a record never stops a run.
    """

    def __init__(self, settings: Settings, folder: Folder) -> None:
        self._settings, self._folder = settings, folder
        self._client: Any = None
        self._run_id = ""
        self._warned = False
        self.where = ""

    def __enter__(self) -> Recorder:
        if self._settings.tracking.enabled:
            try:
                self._start()
            except Exception as error:
                raise SettingsError(
                    f"tracking.uri: MLflow cannot record at {self._uri()} ({error}); give another tracking.uri or set "
                    "tracking.enabled to false"
                ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._safely(lambda: self._client.set_terminated(self._run_id, "FAILED"))

    def record(self, event: dict[str, Any]) -> None:
        """Record what of an event is a metric: epochs and evaluations by step, knowledge-base versions as they are
        published and swapped."""
        self._safely(lambda: self._record(event))

    def finish(self, result: dict[str, Any], pictures: list[str]) -> None:
        """Record the final figures and the pictures, and end the run."""
        self._safely(lambda: self._finish(result, pictures))

    def _uri(self) -> str:
        if self._settings.tracking.uri is not None:
            return self._settings.tracking.uri
        return f"sqlite:///{self._home()}/mlflow.db"

    def _home(self) -> Path:
        """Where the default store is: beside the runs if they are local, else in the current folder."""
        home = Folder.at(self._settings.run.storage).local or Path.cwd()
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _start(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow", "mlflow.store.db.utils"):  # they tell of every table they create
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient(self._uri())
        name = self._settings.tracking.experiment
        found = self._client.get_experiment_by_name(name)
        artifacts = None if self._settings.tracking.uri else (self._home() / "mlflow-artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=artifacts)
        if self._folder.exists("mlflow.json"):
            self._run_id = self._folder.read_json("mlflow.json")["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = self._client.create_run(experiment, run_name=self._folder.name).info.run_id
            self._folder.write_json("mlflow.json", {"run_id": self._run_id, "uri": self._uri()})
            self._log_settings()
        self.where = f"{self._uri()}  experiment {name}, run {self._run_id}"

    def _log_settings(self) -> None:
        from mlflow.entities import Param

        values = flat(self._settings.model_dump(mode="json"))
        params = [Param(key, masked(str(value))) for key, value in values.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + PARAMS_AT_ONCE])
        self._client.log_text(self._run_id, masked(self._settings.to_yaml()), "settings.yaml")

    def _record(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind in ("epoch", "validated"):
            self._metrics(event, event["step"], leave_out=("kind", "time", "step"))
        elif kind == "published":
            self._metrics({f"refresh_{key}": event[key] for key in ("encode_seconds", "build_seconds")}, event["encoder_step"])
        elif kind == "swapped" and event["rank"] == 0:
            swap = {f"swap_{key.removeprefix('swap_')}": event[key] for key in ("version", "lag_steps", "swap_ms")}
            self._metrics(swap, event["step"])

    def _metrics(self, values: dict[str, Any], step: int, leave_out: tuple[str, ...] = ()) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        made = [
            Metric(key, float(value), now, step)
            for key, value in values.items()
            if key not in leave_out and isinstance(value, int | float)
        ]
        self._client.log_batch(self._run_id, metrics=made)

    def _finish(self, result: dict[str, Any], pictures: list[str]) -> None:
        final = {key: result[key] for key in ("final", "final_injected")}
        self._metrics(flat(final) | {"steps_per_second": result["steps_per_second"]}, result["steps"])
        self._client.log_dict(self._run_id, result, "result.json")
        with tempfile.TemporaryDirectory() as folder:
            for picture in pictures:
                name = Folder(picture).name
                (Path(folder) / name).write_bytes((self._folder / "pictures").read(name))
                self._client.log_artifact(self._run_id, str(Path(folder) / name), "pictures")
        self._client.set_terminated(self._run_id, "FINISHED")

    def _safely(self, act: Any) -> None:
        if self._client is None:
            return
        try:
            act()
        except Exception as error:
            if not self._warned:
                _LOG.warning("MLflow stopped recording (%s); the run goes on, its history is in %s", error, self._folder)
            self._warned = True
