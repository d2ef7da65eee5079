"""A whole sweep: check everything, run the trials with Ray Tune, keep the record live, end with an answer."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.execution import class_cache
from rich.console import Console
from rich.markup import escape

from ask_ray import cluster, experiment, lease, tracking
from ask_ray.config import RunSettings, Settings, SettingsError, SweepSettings, with_values
from ask_ray.data.corpus import Corpus
from ask_ray.journal import Follower, Journal
from ask_ray.storage import Folder
from ask_ray.tables import Sheet
from ask_ray.training import trainer
from ask_ray.training.forecast import Forecast, check_memory, forecast
from ask_ray.training.trainer import Towers
from ask_ray.tuning import outcome, pictures, search, space
from ask_ray.tuning.board import Board, Watch
from ask_ray.tuning.outcome import INTERRUPTED
from ask_ray.tuning.space import Point, Space, SpaceFile
from ask_ray.tuning.trial import TrialPlan, run_folder, schedule, train_trial

#: Settings of a sweep that may change when it is continued; of `at_once`, :func:`_check_same` tells more.
MAY_CHANGE = ("sweep.keep", "sweep.name", "at_once")

#: The environment's variable by which Ray finds a session.
ADDRESS = "RAY_ADDRESS"

#: Where Ray Tune keeps its own state.
TUNE = "tune"


def sweep(settings: Settings, of: SweepSettings, file: SpaceFile, console: Console | None = None) -> dict[str, Any]:
    """Do everything that `jobs/tune.py` promises.

    Returns:
        what ``sweep.json`` holds; of a dry run, what :func:`ask_ray.experiment.run` returns of one.

    Raises:
        SettingsError, StorageError, WeightsError: before the first trial, naming the line of the space or the field.
        KeyboardInterrupt: after Ctrl-C, when the record is written.
    """
    console = console or Console()
    checked = _checked(settings, of, file.space, console)
    if settings.run.dry_run:
        return experiment.tell_forecast(console, checked.settings, checked.takes)
    with lease.held(checked.folder, "sweep.name"):
        _begin(checked, of, console)
        return _driven(checked, of, console)


def _driven(checked: Checked, of: SweepSettings, console: Console) -> dict[str, Any]:
    """Run the trials to their end, and find the answer."""
    folder, settings, name = checked.folder, checked.settings, checked.folder.name
    started = time.time()
    with tracking.Recorder(settings, folder, {"sweep": name}) as recorder:
        board = Board(folder, of, recorder, console)
        journal, keeper = Journal.start(f"ask_ray-sweep-{name}")
        plan = TrialPlan(_everywhere(settings), of, folder / "trials", recorder.run_id, journal)
        with Follower(journal, board.heed), _addressed():
            results = _tuner(plan, checked, journal).fit()
        ray.kill(keeper)
        board.settle(results)
        board.prune()
        found, table = _finish(checked, of, board, time.time() - started, console)
        for picture in found["pictures"]:
            recorder.artifact(folder / "pictures", picture, "pictures")
        for kept in ("sweep.json", "sweep.md", *(["best.yaml"] if found["best"] else [])):
            recorder.artifact(folder, kept)
        _tell(console, found, table, folder, recorder)
        if len(board.rows) < search.count(of, checked.points) or INTERRUPTED in board.statuses():
            console.print(f"Interrupted: the same command with --sweep.name {name} goes on", soft_wrap=True)
            raise KeyboardInterrupt
        recorder.end("FINISHED")
    return found


@dataclass(frozen=True)
class Checked:
    """A sweep that can run: its space, the points that are known before it starts, the settings that all trials share, fitted to
    the cluster, its folder, whether it is there already, how many trials run at once, and what a run with the shared settings
    takes."""

    space: Space
    points: list[Point]
    settings: Settings
    folder: Folder
    continued: bool
    at_once: int
    takes: Forecast


def _checked(settings: Settings, of: SweepSettings, swept: Space, console: Console) -> Checked:
    """Everything that can be known to be wrong is, before the first trial; the corpus is prepared on the way."""
    search.check_metric(of)
    search.check_donors(of, settings)
    _check_own(settings)
    swept.check_bounds(settings)
    points = space.points_of(swept, of)
    tried = [settings, *swept.check_points(settings, points)]
    towers = _check_towers(tried)
    cluster.connect_for_sweep(settings, tried, search.wanted_at_once(of), search.stops(of))
    settings = _fitted(settings)
    storage = Folder.at(settings.run.storage)
    storage.check_writable("run.storage")
    folder = storage / (of.name or time.strftime(f"{Path(swept.file).stem}-%Y%m%d-%H%M%S"))
    begun = _check_same(folder, _told(swept, of, settings))
    _check_record(settings)
    corpus = experiment.prepared(settings, console)
    _check_points(swept, settings, points, corpus)
    room = _room(swept, settings, points, search.wanted_at_once(of))
    held = _held(swept, settings, points, lambda made: _takes(made, corpus, towers), room)
    if begun is None:
        at_once = search.at_once(of, points, min(room, held))
    else:
        at_once = _as_begun(folder, begun, search.at_once(of, points, room))
    return Checked(swept, points, settings, folder, begun is not None, at_once, _takes(settings, corpus, towers))


def _as_begun(folder: Folder, begun: int, room: int) -> int:
    """How many trials run at once in a sweep that goes on: as many as when it began, whatever memory is free at this moment.

    Raises:
        SettingsError: if CPUs and GPUs hold fewer.
    """
    if room < begun:
        raise SettingsError(
            f"sweep.name: {folder} was begun with {begun} trials at once, and here is room for {room} by CPUs and GPUs: continue "
            "it where there is as much room, or choose another sweep.name"
        )
    return begun


def _begin(checked: Checked, of: SweepSettings, console: Console) -> None:
    """Write down what the sweep is, and say that it starts."""
    if not checked.continued:
        told = {**_told(checked.space, of, checked.settings), "at_once": checked.at_once}
        checked.folder.write("space.yaml", yaml.safe_dump(told, sort_keys=False, allow_unicode=True).encode())
    trials = f"{search.count(of, checked.points)} trials x {len(of.seeds)} seeds, {checked.at_once} trials at once"
    begun = "Continuing" if checked.continued else "Starting"
    console.print(f"{begun} sweep [bold]{checked.folder.name}[/] in {checked.folder}: {trials}", soft_wrap=True)


def _check_own(settings: Settings) -> None:
    """Refuse what a sweep gives its trials itself.

    Raises:
        SettingsError: naming the setting, and what to set instead.
    """
    for setting, instead in (("name", "set sweep.name"), ("seed", "set sweep.seeds"), ("fork", "leave it unset")):
        if getattr(settings.run, setting) != RunSettings.model_fields[setting].default:
            raise SettingsError(f"run.{setting}: a sweep gives it to its trials itself; {instead}")


def _check_towers(tried: Iterable[Settings]) -> dict[str, Towers]:
    """The towers of all settings that could be tried, by what tells them apart; refused if they cannot be built."""
    return {told: trainer.check_towers(made) for told, made in {_towers(made): made for made in tried}.items()}


def _towers(settings: Settings) -> str:
    """What tells towers apart: the model, and where tokens meet how many a clip has."""
    longest = settings.data.max_seconds if settings.model.interaction == "late" else None
    return f"{settings.model!r} {longest}"


def _takes(settings: Settings, corpus: Corpus, towers: dict[str, Towers]) -> Forecast:
    """What a run takes with its own towers."""
    return forecast(settings, corpus, *towers[_towers(settings)])


def _fitted(settings: Settings) -> Settings:
    """The settings that all trials share, with every share of the cluster filled in for one trial.

    Raises:
        SettingsError: if a trial cannot be scheduled, with the sum; for an elastic run, whose share is no fixed one.
    """
    if settings.training.min_workers is not None:
        raise SettingsError("training.min_workers: the trials of a sweep have fixed shares; leave it unset")
    return cluster.fitted(with_values(settings, {"training.workers": cluster.workers_of_trial(settings)}))


def _check_record(settings: Settings) -> None:
    """Refuse a record that trials on several nodes would each write where they run.

    Raises:
        SettingsError: naming the setting.
    """
    by_default = settings.tracking.enabled and not settings.tracking.uri
    if by_default and cluster.several_nodes() and Folder.at(settings.run.storage).local is None:
        raise SettingsError(
            "tracking.uri: trials run on several nodes, and the default record is a file of each: name an MLflow server, or set "
            "tracking.enabled to false"
        )


def _everywhere(settings: Settings) -> Settings:
    """The settings of trials: they read the corpus and write the record of the sweep, wherever they run."""
    own = {"data.prepared": Folder.at(settings.data.prepared).uri}
    return with_values(settings, own | ({"tracking.uri": tracking.uri_of(settings)} if settings.tracking.enabled else {}))


def _told(swept: Space, of: SweepSettings, settings: Settings) -> dict[str, Any]:
    """What tells one sweep from another."""
    dimensions = {
        one.key: {one.kind: list(one.arguments), "when": {k: list(v) for k, v in one.when.items()}} for one in swept.dimensions
    }
    return {"space": dimensions, "sweep": of.model_dump(mode="json"), **settings.model_dump(mode="json")}


def _check_same(folder: Folder, new: dict[str, Any]) -> int | None:
    """How many trials at once the sweep was begun with, which is what Ray Tune goes on with; None if it is not there yet.

    Raises:
        SettingsError: if the name is that of a run, or of a sweep of another space or other settings, naming them.
    """
    if folder.exists("settings.yaml"):
        raise SettingsError(f"sweep.name: {folder} is a run; choose another sweep.name")
    if not folder.exists("space.yaml"):
        return None
    old = yaml.safe_load(folder.read("space.yaml"))
    if differing := experiment.differences(old, new, (*MAY_CHANGE, *experiment.MAY_CHANGE)):
        raise SettingsError(f"sweep.name: {folder} is another sweep: {differing}. Choose another sweep.name")
    return int(old["at_once"])


def _check_points(swept: Space, settings: Settings, points: list[Point], corpus: Corpus) -> None:
    """Check all that could be tried against the corpus.

    Raises:
        SettingsError: naming the line of a value that can work in no point, else the point.
    """
    if corpus.clips("validation") == 0:
        raise SettingsError("data: the validation split is empty, and a sweep compares trials on it: hold some clips out")
    _check_values(swept, settings, points, corpus)
    for point, made in zip(points, swept.check_points(settings, points), strict=True):
        try:
            search.check_reported(made)
            trainer.check(made, corpus)
        except SettingsError as error:
            if not str(error).startswith(swept.keys):  # of what all trials share
                raise
            raise swept.unfit(point, error) from error


def _room(swept: Space, settings: Settings, points: list[Point], wanted: int | None) -> int:
    """How many trials the CPUs and GPUs of the cluster hold at once, of those that take most.

    Raises:
        SettingsError: if it holds none, naming the point, but where the settings that all share are too large themselves.
    """
    room = {_share(settings): cluster.trials_at_once(settings, wanted)}
    for point, made in zip(points, swept.check_points(settings, points), strict=True):
        try:
            if _share(made) not in room:
                room[_share(made)] = cluster.trials_at_once(_fitted(made), wanted)
        except SettingsError as error:
            raise swept.unfit(point, error) from error
    return min(room.values())


def _held(swept: Space, settings: Settings, points: list[Point], takes: Callable[[Settings], Forecast], room: int) -> int:
    """How many trials, `room` at most, the memory of the nodes holds at once, of those that take most.

    Raises:
        SettingsError: if it holds none, naming the point, but where it takes what the settings that all share do.
    """
    shared, held = takes(settings), [room]
    for point, made in zip(points, swept.check_points(settings, points), strict=True):
        its, workers, memories = takes(made), trainer.workers_of(made), cluster.memories(made)
        try:
            check_memory(its, workers, memories)
        except SettingsError as error:
            if its == shared:
                raise
            raise swept.unfit(point, error) from error
        held.append(search.in_memory(its, workers, memories, room))
    return min(held)


def _check_values(swept: Space, settings: Settings, points: list[Point], corpus: Corpus) -> None:
    """Refuse values that cannot work with this corpus, whatever the other settings of a point are.

    Raises:
        SettingsError: naming the line.
    """
    for one in swept.dimensions:
        for value in one.values:
            problem = _problem(one.key, settings, swept.holding(one, value, points), corpus)
            if problem:
                swept.refuse(one, problem.removeprefix(f"{one.key} ").removeprefix(f"{one.key}: "))


def _problem(key: str, settings: Settings, points: list[Point], corpus: Corpus) -> str:
    """Why all of some points are refused for a setting; empty if one is not, or is for another."""
    found = ""
    for point in points:
        try:
            trainer.check(with_values(settings, point), corpus)
        except SettingsError as error:
            found = str(error)
        else:
            return ""
        if not found.startswith(key):
            return ""
    return found


def _share(settings: Settings) -> str:
    """What decides how much of a cluster a trial takes."""
    return f"{settings.ask.enabled} {settings.training!r} {settings.knowledge.pool!r}"


def _tuner(plan: TrialPlan, checked: Checked, journal: Journal) -> tune.Tuner:
    """Ray Tune's tuner: of a sweep that was broken off, the one that it left."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the runs keep their own records
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # progress is told by the board
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # how much of the search a kill can lose
    trainable = tune.with_resources(tune.with_parameters(train_trial, plan=plan), {"CPU": cluster.TRIAL_CPUS})
    filesystem, path = checked.folder.resolve()
    epochs = search.longest(plan.settings, checked.space)
    if _begun(checked.folder / TUNE):
        return tune.Tuner.restore(
            f"{path}/{TUNE}",
            trainable,
            resume_unfinished=True,
            resume_errored=True,  # what made a trial fail may have been the machine
            storage_filesystem=filesystem,
        )
    return tune.Tuner(
        trainable,
        **search.config(plan.sweep, checked.space, checked.points, checked.at_once, epochs),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[Watch(journal, plan.sweep.metric)],
            verbose=0,
        ),
    )


