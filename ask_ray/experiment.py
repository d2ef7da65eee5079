"""A whole run, from settings to pictures: prepare, check, train beside the refiner, evaluate, record, report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import ray
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ask_ray import cluster, lease, report, tables, tracking
from ask_ray.config import RunSettings, Settings, SettingsError, flat
from ask_ray.data.corpus import Corpus
from ask_ray.data.prepare import prepare
from ask_ray.data.schema import HELD_OUT
from ask_ray.journal import Follower, Journal
from ask_ray.knowledge.cache import Cache
from ask_ray.knowledge.policy import Fixed, policy_of
from ask_ray.modality import THINGS
from ask_ray.storage import Folder, masked
from ask_ray.training import checkpoint, seen, trainer
from ask_ray.training.forecast import Forecast, check_memory, forecast, gpu_room, told_of_gpu
from ask_ray.training.seen import Seen
from ask_ray.training.trainer import RunPlace

Listener = Callable[[dict[str, Any]], None]

#: Clips that are named when a corpus was prepared, of those that an evaluation split has too; the data card names more.
SHOWN_LEAKS = 5

#: Kinds of events that the history is saved with: a sweep may stop its trial at any evaluation, and counts what was saved.
SAVED_AT = ("epoch", "published", "validated", "not validated")

#: Settings that may change when a run is continued: they say where and how, not what.
MAY_CHANGE = (
    "run.worker_logs",
    "run.dry_run",
    "tracking",
    "training.workers",
    "training.min_workers",
    "training.resize_seconds",
    "training.node_resource",
    "training.upload",
    "training.preemption_steps",
    "training.evaluation",
    "training.cpus_per_worker",
    "training.gpus_per_worker",
    "training.device",
    "training.max_failures",
    "knowledge.pool",
    "knowledge.cache",
    "run.storage",
    "data.prepared",
)


def run(
    settings: Settings,
    console: Console | None = None,
    listen: Listener = lambda event: None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Do everything that `jobs/train.py` promises.

    Args:
        console: where progress is told.
        listen: called with every event of the run's journal, from a thread of its own.
        tags: of the run's record in MLflow.

    Returns:
        what ``result.json`` holds; of a dry run, its :class:`~ask_ray.training.forecast.Forecast`.

    Raises:
        SettingsError, StorageError, WeightsError: before training starts, naming the field, file or row.
        TrainingFailed: if training fails more often than allowed; what was saved stays.
    """
    console = console or Console()
    settings = _named(settings)
    towers = trainer.check_towers(settings)
    cluster.connect(settings)
    settings = cluster.fitted(settings)
    place = RunPlace(Folder.at(settings.run.storage), str(settings.run.name))
    place.storage.check_writable("run.storage")
    if place.storage.local is None:
        Folder(str(Cache.of(settings.knowledge).root)).check_writable("knowledge.cache")
    continued = _check_same(settings, place)
    _check_fork(settings, place)
    corpus = prepared(settings, console)
    trainer.check(settings, corpus)
    _tell_untested(console, settings, corpus)
    _tell_seen(console, settings, corpus)
    takes = forecast(settings, corpus, *towers)
    check_memory(takes, trainer.workers_of(settings), cluster.memories(settings))
    _tell_unrefreshed(console, settings, takes.steps_per_epoch)
    if settings.run.dry_run:
        return {"name": place.name, **tell_forecast(console, settings, takes)}
    with lease.held(place.folder, "run.name"):
        place.folder.write("settings.yaml", settings.to_yaml().encode())
        console.print(f"{'Continuing' if continued else 'Starting'} run [bold]{place.name}[/] in {place.folder}")
        return _driven(settings, place, corpus, console, listen, tags)


def _driven(
    settings: Settings, place: RunPlace, corpus: Corpus, console: Console, listen: Listener, tags: Mapping[str, str] | None
) -> dict[str, Any]:
    """Train, record and report, when all is checked."""
    journal, keeper = Journal.start()
    started = time.time()
    with tracking.Recorder(settings, place.folder, tags) as recorder:
        with Monitor(settings, journal, place.folder, recorder, console, listen) as seen:
            outcome = trainer.train(settings, corpus, place, journal)
        ray.kill(keeper)
        result = _result(settings, place, seen.events, trainer.final_facts(outcome), time.time() - started)
        place.folder.write_json("result.json", result)
        pictures = report.draw(place.folder, seen.events, result)
        recorder.finish(result, pictures)
    _tell(console, result, place, pictures, recorder)
    if missing := _unevaluated(settings, corpus, seen.events):
        console.print(f"[red]Not evaluated[/]: epochs {missing}; {_why_unevaluated(settings)}")
    return result


