"""A rank's dealings with a real refiner: what it decides after a restart, what it tells, and how long it can wait."""

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import torch.distributed
from ray.actor import ActorHandle
from torch import nn

from ask_ray.config import CorrectionSettings, KnowledgeSettings, ModelSettings, PoolSettings, RefreshSettings
from ask_ray.journal import Journal
from ask_ray.knowledge import index
from ask_ray.knowledge.encoding import EncodingPlan
from ask_ray.knowledge.policy import Clock
from ask_ray.knowledge.refiner import Refiner, RefreshPlan
from ask_ray.knowledge.replica import Replica
from ask_ray.knowledge.requests import RefinerDied
from ask_ray.knowledge.snapshot import Embeddings, Entries, publish
from ask_ray.knowledge.sources import Source
from ask_ray.storage import Folder
from ask_ray.training.gather import gather
from ask_ray.training.gauges import Gauges
from ask_ray.training.step import Pairs, Taken
from ask_ray.training.upkeep import Upkeep

DIM, RUN, CPU = 8, "a-swapping-run", torch.device("cpu")


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def put(home: Folder, version: int, count: int = 20, encoder_step: int = 0, exact_below: int = 10**6) -> None:
    """Publish random entries."""
    rng = np.random.default_rng(version)
    rows, paired = (
        Embeddings(*(made / np.linalg.norm(made, axis=2, keepdims=True)).astype(np.float32))
        for made in (rng.normal(size=(2, count, DIM)), rng.normal(size=(2, 4, DIM)))
    )
    numbers = np.arange(count, dtype=np.int64)
    entries = Entries.of_lists([str(n) for n in numbers], numbers, ["a bell"] * count, 0 * numbers, ["train"] * count)
    built = (index.build(rows.audio, exact_below, 4, 0), index.build(rows.text, exact_below, 4, 0))
    publish(home, version, entries, rows, paired, built, {"run": RUN, "encoder_step": encoder_step})


@dataclass
class Bench:
    """A refiner whose refreshes fail, for their corpus is not there, with its journal and its versions."""

    home: Folder
    knowledge: KnowledgeSettings
    refiner: ActorHandle
    journal: Journal
    upkeeps: list[Upkeep] = field(default_factory=list)

    def upkeep(self) -> Upkeep:
        replica = Replica(self.refiner, self.home, RUN, DIM, CPU, self.journal, 0)
        made = Upkeep(self.knowledge, replica, self.refiner, self.journal, Gauges(RUN), nn.Linear(2, 2), 8, 0, CPU)
        self.upkeeps.append(made)
        return made

    def stop(self) -> None:
        for upkeep in self.upkeeps:
            upkeep._replica.stop()
            assert upkeep._requests is not None
            upkeep._requests.stop()

    def events(self, kind: str) -> list[dict]:
        return [event for event in self.journal.events() if event["kind"] == kind]


