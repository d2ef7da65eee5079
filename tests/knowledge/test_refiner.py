"""Refreshes by a real refiner, its real tasks and pool: published, retried, superseded, given up, pruned, restarted."""

import time
import uuid
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
from ask_ray.knowledge import refiner, snapshot
from ask_ray.knowledge.encoding import EncodingPlan
from ask_ray.knowledge.refiner import Outcome, Refiner, RefreshPlan, Request
from ask_ray.knowledge.replica import Replica
from ask_ray.knowledge.requests import RefinerDied, Requests
from ask_ray.knowledge.sources import Source
from ask_ray.models import registry
from ask_ray.storage import Folder, StorageError

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
    infinite = {name: torch.full_like(value, torch.inf) for name, value in good.items()}
    return {"good": ray.put(good), "broken": ray.put(broken), "infinite": ray.put(infinite)}


class Bench:
    """A refiner with its journal and the places it writes to."""

    def __init__(self, home: Folder, corpus: str, weights: dict[str, ray.ObjectRef], **refresh: Any) -> None:
        knowledge = KnowledgeSettings(
            keep=1,
            pool=PoolSettings(cpus=0.5, batch_size=8),
            refresh=RefreshSettings(**{"attempts": 2, "backoff_seconds": 0.3, **refresh}),
        )
        source = EncodingPlan((Source("train", corpus, "train"),), 1, 10.0, MODEL, knowledge.pool)
        self.home, self.weights = home, weights
        self.journal, self.keeper = Journal.start()
        self.refiner = Refiner.remote(RefreshPlan(home, RUN, source, knowledge, 3, 0), self.journal)

    def request(self, step: int, kind: str = "good", urgent: bool = False) -> str:
        ticket = uuid.uuid4().hex
        ray.get(self.refiner.request.remote(Request(ticket, step, "a test"), [self.weights[kind]], urgent))
        return ticket

    def settled(self, ticket: str, seconds: float = 60.0) -> tuple[bool, int | None]:
        found = Outcome(*ray.get(self.refiner.outcome.remote(ticket, seconds)))
        return found.known and found.over, found.version

    def next_after(self, version: int) -> int | None:
        return ray.get(self.refiner.next_after.remote(version, 0.0))

    def call(self, name: str, *arguments: Any) -> None:
        ray.get(getattr(self.refiner, name).remote(*arguments))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.journal.events() if event["kind"] == kind]

    def outcome(self, ticket: str) -> str:
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
    replica.open(0, [].append)
    replica.watch(0)
    assert bench.next_after(0) is None

    # Three at once: the first is under way, the newest of the others wins.
    first, second, third = [bench.request(step) for step in (5, 6, 7)]
    assert bench.settled(second, 0.0) == (True, None)
    assert bench.outcome(second) == "superseded by newer weights"
    late = bench.request(6)
    assert bench.settled(late, 0.0) == (True, None), "older weights that come late yield at once"
    assert bench.settled(first) == (True, 1)
    replica.wait_until_seen(1, 20)
    replica.swap(1)
    assert (replica.version, replica.current.encoder_step, len(replica.current)) == (1, 5, CLIPS)
    assert bench.settled(third) == (True, 2)
    replica.wait_until_seen(2, 20)
    assert (replica.version, replica.newest) == (1, 2)
    published = {event["version"]: event for event in bench.events("published")}
    assert [published[version]["encoder_step"] for version in (1, 2)] == [5, 7]
    assert (published[1]["entries"], published[1]["reason"]) == (CLIPS, "a test")
    assert published[1]["sources"] == {"train": CLIPS}
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

    # The refiner dies and comes back: it knows the line, but version 2 is not on it; and no tickets. What a worker asked for
    # meanwhile is asked again by the worker's side.
    requests = Requests(bench.refiner)
    ray.kill(bench.refiner, no_restart=False)
    requests.ask(9, "a test", ray.get(bench.weights["good"]))
    assert requests.busy
    assert requests.wait()
    assert requests.version == 3
    assert not requests.busy
    requests.stop()
    assert bench.settled(third, 0.0) == (False, None)
    assert bench.next_after(0) == 1
    assert bench.next_after(1) == 3
    replica.wait_until_seen(3, 20)
    replica.swap(3)
    assert replica.current.encoder_step == 9
    bench.call("swapped", 3)
    bench.call("pin", [1])
    assert snapshot.versions(bench.home) == [1, 3]
    replica.stop()