def _unevaluated(settings: Settings, corpus: Corpus, events: list[dict[str, Any]]) -> list[int]:
    """Epochs that were to be evaluated and of which no figures came. Those before a fork began are the other run's."""
    if corpus.clips("validation") == 0:
        return []
    begun = next((event["epoch"] for event in events if event["kind"] == "began"), 0)
    due = [epoch for epoch in range(begun + 1, settings.training.epochs + 1) if settings.training.evaluates(epoch)]
    return sorted({*due} - {event["epoch"] for event in report.validations(events)})


def _why_unevaluated(settings: Settings) -> str:
    """What keeps figures away, by who evaluates."""
    if settings.training.evaluates_beside:
        return "their evaluation beside training failed or took longer than training.evaluation_timeout_seconds"
    return "the workers evaluated them, and the run broke off, or lost its journal, before their figures were saved"


def _named(settings: Settings) -> Settings:
    """Settings whose run has a name."""
    if settings.run.name is not None:
        return settings
    name = time.strftime(f"{settings.data.corpus}-%Y%m%d-%H%M%S")
    return settings.model_copy(update={"run": RunSettings(**{**settings.run.model_dump(), "name": name})})


def _check_same(settings: Settings, place: RunPlace) -> bool:
    """Whether the run exists already.

    Raises:
        SettingsError: if it was made with other settings, naming them.
    """
    if not place.folder.exists("settings.yaml"):
        return False
    old = yaml.safe_load(place.folder.read("settings.yaml"))
    if differing := differences(old, settings.model_dump(mode="json"), MAY_CHANGE):
        raise SettingsError(
            f"run.name: {place.folder} was made with other settings: {differing}. Choose another run.name, or continue it "
            f"with --config {place.folder / 'settings.yaml'}"
        )
    return True


