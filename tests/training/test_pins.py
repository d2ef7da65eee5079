"""Pins as a real refiner prunes by them: nothing is lost that a checkpoint names, and no step waits for storage."""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.actor import ActorHandle

from ask_ray.config import KnowledgeSettings, ModelSettings, PoolSettings
from ask_ray.journal import Journal
from ask_ray.knowledge import snapshot
from ask_ray.knowledge.encoding import EncodingPlan
from ask_ray.knowledge.refiner import Refiner, RefreshPlan
from ask_ray.storage import Folder
from ask_ray.training.pins import Pins


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@dataclass
class Bench:
    """A refiner that keeps the newest of the versions 1 to 4 and those that are pinned, and the folder of a run."""

    home: Folder
    run: Folder
    refiner: ActorHandle
    journal: Journal

    def versions(self) -> list[int]:
        """The versions that are left when the refiner has done all that it was told so far."""
        ray.get(self.refiner.next_after.remote(99, 0.0))
        return snapshot.versions(self.home)

    def renewed(self, pins: Pins, version: int | None) -> Callable[[], list[int]]:
        """A function that looks anew, and gives the versions that are left."""

        def versions() -> list[int]:
            pins.renew(version)
            return self.versions()

        return versions

    def not_listed(self) -> bool:
        """Whether a look at storage that was away was told."""
        return any(event["kind"] == "not listed" for event in self.journal.events())

    def checkpoint(self, name: str, version: int) -> None:
        (self.run / f"checkpoint_{name}").write_json("state.json", {"place": {"knowledge_version": version}})


@pytest.fixture
def bench(ray_session: None, tmp_path: Path) -> Iterator[Bench]:
    home = Folder.at(str(tmp_path / "knowledge"))
    for version in range(1, 5):
        (home / f"v{version:06d}").write_json("manifest.json", {})
    journal, keeper = Journal.start()
    plan = EncodingPlan((), 1, 1.0, ModelSettings(), PoolSettings())
    refiner = Refiner.remote(RefreshPlan(home, "run", plan, KnowledgeSettings(keep=1), 0, 0), journal)
    ray.get(refiner.start_from.remote(4))
    yield Bench(home, Folder.at(str(tmp_path / "run")), refiner, journal)
    ray.kill(refiner)
    ray.kill(keeper)


def test_nothing_is_pruned_before_the_checkpoints_of_an_earlier_life_were_listed(bench):
    Path(bench.run.uri).write_bytes(b"")  # a file where the run's folder should be: it cannot be listed
    pins = Pins(bench.run, bench.refiner, bench.journal, kept=2)
    pins.renew(3)
    wait_for(bench.not_listed)
    assert bench.versions() == [1, 2, 3, 4]
    Path(bench.run.uri).unlink()
    bench.checkpoint("old", 1)
    left = bench.renewed(pins, None)
    wait_for(lambda: left() == [1, 3, 4])


def test_what_was_found_stays_pinned_while_the_checkpoints_cannot_be_listed(bench):
    bench.checkpoint("old", 1)
    pins = Pins(bench.run, bench.refiner, bench.journal, kept=2)
    pins.renew(None)
    wait_for(lambda: bench.versions() == [1, 4])
    (bench.run / "checkpoint_old").delete()
    Path(bench.run.uri).rmdir()
    Path(bench.run.uri).write_bytes(b"")
    left = bench.renewed(pins, 0)
    wait_for(lambda: left() == [1, 4] and bench.not_listed())
    assert left() == [1, 4]


def test_epochs_that_save_no_checkpoint_push_none_out(bench):
    pins = Pins(bench.run, bench.refiner, bench.journal, kept=1)
    for version in (2, None, None, None):  # the checkpoint is still on its way to storage
        pins.renew(version)
        wait_for(lambda: bench.versions() == [2, 4])


def test_no_step_waits_for_storage(bench, s3, tmp_path):
    run = Folder.at(s3.uri(f"bucket/{tmp_path.name}/run"))
    (run / "checkpoint_a").write_json("state.json", {"place": {"knowledge_version": 2}})
    pins = Pins(run, bench.refiner, bench.journal, kept=1)
    s3.process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        pins.renew(3)
        pins.renew(3)
        assert time.monotonic() - started < 1
    finally:
        s3.process.send_signal(signal.SIGCONT)
    left = bench.renewed(pins, None)
    wait_for(lambda: left() == [2, 3, 4])