def test_a_request_that_died_with_the_refiner_is_asked_again(bench):
    requests = Requests(bench.refiner)
    bench.call("start_from", 0)
    requests.ask(3, "a test", ray.get(bench.weights["good"]))
    wait_for(lambda: bench.events("started"))
    ray.kill(bench.refiner, no_restart=False)
    assert requests.wait()
    version = requests.version
    requests.stop()
    assert version is not None
    assert bench.next_after(0) == version
    assert [event["encoder_step"] for event in bench.events("published")] == [3]


def test_a_refiner_that_restarts_while_storage_is_away_knows_its_line_when_it_is_back(bench, tmp_path):
    bench.call("start_from", 0)
    assert bench.settled(bench.request(4)) == (True, 1)
    bench.home.local.rename(tmp_path / "away")
    bench.home.local.write_bytes(b"no folder")
    ray.kill(bench.refiner, no_restart=False)
    requests = Requests(bench.refiner)
    requests.ask(5, "a test", ray.get(bench.weights["good"]))
    assert requests.wait()
    assert requests.version is None
    requests.stop()
    failed = wait_for(lambda: len(bench.events("failed")) == 2 and bench.events("failed"))
    assert [event["attempt"] for event in failed] == [1, 2]
    with pytest.raises(StorageError, match="knowledge"):
        bench.next_after(0)
    bench.home.local.unlink()
    (tmp_path / "away").rename(bench.home.local)
    assert bench.next_after(0) == 1
    assert bench.settled(bench.request(6)) == (True, 2)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_version_that_is_gone_is_made_anew_under_a_later_number(bench, restarts):
    """Its workers have seen the old number, and look for later ones."""
    bench.call("start_from", 5)  # a checkpoint names it
    bench.call("start_from", 0)  # it could not be opened
    if restarts:
        ray.kill(bench.refiner, no_restart=False)
        wait_for(lambda: bench.next_after(0) is None)
    assert bench.settled(bench.request(4)) == (True, 6)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"7", b"{}", b'{"from": 1, "after": null}'])
def test_no_line_is_read_from_a_damaged_file(tmp_path, content):
    home = Folder.at(str(tmp_path))
    home.write("line.json", content)
    with pytest.raises(ValueError, match=r"\w"):
        refiner._known_line(home, [1, 2])


def test_a_damaged_line_is_told_and_costs_no_more_than_the_line(bench):
    (bench.home / "v000001").write("manifest.json", b"{}")  # counts as a version, though none is that could be opened
    bench.home.write("line.json", b"{")
    assert bench.next_after(0) is None
    assert [event["file"] for event in wait_for(lambda: bench.events("not read"))] == ["line.json"]
    bench.call("start_from", 1)
    assert bench.next_after(0) == 1


def test_a_request_to_a_refiner_that_is_dead_for_good_ends_with_an_error(bench, monkeypatch):
    monkeypatch.setattr("ask_ray.knowledge.requests.DEATHS", 3)  # half a second each
    requests = Requests(bench.refiner)
    bench.call("start_from", 0)
    ray.kill(bench.refiner)
    requests.ask(3, "a test", {})
    with pytest.raises(RefinerDied, match="is not restarted"):
        requests.wait()
    requests.ask(4, "a test", {})
    with pytest.raises(RefinerDied, match="is not restarted"):
        requests.wait()
    requests.stop()


def test_what_fails_is_tried_again_then_given_up_and_the_old_version_stays(bench, scraped):
    blocked = bench.home.local / "v000001"
    blocked.parent.mkdir(parents=True)
    blocked.write_bytes(b"a file where the folder should be")  # the second try has another name
    (bench.home.local / "v000002").write_bytes(b"")
    ticket = bench.request(4)
    assert bench.settled(ticket) == (True, None)
    assert "failed" in bench.outcome(ticket)
    failed = wait_for(lambda: len(bench.events("failed")) == 2 and bench.events("failed"))
    assert [(event["attempt"], event["step"]) for event in failed] == [(1, 4), (2, 4)]
    assert all("\n" not in event["problem"] for event in failed)
    first, second = (event["time"] for event in bench.events("started"))
    assert second - failed[0]["time"] >= 0.25  # the pause between them
    assert first < failed[0]["time"]
    assert bench.next_after(0) is None
    assert snapshot.versions(bench.home) == []
    wait_for(lambda: scraped(RUN).get("refresh_failures_total", 0) >= 2)


@pytest.mark.parametrize("kind", ["broken", "infinite"])
def test_weights_that_are_not_finite_are_refused_once(bench, kind):
    ticket = bench.request(4, kind)
    assert bench.settled(ticket) == (True, None)
    assert "not finite" in bench.outcome(ticket)
    assert [event["attempt"] for event in bench.events("failed")] == [1], "trying again would give the same"
    assert "UnusableWeights" in bench.events("failed")[0]["problem"]
    assert "step 4" in bench.events("failed")[0]["problem"]
    assert snapshot.versions(bench.home) == []