def differences(old: dict[str, Any], new: dict[str, Any], may_change: tuple[str, ...]) -> str:
    """What differs between two trees of settings, in words; empty if nothing does but what may."""
    there, here = flat(old), flat(new)
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key) and not key.startswith(may_change)]
    return masked(", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in keys))


def _check_fork(settings: Settings, place: RunPlace) -> None:
    """Refuse to begin from a run that cannot be taken up. A run with a checkpoint of its own goes on from that.

    Raises:
        SettingsError, CheckpointError: naming what is in the way.
    """
    fork = settings.run.fork
    if fork is None or checkpoint.has_any(place.folder):
        return
    with checkpoint.newest(Folder.at(fork), settings.training.epochs) as folder:
        there = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    if differing := differences({"model": there["model"]}, {"model": settings.model.model_dump(mode="json")}, ()):
        raise SettingsError(f"run.fork: the model of {masked(fork)} is another: {differing}")


def prepared(settings: Settings, console: Console) -> Corpus:
    """The prepared corpus, made with a progress bar if it is not there yet, and a line on what was set aside."""
    with Progress(TextColumn("Preparing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=None)
        corpus = prepare(settings.data, lambda done, total: bar.update(task, completed=done, total=total))
        count = sum(corpus.clips(split) for split in corpus.manifest["splits"])
        bar.update(task, completed=count, total=count)
    counts = ", ".join(f"{corpus.clips(split)} {split}" for split in corpus.manifest["splits"])
    rejected = corpus.rejected()
    aside = f"{sum(rejected.values())} set aside {rejected}, see {corpus.folder / 'rejected'}" if rejected else "none set aside"
    console.print(f"Corpus {corpus.folder}: {counts} {THINGS[corpus.form.modality]}; {aside}")
    return corpus


def prepare_only(settings: Settings, console: Console | None = None) -> Corpus:
    """What `jobs/prepare.py` promises: the prepared corpus, a table of its splits, and what was set aside and why."""
    console = console or Console()
    cluster.connect(settings)
    corpus = prepared(settings, console)
    table = Table(title=Text(str(corpus.folder)))
    audio = corpus.form.modality == "audio"
    for heading in ("split", THINGS[corpus.form.modality], "captions", *(["hours"] if audio else [])):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, of in corpus.manifest["splits"].items():
        hours = [f"{of['seconds'] / 3600:.2f}"] if audio else []
        table.add_row(split, str(of["clips"]), str(of["captions"]), *hours)
    console.print(table)
    for reason, count in corpus.rejected().items():
        console.print(f"set aside: {count} {reason}")
    for leak in corpus.manifest["leaks"][:SHOWN_LEAKS]:
        console.print(f"kept out of training: {leak['id']} ({leak['reason']}: {leak['detail']})", markup=False, soft_wrap=True)
    console.print(f"Data card {corpus.folder / 'card.md'}", soft_wrap=True)
    console.print("Next      python jobs/train.py with the same --data settings", soft_wrap=True)
    return corpus


class Monitor:
    """Reads the journal while training runs: shows progress, keeps the run's history, feeds the record."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        folder: Folder,
        recorder: tracking.Recorder,
        console: Console,
        listen: Listener,
    ) -> None:
        self._settings, self._folder = settings, folder
        self._recorder, self._console, self._listen = recorder, console, listen
        self.events: list[dict[str, Any]] = folder.read_json("history.json") if folder.exists("history.json") else []
        self._unsaved = False
        self._told: set[tuple[str, int, int | None]] = set()
        self._follower = Follower(journal, self._heed)

    def __enter__(self) -> Monitor:
        self._follower.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self._follower.__exit__(*problem)

    def _heed(self, new: list[dict[str, Any]], over: bool) -> None:
        self.events += new
        for event in new:
            self._show(event)
            self._recorder.record(event)
        self._unsaved |= over or any(event["kind"] in SAVED_AT for event in new)
        if self._unsaved:
            self._save()
        for event in new:  # who listens may stop the run: what it was told is saved
            self._listen(event)

    def _save(self) -> None:
        """Write the history. Storage that is away for now is tried again with the next events."""
        try:
            self._folder.write_json("history.json", self.events)
            self._unsaved = False
        except OSError as error:
            self._console.print(f"  [yellow]history.json is not saved yet[/]: {escape(str(error))}")

    def _show(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "epoch":
            self._console.print(self._epoch_line(event))
        elif kind == "validated":
            self._console.print("  ".join([f"  epoch {event['epoch']} evaluated", *self._recalls(event)]))
        elif kind == "not validated":
            self._console.print(f"  [red]an evaluation beside training failed[/]: {escape(event['problem'])}")
        elif kind == "published":
            self._console.print(
                f"  knowledge base v{event['version']}: {event['entries']} entries by step {event['encoder_step']}, encoded in "
                f"{event['encode_seconds']:.1f} s, built in {event['build_seconds']:.1f} s ({escape(event['reason'])})"
            )
        elif kind == "swapped" and event["rank"] == 0:
            self._console.print(
                f"  swapped to v{event['version']} at step {event['step']}, {event['lag_steps']} steps after its weights"
            )
        elif kind == "diverged" and event["rank"] == 0:
            self._console.print(f"  [red]training diverged[/]: {escape(event['problem'])}")
        elif kind in ("failed", "refused"):
            self._console.print(f"  [red]knowledge base v{event['version']} {kind}[/]: {escape(event['problem'])}")
        elif kind in ("unreadable", "not published") and self._is_first(event):
            self._console.print(f"  [yellow]knowledge base v{event['version']} {kind} yet[/]: {escape(event['problem'])}")

    def _is_first(self, event: dict[str, Any]) -> bool:
        """Whether nothing was told yet of what is tried again and again: of the same version, by the same process."""
        what = (event["kind"], event["version"], event.get("rank"))
        known = what in self._told
        self._told.add(what)
        return not known

    def _epoch_line(self, event: dict[str, Any]) -> str:
        parts = [f"epoch {event['epoch']:>3}/{self._settings.training.epochs}", f"loss {event['loss']:.3f}"]
        parts.append(f"τ {event['temperature']:.3f}")
        for key, label in (("rdm_audio", "RDM"), ("consistency", "consistency")):
            if key in event:
                parts.append(f"{label} {event[key]:.3f}")
        things = THINGS[self._settings.data.modality]
        return "  ".join([*parts, *self._recalls(event), f"{event['clips_per_second']:.0f} {things}/s"])

    def _recalls(self, event: dict[str, Any]) -> list[str]:
        """The parts of a progress line that tell an evaluation's figures, none if the event has none."""
        letter = self._settings.data.modality[0]
        labels = (("t2a_r1", f"val R@1 t2{letter}"), ("a2t_r1", f"{letter}2t"))
        return [f"{label} {event[key]:.3f}" for key, label in labels if key in event]


def _result(
    settings: Settings, place: RunPlace, events: list[dict[str, Any]], facts: dict[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "name": place.name,
        "folder": str(place.folder),
        "modality": settings.data.modality,
        "final": facts.get("final", {}),
        "final_injected": facts.get("final_injected", {}),
        "refreshes": report.refreshes(events),
        "seconds": seconds,
        "training_seconds": facts.get("training_seconds"),
        "steps_per_second": facts.get("steps_per_second"),
        "steps": facts.get("steps"),
        "epochs": facts.get("epochs"),
        "knowledge_version": facts.get("knowledge_version"),
        "world_size": facts.get("world_size"),
        "device": facts.get("device"),
        "seed": settings.run.seed,
    }


def _tell_untested(console: Console, settings: Settings, corpus: Corpus) -> None:
    """Say, before training, that there is no test split to evaluate on at the end, and how to get one."""
    if corpus.clips("test"):
        return
    name = settings.data.corpus
    own = hasattr(getattr(settings.data, name), "test")
    how = f"hold clips out with data.{name}.test" if own else "add its list"
    console.print(
        f"[yellow]No test split[/]: {corpus.folder} has none, and the run will end without test figures; {how}, or evaluate the "
        "run on another corpus",
        soft_wrap=True,
    )


def _tell_seen(console: Console, settings: Settings, corpus: Corpus) -> None:
    """Say, before training, what of the evaluation splits the weights of a run that is forked may know already."""
    for told in _seen_before(seen.before_run(settings, corpus.folder.uri), corpus):
        console.print(f"[red]Figures may be too high[/]: run.fork: {escape(told)}", soft_wrap=True)


def _seen_before(before: Seen, corpus: Corpus) -> Iterator[str]:
    things, read = THINGS[corpus.form.modality], "trained on, or in the knowledge base, before the fork"
    for split in HELD_OUT:
        if clips := before.clips(corpus, split):
            yield (
                f"{len(clips)} of the {corpus.clips(split)} {split} {things}, such as {clips[0]!r}, were {read} (same id, source "
                f"id or samples). Fork a run whose corpora were prepared with --data.held_out '[{corpus.folder}]'"
            )
        for other in before.cut_otherwise(corpus, split):
            yield (
                f"{other.folder} keeps {other.form.seconds:g} s of a recording and {corpus.folder} {corpus.form.seconds:g} s: "
                f"that {split} {things} were {read}, only an id or source id tells"
            )
    yield from (f"whether {things} were {read}, could not be checked: {problem}" for problem in before.gone)


def _tell_unrefreshed(console: Console, settings: Settings, steps_per_epoch: int) -> None:
    """Say, before training, that T is so long that no refresh falls within it."""
    refresh, epochs = settings.knowledge.refresh, settings.training.epochs
    policy = policy_of(refresh, steps_per_epoch)
    if settings.ask.enabled and isinstance(policy, Fixed) and policy.first + policy.interval >= epochs * steps_per_epoch:
        console.print(
            f"[yellow]No refresh[/]: knowledge.refresh.interval ({refresh.interval:g} {refresh.unit}) after warmup_epochs "
            f"({refresh.warmup_epochs:g}) is past the end of training (training.epochs {epochs}), and the knowledge base stays "
            "as it is first built",
            soft_wrap=True,
        )


def tell_forecast(console: Console, settings: Settings, takes: Forecast) -> dict[str, Any]:
    """What a dry run ends with, told and returned."""
    training, refresh, modality = settings.training, settings.knowledge.refresh, settings.data.modality
    table = Table(title="What the run would take: nothing was trained", show_header=False)
    table.add_row("workers", f"{training.workers} on {training.device}, {training.batch_size} pairs each a step")
    table.add_row(
        "steps", f"{takes.steps:,} ({training.epochs} epochs of {takes.steps_per_epoch:,}, {takes.clips:,} {THINGS[modality]})"
    )
    table.add_row("parameters", f"{takes.parameters:,} ({settings.model.tower(modality)} + {settings.model.text})")
    if settings.ask.enabled:
        table.add_row("knowledge base", f"{takes.entries:,} entries of {settings.model.dim} numbers, refreshed {refresh.policy}")
    table.add_row(
        "memory", f"{takes.worker_bytes / 2**30:.2f} GiB a worker, {takes.node_bytes / 2**30:.2f} a node; and activations"
    )
    if room := gpu_room(settings):
        table.add_row("GPU memory", told_of_gpu(takes.parameters, room))
    console.print(table)
    console.print("Next      the same command without --run.dry_run", soft_wrap=True)
    return {"dry_run": True, **asdict(takes)}


def _tell(console: Console, result: dict[str, Any], place: RunPlace, pictures: list[str], recorder: tracking.Recorder) -> None:
    """The final table, and where everything is."""
    folder = shlex.quote(str(place.folder))
    if result["final"]:
        figures = {"": result["final"], ", injected": result["final_injected"]}
        console.print(tables.retrieval(f"{place.name}: retrieval on the test split", figures, result["modality"]).rich())
    else:
        console.print(
            f"No test figures: the corpus has no test split. python jobs/evaluate.py {folder} --corpus PREPARED evaluates on "
            "another corpus",
            soft_wrap=True,
        )
    console.print(
        f"{result['steps']} steps in {result['training_seconds']:.0f} s ({result['steps_per_second']:.2f} steps/s), "
        f"{len(result['refreshes'])} knowledge-base versions swapped in, {result['seconds']:.0f} s in all"
    )
    console.print(f"Results   {place.folder / 'result.json'}")
    console.print(f"Pictures  {', '.join(pictures)}")
    if recorder.where:
        console.print(f"MLflow    {recorder.where}")
    query = "a dog barks" if result["modality"] == "audio" else "a dog on a beach"
    console.print(f'Next      python jobs/search.py --run {folder} "{query}"', soft_wrap=True)