@pytest.fixture
def start(ray_session: None, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """A function that starts a bench with settings of refreshes."""
    actors, benches = [], []

    def made(**refresh: object) -> Bench:
        knowledge = KnowledgeSettings(refresh=RefreshSettings(**refresh))
        home = Folder.at(str(tmp_path / "knowledge"))
        plan = EncodingPlan((Source("train", str(tmp_path / "nowhere"), "train"),), 1, 1.0, ModelSettings(), PoolSettings())
        journal, keeper = Journal.start()
        refiner = Refiner.remote(RefreshPlan(home, RUN, plan, knowledge, 0, 0), journal)
        actors.extend((refiner, keeper))
        benches.append(Bench(home, knowledge, refiner, journal))
        return benches[-1]

    yield made
    for bench in benches:
        bench.stop()
    for actor in actors:
        ray.kill(actor)
    for thread in threading.enumerate():
        if thread.name in ("knowledge-loader", "refresh-requests"):
            thread.join(10)  # none asks for the refiner after the session's end


def test_drift_that_was_read_before_a_checkpoint_counts_after_it(start):
    bench = start(policy="adaptive", threshold=0.1, unit="steps", min_interval=4, max_interval=1000, attempts=1)
    put(bench.home, 1)
    pairs = Pairs(torch.arange(0), torch.zeros(0, DIM), torch.zeros(0, DIM))
    memory: dict[str, torch.Tensor] = {}
    for readings in (0.2, 0.6), (0.7,), ():  # the last life reads none before its decision
        upkeep = bench.upkeep()
        upkeep.begin(1, 0, Clock(8, 8), memory)
        for reading in readings:
            upkeep.after_step(Taken({"rdm_audio": torch.tensor(reading), "rdm_text": torch.tensor(reading)}, pairs), 8)
        memory = {name: value.clone() for name, value in upkeep.memory().items()}
    upkeep.before_step(8, epoch_starts=True)
    wait_for(lambda: bool(bench.events("asked")))
    assert [event["reason"] for event in bench.events("asked")] == ["RDM 0.500 passed 0.1, 8 steps since the last"]
    assert upkeep.memory() == {}, "a reading counts once"


def test_a_swap_is_seen_at_the_metrics_endpoint_at_once(start, scraped):
    bench = start(policy="static", warmup_epochs=1000)
    put(bench.home, 5)
    upkeep = bench.upkeep()
    upkeep.begin(0, None, Clock(), {})
    ray.get(bench.refiner.start_from.remote(5))

    def swapped() -> bool:
        upkeep.before_step(12, epoch_starts=False)
        return upkeep.version == 5

    wait_for(swapped)
    wait_for(lambda: scraped(RUN).get("knowledge_version") == 5)
    found = scraped(RUN)
    assert (found["step"], found["lag_steps"]) == (12, 12)
    assert found["swap_ms"] > 0


@pytest.fixture
def quick_to_despair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer answers, half a second apart, that the refiner has died mean that it stays dead."""
    monkeypatch.setattr("ask_ray.knowledge.requests.DEATHS", 3)


def forsaken(start: Callable[..., Bench], mode: str) -> Upkeep:
    """An upkeep whose refiner is dead for good."""
    bench = start(mode=mode)
    upkeep = bench.upkeep()
    upkeep.begin(0, None, Clock(), {})
    ray.kill(bench.refiner)
    return upkeep


@pytest.mark.usefixtures("quick_to_despair")
def test_waiting_for_a_refiner_that_is_dead_for_good_ends_with_an_error(start):
    upkeep = forsaken(start, "sync")
    with pytest.raises(RefinerDied, match="is not restarted"):
        upkeep.refresh(0, "a test", wait=True)


@pytest.mark.usefixtures("quick_to_despair")
def test_training_does_not_go_on_without_noticing_that_the_refiner_is_dead_for_good(start):
    upkeep = forsaken(start, "async")
    upkeep.refresh(0, "a test", wait=False)

    def noticed() -> bool:
        try:
            upkeep.before_step(0, epoch_starts=False)
        except RefinerDied:
            return True
        return False

    wait_for(noticed)


def test_ranks_wait_longer_for_a_refresh_than_their_process_group_waits_for_a_rank(start, tmp_path):
    patience, longer = 4.0, 6.0
    bench = start(mode="sync", attempts=2, backoff_seconds=longer)
    knowledge, refiner, home, journal = bench.knowledge, bench.refiner, bench.home, bench.journal

    @ray.remote(num_cpus=0)
    class Rank:
        """One of two processes that wait together. It knows nothing of this module but what it is sent."""

        def wait(self, rank: int) -> float:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.distributed.init_process_group(
                "gloo",
                f"file://{tmp_path}/meet",
                timeout=datetime.timedelta(seconds=120),
                rank=rank,
                world_size=2,
            )
            replica = Replica(refiner, home, RUN, DIM, CPU, journal, rank)
            upkeep = Upkeep(knowledge, replica, refiner, journal, Gauges(RUN), nn.Linear(2, 2), 8, rank, CPU)
            upkeep.begin(0, None, Clock(), {})
            # Not before: the start of processes may take longer on a busy machine.
            impatient = datetime.timedelta(seconds=patience)
            torch.distributed.distributed_c10d._set_pg_timeout(impatient, torch.distributed.group.WORLD)
            started = time.monotonic()
            upkeep.refresh(0, "a test", wait=True)
            assert upkeep.version == 0
            return time.monotonic() - started

        def ready(self) -> None:
            """Built."""

    ranks = [Rank.remote() for _ in range(2)]
    ray.get([rank.ready.remote() for rank in ranks])
    waited = ray.get([rank.wait.remote(number) for number, rank in enumerate(ranks)])
    assert min(waited) > longer
    assert [event["attempt"] for event in bench.events("failed")] == [1, 2]
    for rank in ranks:
        ray.kill(rank)


@pytest.mark.parametrize("exact_below", [10**6, 0], ids=["exact", "inverted lists"])
def test_two_ranks_correct_their_replicas_alike_to_the_bit(start, tmp_path, exact_below):
    """Each gives its half of every batch; in the middle both swap, and take over what was overwritten meanwhile."""
    bench, count = start(policy="static", warmup_epochs=1000, poll_steps=2), 400
    corrections = CorrectionSettings(write_back=True, drift_map=True, map_interval=2)
    knowledge, refiner = bench.knowledge.model_copy(update={"corrections": corrections}), bench.refiner
    home, journal = bench.home, bench.journal
    for version, step in ((1, 0), (2, 6)):
        put(home, version, count, step, exact_below)

    @ray.remote(num_cpus=0)
    class Rank:
        """One of two processes that step together. It knows nothing of this module but what it is sent."""

        def run(self, rank: int) -> tuple[int, dict[str, np.ndarray]]:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=rank, world_size=2)
            replica = Replica(refiner, home, RUN, DIM, CPU, journal, rank, corrected=True)
            upkeep = Upkeep(knowledge, replica, refiner, journal, Gauges(RUN), nn.Linear(2, 2), 8, rank, CPU)
            upkeep.begin(1, 0, Clock(), {})
            step, since_swap = 0, 0
            while since_swap < 40:
                upkeep.before_step(step, epoch_starts=False)
                since_swap += upkeep.version == 2
                draw = np.random.default_rng([step, rank])
                own = draw.choice(np.arange(rank, count, 2), 3, replace=False)
                sides = torch.nn.functional.normalize(torch.from_numpy(draw.normal(size=(2, 3, DIM))).float(), dim=2)
                pairs = Pairs(gather(torch.from_numpy(own)), *(gather(side) for side in sides))
                upkeep.after_step(Taken({}, pairs), step + 1)
                step += 1
                if step == 20 and rank == 0:
                    ray.get(refiner.start_from.remote(2))
            replica.stop()
            assert upkeep.known is not None
            assert upkeep.known.overlay is not None
            return step, upkeep.known.overlay.state()

        def ready(self) -> None:
            """Built."""

    ranks = [Rank.remote() for _ in range(2)]
    ray.get([rank.ready.remote() for rank in ranks])
    (steps, one), (_, other) = ray.get([rank.run.remote(number) for number, rank in enumerate(ranks)])
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    taken = (one["written"] > 6) & (one["written"] <= steps - 40)
    assert taken.any(), "something was taken over from the version before"
    for rank in ranks:
        ray.kill(rank)