@contextlib.contextmanager
def _addressed() -> Iterator[None]:
    """Trials know this session's address, as long as the `with` lasts. What gives back the resources of a trial that was stopped
    asks for it, and where another session runs on the same machine it would find two, and keep them for ever (Ray 2.60)."""
    before = dict(os.environ)
    class_cache.ENV_VARS_TO_PROPAGATE.add(ADDRESS)
    os.environ[ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        os.environ |= {name: value for name, value in before.items() if name == ADDRESS}


def _begun(folder: Folder) -> bool:
    """Whether Ray Tune kept a state to go on from: it writes it a moment after what it looks for itself, and would take a sweep
    that was killed in between for another one, of a single trial."""
    return folder.exists() and any(name.startswith("experiment_state-") for name in folder.names())


def _finish(checked: Checked, of: SweepSettings, board: Board, seconds: float, console: Console) -> tuple[dict[str, Any], Sheet]:
    """Write ``best.yaml``, the pictures, ``sweep.json`` and ``sweep.md``; its table is the final one."""
    folder, swept = checked.folder, checked.space
    rows = outcome.ranked([*board.rows.values()], of.mode)
    best, answer = outcome.best_of(rows, of.mode), outcome.verdict(rows, of)
    if best is not None:
        told = "".join(f"# {line}\n" for line in [*answer, *_made(checked, of, best)])
        folder.write("best.yaml", (told + with_values(checked.settings, best["point"]).to_yaml()).encode())
    drawn = _drawn(checked, of, rows, console)
    found = {
        "name": folder.name,
        "folder": str(folder),
        "sweep": of.model_dump(mode="json"),
        "swept": list(swept.keys),
        "best": best,
        "verdict": answer,
        "seconds": seconds,
        "pictures": drawn,
        "trials": rows,
    }
    folder.write_json("sweep.json", found)
    seeds = f", means over {len(of.seeds)} seeds" if len(of.seeds) > 1 else ""
    table = outcome.sheet(f"{folder.name}: best first{seeds}", rows, swept.keys, of)
    folder.write("sweep.md", outcome.page(swept.about, answer, table, drawn).encode())
    return found, table


def _made(checked: Checked, of: SweepSettings, best: outcome.Row) -> list[str]:
    """How the best value was made, where one run with these settings does not make it again."""
    if of.algorithm != "pbt":
        return []
    run = run_folder(checked.folder / "trials", best["trial"], of.seeds[0])
    return [f"These are the settings of the last part alone. The value was made with {schedule(run, checked.space.keys)}."]


def _drawn(checked: Checked, of: SweepSettings, rows: list[outcome.Row], console: Console) -> list[str]:
    """The pictures; what goes wrong with them is told."""

    def tell(problem: str) -> None:
        console.print(f"[yellow]A picture could not be drawn[/]: {escape(problem)}", soft_wrap=True)

    return pictures.draw(checked.folder, checked.space, checked.settings, rows, of, tell)


def _tell(console: Console, found: dict[str, Any], table: Sheet, folder: Folder, recorder: tracking.Recorder) -> None:
    """The final table, the answer, and where everything is."""
    console.print(table.rich())
    for row in found["trials"]:
        if row["reason"]:
            console.print(f"{row['trial']} {row['status']}: {row['reason']}", soft_wrap=True, markup=False)
    for line in found["verdict"]:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"Results   {folder / 'sweep.md'}, {folder / 'sweep.json'}", soft_wrap=True)
    console.print(f"Pictures  {', '.join(str(folder / 'pictures' / name) for name in found['pictures'])}", soft_wrap=True)
    if recorder.where:
        console.print(f"MLflow    {recorder.where}", soft_wrap=True)
    if found["best"]:
        console.print(f"Next      python jobs/train.py --config {folder / 'best.yaml'}", soft_wrap=True)
