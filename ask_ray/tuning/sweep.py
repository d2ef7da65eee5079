"""A whole sweep: check everything, run the trials with Ray Tune, keep the record live, end with an answer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from rich.console import Console

from ask_ray import cluster, experiment, tracking
from ask_ray.config import Settings, SettingsError, SweepSettings, flat, with_values
from ask_ray.data.corpus import Corpus
from ask_ray.journal import START, Journal
from ask_ray.storage import Folder, masked
from ask_ray.training import trainer
from ask_ray.tuning import outcome, pictures, search, space
from ask_ray.tuning.outcome import FAILED, FINISHED, INTERRUPTED, RUNNING, STOPPED, Row
from ask_ray.tuning.space import Point, Space, SpaceFile, name_of
from ask_ray.tuning.trial import AGE, DONE, REASON_TAG, STATUS_TAG, TrialPlan, point_of, run_folder, train_trial

POLL_SECONDS = 0.5

#: Why a trial failed that told no reason.
PROCESS_DIED = "its process ended without a word: killed, or out of memory"

#: Settings of a sweep that may change when it is continued.
MAY_CHANGE = ("sweep.concurrent", "sweep.keep", "sweep.name")


def sweep(settings: Settings, of: SweepSettings, file: SpaceFile, console: Console | None = None) -> dict[str, Any]:
    """Do everything that `jobs/tune.py` promises.

    Returns:
        what ``sweep.json`` holds.

    Raises:
        SettingsError, StorageError, WeightsError: before the first trial, naming the line of the space or the field.
        KeyboardInterrupt: after Ctrl-C, when the record is written.
    """
    console = console or Console()
    name = of.name or time.strftime(f"{Path(file.space.file).stem}-%Y%m%d-%H%M%S")
    trainer.check_towers(settings)
    search.check_metric(of, settings)
    file.space.check_bounds(settings)
    points = space.points_of(file.space, of)
    for _ in file.space.check_points(settings, points):
        pass
    cluster.connect_for_sweep(settings, search.wanted_at_once(of))
    settings = _fitted(settings)
    folder = Folder.at(settings.run.storage) / name
    Folder.at(settings.run.storage).check_writable("run.storage")
    continued = _check_same(folder, file.space, of, settings)
    corpus = experiment.prepared(settings, console)
    at_once = _check_points(file.space, settings, points, corpus)
    at_once = search.at_once(of, points, at_once)
    folder.write("space.yaml", yaml.safe_dump(_told(file.space, of, settings), sort_keys=False, allow_unicode=True).encode())
    console.print(
        f"{'Continuing' if continued else 'Starting'} sweep [bold]{name}[/] in {folder}: {search.count(of, points)} trials x "
        f"{len(of.seeds)} seeds, {at_once} trials at once"
    )
    started = time.time()
    with tracking.Recorder(settings, folder, {"sweep": name}) as recorder:
        board = Board(folder, of, recorder, console)
        journal, keeper = Journal.start(f"ask_ray-sweep-{name}")
        plan = TrialPlan(_recorded(settings), of, folder / "trials", recorder.run_id, journal)
        with Watcher(journal, board):
            results = _tuner(plan, file.space, points, at_once, folder, journal).fit()
        ray.kill(keeper)
        board.settle(results)
        board.prune()
        whole = len(board.rows) >= search.count(of, points) and not any(
            row["status"] == INTERRUPTED for row in board.rows.values()
        )
        found = _finish(settings, of, file.space, board, folder, time.time() - started)
        for picture in found["pictures"]:
            recorder.artifact(folder / "pictures", picture, "pictures")
        for kept in ("sweep.json", *(["best.yaml"] if found["best"] else [])):
            recorder.artifact(folder, kept)
        _tell(console, found, folder, file.space, of, recorder)
        if not whole:
            console.print(f"Interrupted: the same command with --sweep.name {name} goes on", soft_wrap=True)
            raise KeyboardInterrupt
        recorder.end("FINISHED")
    return found


def _fitted(settings: Settings) -> Settings:
    """The settings that all trials share, with every share of the cluster filled in for one trial.

    Raises:
        SettingsError: if a trial cannot be scheduled, with the sum; for an elastic run, whose share is no fixed one.
    """
    if settings.training.min_workers is not None:
        raise SettingsError("training.min_workers: the trials of a sweep have fixed shares; leave it unset")
    return cluster.fitted(with_values(settings, {"training.workers": cluster.workers_of_trial(settings)}))


def _recorded(settings: Settings) -> Settings:
    """The settings of trials, which are recorded where the sweep is."""
    if not settings.tracking.enabled:
        return settings
    return with_values(settings, {"tracking.uri": tracking.uri_of(settings)})


def _told(swept: Space, of: SweepSettings, settings: Settings) -> dict[str, Any]:
    """What tells one sweep from another."""
    dimensions = {
        one.key: {one.kind: list(one.arguments), "when": {k: list(v) for k, v in one.when.items()}} for one in swept.dimensions
    }
    return {"space": dimensions, "sweep": of.model_dump(mode="json"), **settings.model_dump(mode="json")}


def _check_same(folder: Folder, swept: Space, of: SweepSettings, settings: Settings) -> bool:
    """Whether the sweep exists already.

    Raises:
        SettingsError: if the name is that of a run, or of a sweep of another space or other settings, naming them.
    """
    if folder.exists("settings.yaml"):
        raise SettingsError(f"sweep.name: {folder} is a run; choose another sweep.name")
    if not folder.exists("space.yaml"):
        return False
    old = flat(yaml.safe_load(folder.read("space.yaml")))
    new = flat(_told(swept, of, settings))
    may = (*MAY_CHANGE, *experiment.MAY_CHANGE)
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key) and not key.startswith(may)]
    if differing:
        told = ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in differing)
        raise SettingsError(f"sweep.name: {folder} is another sweep: {masked(told)}. Choose another sweep.name")
    return True


def _check_points(swept: Space, settings: Settings, points: list[Point], corpus: Corpus) -> int:
    """How many trials the cluster holds at once, when all that could be tried has been checked against corpus and cluster.

    Raises:
        SettingsError: naming the line of a setting that alone cannot work, else the point.
    """
    if corpus.clips("validation") == 0:
        raise SettingsError("data: the validation split is empty, and a sweep compares trials on it: hold some clips out")
    for one in swept.dimensions:
        for value in one.values:
            try:
                trainer.check(with_values(settings, {one.key: value}), corpus)
            except SettingsError as error:
                if str(error).startswith(one.key):
                    swept.refuse(one, str(error).removeprefix(f"{one.key} ").removeprefix(f"{one.key}: "))
    at_once = cluster.trials_at_once(settings)
    for made in swept.check_points(settings, points):
        trainer.check(made, corpus)
        if made.training != settings.training or made.knowledge.pool != settings.knowledge.pool:
            at_once = min(at_once, cluster.trials_at_once(cluster.fitted(made)))
    return at_once


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
            self._journal.tell("result", trial=trial.trial_id, age=result[AGE], value=result[self._metric])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its end, or was stopped."""
        self._journal.tell("ended", trial=trial.trial_id, whole=bool(trial.last_result.get(DONE)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        self._journal.tell("failed", trial=trial.trial_id)


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

    def heed(self, event: Mapping[str, Any]) -> None:
        """Take in an event of :class:`Watch`."""
        trial, kind = event["trial"], event["kind"]
        if kind == "started":
            self._set(trial, event["point"], RUNNING, "")
            self._console.print(f"{trial} started: {name_of(event['point'])}", soft_wrap=True)
        elif kind == "result":
            self._console.print(
                f"  {trial} age {event['age']:>3}  {self._of.metric} {outcome.told(self._of.metric, event['value'])}"
            )
        elif kind == "reason":
            self._reasons[trial] = event["reason"]
        else:
            status = FAILED if kind == "failed" else FINISHED if event["whole"] else STOPPED
            self._end(trial, self.rows[trial]["point"], status)

    def settle(self, results: tune.ResultGrid) -> None:
        """Bring the rows in line with what Ray Tune holds at the end: a killed sweep may not have heard of everything."""
        for number in range(len(results)):
            result = results[number]
            trial, metrics = Path(result.path).name, result.metrics or {}
            row = self.rows.get(trial)
            if result.error is not None:
                status = FAILED
            elif metrics.get(DONE):
                status = FINISHED
            else:
                status = INTERRUPTED if row is None or row["status"] == RUNNING else row["status"]
            if row is None or row["status"] != status:
                self._end(trial, point_of(result.config or {}), status)

    def _end(self, trial: str, point: Point, status: str) -> None:
        reason = self._reasons.get(trial, PROCESS_DIED) if status == FAILED else ""
        row = self._set(trial, point, status, reason)
        value = "" if row["value"] is None else f": {self._of.metric} {outcome.spread(row, self._of.metric)}"
        self._console.print(f"{trial} [bold]{status}[/]{value}" + (f" ({reason})" if reason else ""), soft_wrap=True)
        self._record(row)
        if self._of.algorithm != "pbt":  # its trials take over the weights of others
            self.prune()

    def _set(self, trial: str, point: Point, status: str, reason: str) -> Row:
        self.rows[trial] = outcome.row_of(self.trials, trial, point, status, reason, self._of)
        self._folder.write_json("sweep.json", {"trials": list(self.rows.values())})
        return self.rows[trial]

    def _record(self, row: Row) -> None:
        """End the MLflow runs of a trial that cannot do so itself any more, and tell the sweep's run of the best so far."""
        status = {FINISHED: "FINISHED", STOPPED: "FINISHED", FAILED: "FAILED"}.get(row["status"], "KILLED")
        tags = {STATUS_TAG: row["status"], REASON_TAG: row["reason"]}
        for seed in self._of.seeds:
            self._recorder.end_other(run_folder(self.trials, row["trial"], seed), status, tags)
        best = outcome.best_of([*self.rows.values()], self._of.mode)
        ended = sum(one["status"] != RUNNING for one in self.rows.values())
        self._recorder.metrics({"trials_ended": ended} | ({self._of.metric: best["value"]} if best else {}), ended)

    def prune(self) -> None:
        """Remove weights and knowledge bases of trials that have ended, all but the best."""
        ended = [row for row in self.rows.values() if row["status"] in (FINISHED, STOPPED, FAILED)]
        best = [row for row in outcome.ranked(ended, self._of.mode) if row["status"] == FINISHED][: self._of.keep]
        kept = [run_folder(self.trials, row["trial"], seed).name for row in best for seed in self._of.seeds]
        for name in self.trials.names() if self.trials.exists() else []:
            if name not in kept and any(name.startswith(f"{row['trial']}-") for row in ended):
                prune(self.trials / name)


def prune(run: Folder) -> None:
    """Remove a run's checkpoints and knowledge base; its figures and pictures stay."""
    for name in run.names() if run.exists() else []:
        if name == "knowledge" or name.startswith("checkpoint_"):
            (run / name).delete()


class Watcher:
    """A thread that hands a journal's events to a board while a sweep runs."""

    def __init__(self, journal: Journal, board: Board) -> None:
        self._journal, self._board = journal, board
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        over, mark = False, START
        while not over:
            over = self._over.wait(POLL_SECONDS)
            new, mark = self._journal.read(mark)
            for event in new:
                self._board.heed(event)


def _tuner(plan: TrialPlan, swept: Space, points: list[Point], at_once: int, folder: Folder, journal: Journal) -> tune.Tuner:
    """Ray Tune's tuner: of a sweep that was broken off, the one that it left."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the runs keep their own records
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # progress is told by the board
    trainable = tune.with_resources(tune.with_parameters(train_trial, plan=plan), {"CPU": cluster.TRIAL_CPUS})
    filesystem, path = folder.resolve()
    if tune.Tuner.can_restore(f"{path}/tune", storage_filesystem=filesystem):
        return tune.Tuner.restore(f"{path}/tune", trainable, resume_unfinished=True, storage_filesystem=filesystem)
    return tune.Tuner(
        trainable,
        **search.config(plan.sweep, swept, points, at_once, plan.settings.training.epochs),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[Watch(journal, plan.sweep.metric)],
            verbose=0,
        ),
    )


def _finish(settings: Settings, of: SweepSettings, swept: Space, board: Board, folder: Folder, seconds: float) -> dict[str, Any]:
    """Write ``best.yaml``, the pictures and ``sweep.json``."""
    rows = outcome.ranked([*board.rows.values()], of.mode)
    best = outcome.best_of(rows, of.mode)
    if best is not None:
        told = [f"# {line}" for line in outcome.verdict(rows, of)]
        document = with_values(settings, best["point"]).to_yaml()
        folder.write("best.yaml", ("\n".join(told) + "\n" + document).encode())
    found = {
        "name": folder.name,
        "folder": str(folder),
        "sweep": of.model_dump(mode="json"),
        "swept": list(swept.keys),
        "best": best,
        "verdict": outcome.verdict(rows, of),
        "seconds": seconds,
        "pictures": pictures.draw(folder, swept, settings, rows, of),
        "trials": rows,
    }
    folder.write_json("sweep.json", found)
    return found


def _tell(
    console: Console, found: dict[str, Any], folder: Folder, swept: Space, of: SweepSettings, recorder: tracking.Recorder
) -> None:
    """The final table, the answer, and where everything is."""
    seeds = f", means over {len(of.seeds)} seeds" if len(of.seeds) > 1 else ""
    console.print(outcome.sheet(f"{folder.name}: best first{seeds}", found["trials"], swept.keys, of).rich())
    for row in found["trials"]:
        if row["reason"]:
            console.print(f"{row['trial']} {row['status']}: {row['reason']}", soft_wrap=True, markup=False)
    for line in found["verdict"]:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"Results   {folder / 'sweep.json'}", soft_wrap=True)
    console.print(f"Pictures  {', '.join(str(folder / 'pictures' / name) for name in found['pictures'])}", soft_wrap=True)
    if recorder.where:
        console.print(f"MLflow    {recorder.where}", soft_wrap=True)
    if found["best"]:
        console.print(f"Next      python jobs/train.py --config {folder / 'best.yaml'}", soft_wrap=True)
