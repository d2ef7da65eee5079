"""A trial: the whole runs of one point of the space, one for each seed, heard by Ray Tune."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from rich.console import Console

from ask_ray import experiment, report
from ask_ray.config import Settings, SweepSettings, UserError, flat, with_values
from ask_ray.journal import Journal
from ask_ray.storage import Folder
from ask_ray.training import checkpoint
from ask_ray.training.checkpoint import CheckpointError
from ask_ray.training.trainer import RunPlace
from ask_ray.tuning.space import Point, name_of

#: What a trial tells Ray Tune beside the figures: epochs since its start over all seeds, and whether it is at its end.
AGE, DONE = "age", "whole"

#: The file of what Ray Tune keeps for pbt: which run has the weights.
DONOR = "donor.json"

#: Seconds for which a trial waits for a checkpoint to take over, and between two looks.
PATIENCE, PAUSE = 300.0, 1.0

#: Tags of a trial's MLflow runs.
PARENT_TAG, TRIAL_TAG, STATUS_TAG, REASON_TAG = "mlflow.parentRunId", "sweep.trial", "sweep.status", "sweep.reason"


class NotEvaluated(UserError, RuntimeError):
    """A run without the figure that trials are compared by. The message names the run and the epoch."""


@dataclass(frozen=True)
class TrialPlan:
    """What a sweep hands to every trial.

    settings: shared by all, fitted to the cluster; trials: the folder of their runs; parent: the sweep's MLflow run, if any;
    journal: the sweep's.
    """

    settings: Settings
    sweep: SweepSettings
    trials: Folder
    parent: str
    journal: Journal


def run_name(trial: str, seed: int, part: int = 0) -> str:
    """The name of a trial's run; of its later parts where pbt changed its settings in the middle."""
    return f"{trial}-seed-{seed}" + (f"-part-{part}" if part else "")


def last_part(trials: Folder, trial: str, seed: int) -> int:
    """The newest part of a trial's run; 0 too if there is none yet."""
    start = run_name(trial, seed) + "-part-"
    parts = [int(name.removeprefix(start)) for name in (trials.names() if trials.exists() else []) if name.startswith(start)]
    return max(parts, default=0)


def run_folder(trials: Folder, trial: str, seed: int) -> Folder:
    """The folder of the newest part of a trial's run."""
    return trials / run_name(trial, seed, last_part(trials, trial, seed))


def point_of(config: dict[str, Any]) -> Point:
    """The point in what Ray Tune hands to a trial: as it stands, or listed whole as `point`."""
    return dict(config.get("point", config))


def settings_of(plan: TrialPlan, point: Point, trial: str, seed: int) -> Settings:
    """The settings of a trial's run, or of its part that begins or goes on now."""
    own: Point = {"run.name": run_name(trial, seed), "run.storage": plan.trials.uri, "run.seed": seed}
    donor = _donor()
    if donor is not None:
        own |= _part(plan, point, trial, seed, donor)
    return with_values(plan.settings, {**point, **own})


def _part(plan: TrialPlan, point: Point, trial: str, seed: int, donor: str) -> Point:
    """What tells a part of a trial's run under pbt: it goes on with its newest part, or forks the run that it takes over."""
    newest, run = last_part(plan.trials, trial, seed), plan.trials / donor
    if donor == run_name(trial, seed, newest) and _goes_on(run, point):
        return {"run.name": donor, "run.fork": _told_of(run)["run.fork"]}
    return {"run.name": run_name(trial, seed, newest + 1), "run.fork": _to_fork(run, plan.settings.training.epochs).uri}


def _goes_on(run: Folder, point: Point) -> bool:
    """Whether a run was made with the settings of a point."""
    there = _told_of(run)
    return all(there[key] == value for key, value in point.items())


def _told_of(run: Folder) -> Point:
    """The settings of a run by their dotted names."""
    return flat(yaml.safe_load(run.read("settings.yaml")))


def schedule(run: Folder, keys: Sequence[str]) -> str:
    """The values of settings that a run's weights were made with, in their order: of the runs that it goes back to, then its."""
    there = _told_of(run)
    before = there["run.fork"]
    own = f"{name_of({key: there[key] for key in keys})} ({run.name})"
    return f"{schedule(Folder.at(before), keys)}, then {own}" if before else own


def _to_fork(donor: Folder, epochs: int) -> Folder:
    """The run to fork for a donor's weights, when it has a checkpoint of before its last epoch: the first may still be on its way
    to storage. A donor that forked another one itself may never have any, if it was so late: then that other one.

    Raises:
        CheckpointError: if there is none, and none can come any more or does for a while.
    """
    end = time.monotonic() + PATIENCE
    while not checkpoint.has_any(donor, epochs):
        if finished(donor) or time.monotonic() > end:
            fork = _told_of(donor)["run.fork"]
            if fork is None:
                raise CheckpointError(
                    f"{donor}: no checkpoint of before epoch {epochs} is there to take over: it was removed, or takes longer "
                    f"than {PATIENCE:g} s to get there"
                )
            return _to_fork(Folder.at(fork), epochs)
        time.sleep(PAUSE)
    return donor


