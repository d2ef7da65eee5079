"""A run under sabotage: real processes of a real Ray session, ended, stopped or starved while it trains."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from rich.console import Console

from ask_ray import experiment
from ask_ray.config import Settings, load
from ask_ray.journal import Journal
from ask_ray.storage import Folder
from ask_ray.training.checkpoint import PREFIX

Event = dict[str, Any]
Found = TypeVar("Found")

#: Where Ray Train writes down the checkpoints that it goes on from, in a run's folder.
KNOWN = "checkpoint_manager_snapshot.json"

POOL, REFINER, REFRESH, WORKER = "ray::MapWorker(MapBatches(Encoder))", "ray::Refiner", "ray::refresh", "ray::RayTrainWorker"

EPOCHS, STEPS, ENTRIES = 8, 64, 1024

#: Seconds in which whatever is waited for comes, also on a machine that has much else to do.
PATIENCE = 300.0


def settings_of(home: Path, name: str, storage: str | None = None, epochs: int = EPOCHS, **refresh: Any) -> Settings:
    """Two workers, 512 steps, a refresh every other epoch beside training."""
    return load(
        {
            "run": {"storage": storage or str(home / "runs"), "name": name},
            "data": {
                "prepared": str(home / "prepared"),
                "soundscapes": {"train": ENTRIES, "validation": 0, "test": 48, "seconds": 1.5, "captions": 2},
            },
            "model": {"dim": 32, "width": 0.25},
            "ask": {"prototypes": 16},
            "knowledge": {
                "cache": str(home / "cache"),
                "drift_probe": 0,
                "refresh": {"interval": 2, "poll_steps": 1, "warmup_epochs": 0.5, "backoff_seconds": 0.2, **refresh},
            },
            "training": {"epochs": epochs, "batch_size": 8, "workers": 2, "evaluate_every": 0},
            "tracking": {"enabled": False},
        }
    )


@dataclass
class Watch:
    """What a saboteur sees of a run: its events as they come, and its processes."""

    settings: Settings
    folder: Folder
    started: float = field(default_factory=time.time)

    def events(self, kind: str) -> list[Event]:
        """The run's events of a kind so far."""
        names = [name for name in ray.util.list_named_actors() if name.startswith("ask_ray-journal-")]
        told = [event for name in names for event in Journal(name).events()]
        return [event for event in told if event["kind"] == kind and event["time"] >= self.started]

    def wait(self, kind: str, seconds: float = PATIENCE, **fields: Any) -> Event:
        """The first event of a kind with these fields, as soon as it comes."""

        def found() -> Event | None:
            return next((one for one in self.events(kind) if fields.items() <= one.items()), None)

        return until(found, seconds, f"{kind} {fields}")

    def restarted(self) -> dict[int, int]:
        """The checkpoints that the workers may have gone on from, as soon as they have begun again."""
        until(lambda: len(self.events("began")) > 1, PATIENCE, "a restart")
        return checkpoints(self.folder)

    def processes(self, title: str) -> list[psutil.Process]:
        """The processes of this session with a title, as soon as there are any; the youngest first."""

        return until(lambda: running(title), PATIENCE, title)


def checkpoints(run: Folder) -> dict[int, int]:
    """The checkpoints that Ray Train knows of: the version that each names, by its step; none before the first."""
    known = run.read(KNOWN).decode() if run.exists(KNOWN) else ""
    found = {}
    for name in run.names():
        if name.startswith(PREFIX) and name in known:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                place = (run / name).read_json("state.json")["place"]
                found[place["step"]] = place["knowledge_version"]
    return found


def running(title: str) -> list[psutil.Process]:
    """The processes of these tests with a title, the youngest first."""
    made = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                made.append(process)
        except psutil.Error:
            continue
    return sorted(made, key=lambda process: -process.create_time())


def until(look: Callable[[], Found | None], seconds: float, what: str) -> Found:
    """What `look` finds, as soon as it does."""
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """A process that hangs meanwhile, and is ended afterwards if nobody else did."""
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass
class Outcome:
    """What a run did under a fault.

    still: seconds that training stood still, the longest gap between told steps beyond the usual one; repeated: steps taken
    again after restarts, as far as they were told: after the newest told, each restart may have lost `STEPS_TOLD` - 1 more.
    """

    result: dict[str, Any]
    events: list[Event]

    def of(self, kind: str) -> list[Event]:
        """The run's events of a kind."""
        return [event for event in self.events if event["kind"] == kind]

    @property
    def still(self) -> float:
        times = sorted(event["time"] for event in self.events if event["kind"] in ("step", "epoch"))
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return max(0.0, max(gaps) - statistics.median(gaps))

    @property
    def repeated(self) -> int:
        lost = 0
        for begun in self.of("began")[1:]:
            steps = [event["step"] + 1 for event in self.of("step") if event["time"] < begun["time"]]
            epochs = [event["step"] for event in self.of("epoch") if event["time"] < begun["time"]]
            lost += max(0, max(steps + epochs, default=0) - begun["step"])
        return lost

    def opened(self, begun: Event) -> int:
        """The version that rank 0 read from in the first step that it told of after it began: no refresh is in by then."""
        return next(event["version"] for event in self.of("step") if event["time"] > begun["time"])


def run_under(settings: Settings, harm: Callable[[Watch], None]) -> Outcome:
    """Run to the end while `harm` works in a thread of its own; what goes wrong in it fails the test."""
    watch = Watch(settings, Folder.at(settings.run.storage) / str(settings.run.name))
    problems: list[BaseException] = []

    def work() -> None:
        try:
            harm(watch)
        except BaseException as problem:
            problems.append(problem)

    saboteur = threading.Thread(target=work, daemon=True)
    saboteur.start()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        result = experiment.run(settings, Console(file=nowhere))
    saboteur.join(10)
    assert not problems, problems
    assert not saboteur.is_alive(), "the run ended before the fault"
    return Outcome(result, watch.folder.read_json("history.json"))


def check_whole(outcome: Outcome, epochs: int = EPOCHS, untold: int = 0) -> None:
    """The run came to its end with the right number of steps, epochs and entries, and a knowledge base by its final weights.

    untold: an epoch whose event may have died with the driver before it was written down.
    """
    result = outcome.result
    assert (result["steps"], result["epochs"]) == (epochs * STEPS, epochs)
    assert {event["epoch"] for event in outcome.of("epoch")} | {untold} >= set(range(1, epochs + 1))
    assert all(row["entries"] == ENTRIES for row in result["refreshes"])
    assert result["refreshes"][-1]["encoder_step"] == epochs * STEPS
    assert result["knowledge_version"] == result["refreshes"][-1]["version"]
    assert all(of["n"] == 48 for of in result["final"].values())


def check_restart(outcome: Outcome, before: dict[int, int], there: dict[int, int]) -> None:
    """The workers went on from a checkpoint, none older than those known before the fault, with the version that it names.

    before, there: the versions that the checkpoints named before the fault, and when the workers began again, by their steps.
    """
    begun = outcome.of("began")[-1]
    assert begun["step"] >= max(before) > 0
    assert outcome.opened(begun) == there[begun["step"]]