def test_a_version_that_a_worker_refused_is_made_again(bench):
    bench.call("start_from", 0)
    assert bench.settled(bench.request(8)) == (True, 1)
    bench.call("refused", 1)
    bench.call("refused", 1)  # by another worker: nothing more happens
    assert wait_for(lambda: bench.next_after(0)) == 2
    made = bench.events("published")[-1]
    assert (made["encoder_step"], made["reason"]) == (8, "v1 was refused")
    bench.call("refused", 2)  # that was the last of two attempts
    time.sleep(0.3)
    assert bench.next_after(0) is None
    assert len(bench.events("started")) == 2


@pytest.mark.parametrize("kind", ["good", "broken"])
def test_a_version_that_a_worker_refused_never_follows_newer_weights(bench, kind):
    """Whether those make a version of their own or none."""
    bench.call("start_from", 0)
    assert bench.settled(bench.request(8)) == (True, 1)
    newer = bench.request(9, kind)
    bench.call("refused", 1)
    assert bench.settled(newer) == (True, 2 if kind == "good" else None)
    wait_for(lambda: len(bench.events("settled")) == 2)
    time.sleep(0.5)
    assert [event["step"] for event in wait_for(lambda: bench.events("started"))] == [8, 9]
    late = bench.request(8)
    assert bench.outcome(late) == "superseded by newer weights"


def test_an_urgent_request_ends_what_is_under_way(bench):
    running, waiting = bench.request(1), bench.request(2)
    wait_for(lambda: bench.events("started"))
    urgent = bench.request(3, urgent=True)
    assert bench.settled(waiting, 1.0) == (True, None)
    assert bench.settled(running, 5.0) == (True, None)
    assert bench.outcome(running) == bench.outcome(waiting) == "given up"
    finished, version = bench.settled(urgent)
    assert finished
    assert [event["encoder_step"] for event in bench.events("published")] == [3]
    assert snapshot.versions(bench.home) == [version]
    assert bench.settled("never asked", 0.0) == (False, None)


class Gate:
    """Weights that are on their way until the gate is opened: a refresh that is made with them waits, and tells nothing."""

    def __init__(self, sign: Path, good: ray.ObjectRef) -> None:
        self._sign = sign

        @ray.remote(num_cpus=0, max_retries=0)
        def arrive(sign: Path, held: list[ray.ObjectRef]) -> dict[str, torch.Tensor]:
            while not sign.exists():
                time.sleep(0.02)
            return ray.get(held[0])

        self.weights = {"held": arrive.remote(sign, [good])}

    def open(self) -> None:
        self._sign.touch()


@pytest.fixture
def gate(tmp_path: Path, weights) -> Iterator[Gate]:
    made = Gate(tmp_path / "open", weights["good"])
    yield made
    made.open()


def test_a_refresh_that_makes_no_progress_fails_and_says_so(tmp_path, corpus, gate):
    bench = Bench(Folder.at(str(tmp_path / "knowledge")), corpus, gate.weights, stall_seconds=0.5, attempts=1)

    def stalled() -> bool:
        bench.call("progressed", 2)  # another one's, which does not count
        return bench.settled(ticket, 0.0)[0]

    try:
        ticket = bench.request(1, "held")
        wait_for(stalled)
        assert bench.settled(ticket, 0.0) == (True, None)
        assert "knowledge.refresh.stall_seconds" in bench.outcome(ticket)
        assert snapshot.versions(bench.home) == []
    finally:
        bench.close()


def test_a_refresh_that_goes_on_may_take_as_long_as_it_needs(tmp_path, corpus, gate):
    stall = 3.0  # a busy machine may give the refiner no time for a while
    bench = Bench(Folder.at(str(tmp_path / "knowledge")), corpus, gate.weights, stall_seconds=stall, attempts=1)

    def settled() -> bool:
        bench.call("progressed", 1)
        if time.monotonic() > opens:
            gate.open()
        return bench.settled(ticket, 0.0)[0]

    try:
        ticket = bench.request(1, "held")
        wait_for(lambda: bench.events("started"))
        opens = time.monotonic() + stall + 0.5  # longer than the pause that is allowed
        wait_for(settled)
        assert bench.settled(ticket, 0.0) == (True, 1)
        assert time.monotonic() > opens
    finally:
        bench.close()
