"""A sweep while it runs: what Ray Tune tells of its trials, kept, shown and recorded as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console
from rich.markup import escape

from ask_ray import tracking
from ask_ray.config import SweepSettings
from ask_ray.journal import Journal
from ask_ray.storage import Folder
from ask_ray.training.trainer import RunPlace
from ask_ray.tuning import outcome
from ask_ray.tuning.outcome import FAILED, FINISHED, INTERRUPTED, RUNNING, STOPPED, Row
from ask_ray.tuning.space import Point, name_of
from ask_ray.tuning.trial import AGE, DONE, REASON_TAG, STATUS_TAG, finished, point_of, run_folder

#: Why a trial failed that told no reason.
PROCESS_DIED = "its process ended without a word: killed, or out of memory"


class Watch(tune.Callback):
    """Tells the sweep's journal how trials fare. It is kept with Ray Tune's state, so it holds no more than a name."""

    def __init__(self, journal: Journal, metric: str) -> None:
        self._journal, self._metric = journal, metric

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial began, or goes on."""
        self._journal.tell("started", trial=trial.trial_id, point=point_of(trial.config))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A trial was evaluated."""
        if self._metric in result and not result.get(DONE):
            told = {"age": result[AGE], "value": result[self._metric], "point": point_of(trial.config)}
            self._journal.tell("result", trial=trial.trial_id, **told)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its end, or was stopped."""
        whole = bool(trial.last_result.get(DONE))
        self._journal.tell("ended", trial=trial.trial_id, point=point_of(trial.config), whole=whole)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        self._journal.tell("failed", trial=trial.trial_id, point=point_of(trial.config))


