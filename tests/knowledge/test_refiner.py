"""Refreshes by a real refiner, its real tasks and pool: published, retried, superseded, given up, pruned, restarted."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from ask_ray.config import DataSettings, KnowledgeSettings, ModelSettings, PoolSettings, RefreshSettings, SoundscapeSettings
from ask_ray.data import prepare
from ask_ray.data.corpora import source_of
from ask_ray.journal import Journal
from ask_ray.knowledge import snapshot
from ask_ray.knowledge.encoding import EncodingPlan
from ask_ray.knowledge.refiner import Refiner, RefreshPlan
from ask_ray.knowledge.replica import Replica
from ask_ray.models import registry
from ask_ray.storage import Folder

RATE, RUN, CLIPS = 8000, "run", 10
MODEL = ModelSettings(width=0.1, dim=16)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("prepared")
    scenes = SoundscapeSettings(train=CLIPS, validation=0, test=1, seconds=1, captions=2)
    data = DataSettings(prepared=str(home), sample_rate=RATE, shard_clips=6, soundscapes=scenes)
    source, folder = source_of(data), Folder.at(str(home / "corpus"))
    prepare._write_manifest(data, folder, source, [prepare.write_shard(source, shard, folder) for shard in source.shards()])
    return str(folder)


@pytest.fixture(scope="module")
def weights(ray_session) -> dict[str, ray.ObjectRef]:
    torch.manual_seed(0)
    good = registry.build(MODEL, RATE).state_dict()
    broken = {name: torch.full_like(value, torch.nan) for name, value in good.items()}
    return {"good": ray.put(good), "broken": ray.put(broken)}


class Bench:
    """A refiner with its journal and the places it writes to."""

    def __init__(self, home: Folder, corpus: str, weights: dict[str, ray.ObjectRef], **refresh: Any) -> None:
        knowledge = KnowledgeSettings(
            keep=1,
            pool=PoolSettings(cpus=0.5, batch_size=8),
            refresh=RefreshSettings(**{"attempts": 2, "backoff_seconds": 0.3, **refresh}),
        )
        source = EncodingPlan(corpus, "train", 1, 10.0, MODEL, knowledge.pool)
        self.home, self.weights = home, weights
        self.journal, self.keeper = Journal.start()
        self.refiner = Refiner.remote(RefreshPlan(home, RUN, source, knowledge, 3, 0), self.journal)

    def request(self, step: int, kind: str = "good", reason: str = "a test") -> int:
        return ray.get(self.refiner.request.remote(step, reason, [self.weights[kind]]))

    def settled(self, ticket: int, seconds: float = 60.0) -> tuple[bool, int | None]:
        return ray.get(self.refiner.settled.remote(ticket, seconds))

    def next_after(self, version: int) -> int | None:
        return ray.get(self.refiner.next_after.remote(version, 0.0))

    def call(self, name: str, *arguments: Any) -> None:
        ray.get(getattr(self.refiner, name).remote(*arguments))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.journal.since(0) if event["kind"] == kind]

    def outcome(self, ticket: int) -> str:
        return wait_for(lambda: [event["outcome"] for event in self.events("settled") if event["ticket"] == ticket])[0]

    def close(self) -> None:
        ray.kill(self.refiner)
        ray.kill(self.keeper)


@pytest.fixture
def bench(ray_session, tmp_path: Path, corpus, weights) -> Iterator[Bench]:
    made = Bench(Folder.at(str(tmp_path / "knowledge")), corpus, weights)
    yield made
    made.close()


def unfinished(home: Folder, version: int) -> None:
    (home / f"v{version:06d}").write("audio.npy", b"half")


def test_a_refresh_from_request_to_swap_then_pruning_taking_back_and_restarting(bench):
    """One story, because each refresh costs seconds."""
    unfinished(bench.home, 1)  # of an earlier try: it gives way
    replica = Replica(bench.refiner, bench.home, RUN, MODEL.dim, torch.device("cpu"), bench.journal, rank=0)
    bench.call("start_from", 0)
    replica.start(0)
    assert bench.next_after(0) is None

    # Three at once: the first is under way, the newest of the others wins.
    tickets = [bench.request(step) for step in (5, 6, 7)]
    assert tickets == [1, 2, 3]
    assert bench.settled(2, 0.0) == (True, None)
    assert bench.outcome(2) == "superseded by newer weights"
    assert bench.settled(1) == (True, 1)
    replica.wait_until_seen(1, 20)
    replica.swap(1)
    assert (replica.version, replica.current.encoder_step, len(replica.current)) == (1, 5, CLIPS)
    assert bench.settled(3) == (True, 2)
    replica.wait_until_seen(2, 20)
    assert (replica.version, replica.newest) == (1, 2)
    published = {event["version"]: event for event in bench.events("published")}
    assert [published[version]["encoder_step"] for version in (1, 2)] == [5, 7]
    assert (published[1]["entries"], published[1]["reason"]) == (CLIPS, "a test")
    assert 1 <= published[1]["prototypes"] <= 3
    assert all(published[1][name] >= 0 for name in ("encode_seconds", "build_seconds", "started"))
    assert {"files", "digest"} & published[1].keys() == set()
    assert max(event["done"] for event in bench.events("encoding")) == CLIPS
    # The same weights give the same rows.
    rows = [snapshot.open_snapshot(bench.home, version, RUN, MODEL.dim).audio for version in (1, 2)]
    np.testing.assert_array_equal(*rows)

    # Nothing is pruned before the first call of pin; then what is pinned or in use stays, and later ones.
    assert snapshot.versions(bench.home) == [1, 2]
    bench.call("swapped", 1)
    bench.call("pin", [])
    assert snapshot.versions(bench.home) == [1, 2]
    bench.call("swapped", 2)
    bench.call("pin", [1])
    assert snapshot.versions(bench.home) == [1, 2]

    # A restart of training takes version 2 back: it is forgotten, a new one has a number of its own.
    bench.call("start_from", 1)
    assert bench.next_after(1) is None
    assert bench.next_after(0) == 1

    # The refiner dies and comes back: it knows no tickets any more, and serves new requests under new numbers.
    ray.kill(bench.refiner, no_restart=False)

    def served() -> int | None:
        try:
            assert bench.settled(3, 0.0) == (True, None)  # a ticket that the restart lost is over
            return bench.request(9)
        except ray.exceptions.RayActorError:
            return None

    def back() -> bool:
        try:
            return bench.next_after(0) == 1  # what is published is not forgotten
        except ray.exceptions.RayActorError:
            return False

    wait_for(back)
    assert bench.settled(wait_for(served)) == (True, 3)
    replica.wait_until_seen(3, 20)
    replica.swap(3)
    assert replica.current.encoder_step == 9
    bench.call("swapped", 3)
    bench.call("pin", [1])
    assert snapshot.versions(bench.home) == [1, 3]
    replica.stop()


def test_weights_that_fail_are_tried_again_then_given_up_and_the_old_version_stays(bench):
    ticket = bench.request(4, "broken")
    assert bench.settled(ticket) == (True, None)
    assert "failed 2 times" in bench.outcome(ticket)
    failed = wait_for(lambda: len(bench.events("failed")) == 2 and bench.events("failed"))
    assert [(event["attempt"], event["step"]) for event in failed] == [(1, 4), (2, 4)]
    assert all("EncodingError" in event["problem"] and "not finite" in event["problem"] for event in failed)
    assert all("\n" not in event["problem"] for event in failed)
    first, second = (event["time"] for event in bench.events("started"))
    assert second - failed[0]["time"] >= 0.25  # the pause between them
    assert first < failed[0]["time"]
    assert bench.next_after(0) is None
    assert snapshot.versions(bench.home) == []


def test_a_refresh_that_is_under_way_can_be_given_up(bench):
    running, waiting = bench.request(1), bench.request(2)
    wait_for(lambda: bench.events("started"))
    only_if_idle = bench.refiner.request.remote(3, "a test", [bench.weights["good"]], True)
    assert ray.get(only_if_idle) == 0
    assert bench.settled(0, 0.0) == (True, None)
    bench.call("stop")
    assert bench.settled(waiting, 1.0) == (True, None)
    assert bench.settled(running, 5.0) == (True, None)
    assert bench.outcome(running) == bench.outcome(waiting) == "given up"
    time.sleep(0.5)
    assert bench.next_after(0) is None
    assert snapshot.versions(bench.home) == []
    assert bench.settled(99, 5.0) == (True, None)


def test_a_refresh_that_takes_too_long_fails_and_says_so(ray_session, tmp_path, corpus, weights):
    bench = Bench(Folder.at(str(tmp_path)), corpus, weights, timeout_seconds=0.05, attempts=1)
    try:
        ticket = bench.request(1)
        assert bench.settled(ticket, 20.0) == (True, None)
        assert "knowledge.refresh.timeout_seconds" in bench.outcome(ticket)
        assert snapshot.versions(bench.home) == []
    finally:
        bench.close()