def _donor() -> str | None:
    """The run that Ray Tune says to go on from: under pbt, of this trial or of a better one."""
    saved = tune.get_checkpoint()
    if saved is None:
        return None
    with saved.as_directory() as folder:
        return str(json.loads((Path(folder) / DONOR).read_text(encoding="utf-8"))["run"])


def train_trial(config: dict[str, Any], plan: TrialPlan) -> None:
    """Ray Tune's trainable: train once with each seed, and report after every evaluation. What is there is not done again, but a
    run that came to its end without the figure that it is judged by.

    Reported are the figures of an evaluation with `age`, and at the end the metric's mean over the seeds with `whole`. That
    alone tells early stopping of the last epoch of all: no trial is stopped between its training and its end.
    """
    trial = tune.get_context().get_trial_id()
    try:
        _train(trial, point_of(config), plan)
    except Exception as error:
        # before Ray Tune hears of the failure, and the sweep writes down why
        plan.journal.tell_first("reason", trial=trial, reason=str(error).strip().split("\n")[0] or type(error).__name__)
        raise


def _train(trial: str, point: Point, plan: TrialPlan) -> None:
    values = []
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        for number, seed in enumerate(plan.sweep.seeds):
            settings = settings_of(plan, point, trial, seed)
            name, folder = str(settings.run.name), plan.trials / str(settings.run.name)
            epochs, last = settings.training.epochs, number == len(plan.sweep.seeds) - 1
            told = _Told(
                number * epochs,
                name if plan.sweep.algorithm == "pbt" else None,
                epochs if last and plan.sweep.early_stopping else None,
            )
            _forget_unjudged(plan, name, epochs)
            if not finished(folder):
                tags = {PARENT_TAG: plan.parent, TRIAL_TAG: trial, **{key: str(value) for key, value in point.items()}}
                experiment.run(settings, Console(file=nowhere), told.tell, tags)
            values.append(last_value(folder, plan.sweep.metric, epochs))
    epochs = settings.training.epochs * len(values)
    tune.report({plan.sweep.metric: sum(values) / len(values), AGE: epochs + 1, DONE: True})


def _forget_unjudged(plan: TrialPlan, name: str, epochs: int) -> None:
    """Make room for a run that is at its end without an evaluation after its last epoch: none can come any more."""
    folder = plan.trials / name
    if finished(folder) and not _last_values(folder, plan.sweep.metric, epochs):
        RunPlace(plan.trials, name).forget()
        folder.remove("result.json")


@dataclass(frozen=True)
class _Told:
    """Reports evaluations to Ray Tune: `before` epochs were done by earlier seeds; under pbt with the run to take over; those
    `until` an epoch, without its own: ASHA would stop a trial whose training is done at a rung that it is first seen above."""

    before: int
    run: str | None
    until: int | None = None

    def tell(self, event: dict[str, Any]) -> None:
        """Report an event if it is an evaluation."""
        if event["kind"] not in ("epoch", "validated") or "mean_r1" not in event or event["epoch"] == self.until:
            return
        figures = {key: value for key, value in event.items() if isinstance(value, int | float) and key != "time"}
        report = {**figures, AGE: self.before + event["epoch"], DONE: False}
        if self.run is None:
            tune.report(report)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / DONOR).write_text(json.dumps({"run": self.run}), encoding="utf-8")
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def finished(folder: Folder) -> bool:
    """Whether a run is whole: its result is the last that it writes."""
    return folder.exists("result.json")


def last_value(folder: Folder, metric: str, epochs: int) -> float:
    """The metric of a whole run's evaluation after its last epoch, by which trials are compared.

    Raises:
        NotEvaluated: if there is none. An earlier one would be of another age than other trials'.
    """
    found = _last_values(folder, metric, epochs)
    if not found:
        raise NotEvaluated(
            f"{folder.name}: there is no {metric} of its last epoch, {epochs}: the evaluation beside training failed or took "
            "longer than training.evaluation_timeout_seconds, or history.json could not be saved"
        )
    return found[-1]


def _last_values(folder: Folder, metric: str, epochs: int) -> list[float]:
    """The metric of a run's evaluations after its last epoch; empty if there is none."""
    events = folder.read_json("history.json") if folder.exists("history.json") else []
    return [float(event[metric]) for event in report.validations(events) if event["epoch"] == epochs and metric in event]


def value_of(folder: Folder, metric: str) -> float:
    """The metric of a run's last evaluation; NaN if it has none yet."""
    if not folder.exists("history.json"):
        return float("nan")
    validated = report.validations(folder.read_json("history.json"))
    return float(validated[-1].get(metric, float("nan"))) if validated else float("nan")