class Board:
    """The rows of a sweep while it runs: kept in ``sweep.json``, told to MLflow and the terminal; losers' weights go."""

    def __init__(self, folder: Folder, of: SweepSettings, recorder: tracking.Recorder, console: Console) -> None:
        self._folder, self._of, self._recorder, self._console = folder, of, recorder, console
        self.trials = folder / "trials"
        there = folder.read_json("sweep.json")["trials"] if folder.exists("sweep.json") else []
        self.rows: dict[str, Row] = {row["trial"]: row for row in there}
        self._reasons = {trial: row["reason"] for trial, row in self.rows.items() if row["reason"]}

    def statuses(self) -> list[str]:
        """How the trials stand."""
        return [row["status"] for row in self.rows.values()]

    def heed(self, new: list[dict[str, Any]], over: bool) -> None:
        """Take in events of :class:`Watch`. Storage that is away for now is tried again with the next, at the latest when the
        sweep is settled. Nothing that one event brings may end the thread that hears of all others."""
        for event in new:
            try:
                self._take(event)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                self._console.print(f"  [yellow]sweep.json is not up to date[/]: {escape(told)}", soft_wrap=True)

    def _take(self, event: Mapping[str, Any]) -> None:
        trial, kind = event["trial"], event["kind"]
        if kind == "started":
            self._reasons.pop(trial, None)  # why it failed in an earlier life
            self._set(trial, event["point"], RUNNING, "")
            self._console.print(f"{trial} started: {escape(name_of(event['point']))}", soft_wrap=True)
        elif kind == "result":
            self._set(trial, event["point"], RUNNING, "")
            self._console.print(
                f"  {trial} age {event['age']:>3}  {self._of.metric} {outcome.told(self._of.metric, event['value'])}"
            )
        elif kind == "reason":
            self._reasons[trial] = event["reason"]
        else:
            status = FAILED if kind == "failed" else FINISHED if event["whole"] else STOPPED
            self._end(trial, event["point"], status)

    def settle(self, results: tune.ResultGrid) -> None:
        """Bring the rows in line with what Ray Tune holds at the end: a killed sweep may not have heard of everything, and Ray
        Tune may have forgotten the last that it started, which has then been tried again as another."""
        known = {Path(results[number].path).name: results[number] for number in range(len(results))}
        for trial, result in known.items():
            row, status = self.rows.get(trial), _status(result)
            if row is None or row["status"] != status:
                self._end(trial, point_of(result.config or {}), status)
        for trial in [trial for trial in self.rows if trial not in known]:
            self._record({**self.rows.pop(trial), "status": INTERRUPTED})
            for name in self._runs_of([trial]):
                RunPlace(self.trials, name).forget()

    def _end(self, trial: str, point: Point, status: str) -> None:
        reason = self._reasons.get(trial, PROCESS_DIED) if status == FAILED else ""
        row = self._set(trial, point, status, reason)
        value = "" if row["value"] is None else f": {self._of.metric} {outcome.spread(row, self._of.metric)}"
        self._console.print(f"{trial} [bold]{status}[/]{value}" + (f" ({escape(reason)})" if reason else ""), soft_wrap=True)
        self._record(row)
        if self._of.algorithm != "pbt":  # its trials take over the weights of others
            self.prune()

    def _set(self, trial: str, point: Point, status: str, reason: str) -> Row:
        self.rows[trial] = outcome.row_of(self.trials, trial, point, status, reason, self._of)
        self._folder.write_json("sweep.json", {"trials": list(self.rows.values())})
        return self.rows[trial]

    def _record(self, row: Row) -> None:
        """End the MLflow runs of a trial that cannot do so itself any more, with the trial's mean where it has several seeds, and
        tell the sweep's run of the best so far.

        Of a trial that failed, or was broken off, that is the fate of one run alone: other seeds are whole, and pbt left the
        parts before on purpose.
        """
        status = {FINISHED: "FINISHED", STOPPED: "FINISHED", FAILED: "FAILED"}.get(row["status"], "KILLED")
        tags = {STATUS_TAG: row["status"], REASON_TAG: row["reason"]}
        several = len(self._of.seeds) > 1 and row["value"] is not None
        figures = {f"sweep.{self._of.metric}": row["value"]} if several else {}
        newest = {run_folder(self.trials, row["trial"], seed).name for seed in self._of.seeds}
        for folder in [self.trials / name for name in self._runs_of([row["trial"]])]:
            over = finished(folder) or folder.name not in newest
            self._recorder.end_other(folder, "FINISHED" if over else status, tags, figures)
        best = outcome.best_of([*self.rows.values()], self._of.mode)
        ended = sum(one["status"] != RUNNING for one in self.rows.values())
        self._recorder.metrics({"trials_ended": ended} | ({self._of.metric: best["value"]} if best else {}), ended)

    def prune(self) -> None:
        """Remove weights and knowledge bases of trials that have ended, all but the best. A population keeps all until it is
        at its end as a whole: a trial that goes on, or failed and is tried again, may take over the weights of any other."""
        if self._of.algorithm == "pbt" and not self._over():
            return
        ended = [row for row in self.rows.values() if row["status"] in (FINISHED, STOPPED, FAILED)]
        best = [row for row in outcome.ranked(ended, self._of.mode) if row["status"] == FINISHED][: self._of.keep]
        kept = [run_folder(self.trials, row["trial"], seed).name for row in best for seed in self._of.seeds]
        for name in self._runs_of([row["trial"] for row in ended]):
            if name not in kept:
                RunPlace(self.trials, name).forget()

    def _over(self) -> bool:
        """Whether all trials of a population came to their end, and none will be tried again."""
        return len(self.rows) == self._of.trials and {*self.statuses()} <= {FINISHED, STOPPED}

    def _runs_of(self, trials: list[str]) -> list[str]:
        """The runs of trials, all parts and seeds."""
        there = self.trials.names() if self.trials.exists() else []
        return [name for name in there if name.startswith(tuple(f"{trial}-" for trial in trials))]


def _status(result: tune.Result) -> str:
    """How Ray Tune says that a trial stands at the end of a sweep."""
    metrics = result.metrics or {}
    if result.error is not None:
        return FAILED
    if metrics.get(DONE):
        return FINISHED
    return STOPPED if metrics.get(tune.result.DONE) else INTERRUPTED
