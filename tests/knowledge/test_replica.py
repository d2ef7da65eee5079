"""What a worker holds: reading a version, and loading the next ones in the background from a real refiner's line."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.actor import ActorHandle
from torch import Tensor
from torch.nn import functional

from ask_ray import storage
from ask_ray.config import AskSettings, KnowledgeSettings, ModelSettings, PoolSettings
from ask_ray.journal import Journal
from ask_ray.knowledge import index
from ask_ray.knowledge.encoding import EncodingPlan
from ask_ray.knowledge.refiner import Refiner, RefreshPlan
from ask_ray.knowledge.replica import Knowledge, Replica
from ask_ray.knowledge.snapshot import Embeddings, Entries, SnapshotError, open_snapshot, publish
from ask_ray.storage import Folder, StorageError

DIM, RUN, CPU = 8, "run", torch.device("cpu")
COUNTS = [1, 3, 2, 4, 1, 2, 3, 1, 2, 2, 4, 3, 1, 1, 2]  # captions of each clip
CLIPS = np.random.default_rng(5).permutation(10_000)[: len(COUNTS)].astype(np.int64)  # clip numbers in no order


def unit(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def put(home: Folder, version: int, prototypes: int = 5) -> Embeddings:
    numbers = np.repeat(CLIPS, COUNTS)
    count, which = len(numbers), np.concatenate([np.arange(of) for of in COUNTS])
    sources = ["train"] * (count - COUNTS[-1]) + ["elsewhere"] * COUNTS[-1]  # the last clip is of another source
    entries = Entries.of_lists([f"clip {n}" for n in numbers], numbers, ["a caption"] * count, which, sources)
    rows, paired = (
        Embeddings(unit(count, version), unit(count, version + 50)),
        Embeddings(unit(prototypes, 8), unit(prototypes, 9)),
    )
    built = (index.build(rows.audio, 10**6, 4, 0), index.build(rows.text, 10**6, 4, 0))
    publish(home, version, entries, rows, paired, built, {"run": RUN, "encoder_step": 100 * version})
    return rows


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Knowledge, Embeddings]:
    home = Folder.at(str(tmp_path_factory.mktemp("knowledge")))
    rows = put(home, 4)
    return Knowledge(open_snapshot(home, 4, RUN, DIM), CPU), rows


# --- reading ---


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.integers(0, len(COUNTS) - 1), min_size=1, max_size=8),
    elsewhere=st.lists(st.integers(0, len(COUNTS) - 1), max_size=5),
    neighbours=st.integers(1, 40),
    exclude=st.sampled_from(["self", "batch", "none"]),
    seed=st.integers(0, 1000),
)
def test_what_is_read_are_the_nearest_entries_of_other_clips(stored, batch, elsewhere, neighbours, exclude, seed):
    """`elsewhere` are the clips of other ranks: they are excluded with the batch."""
    known, rows = stored
    ids = torch.from_numpy(CLIPS[batch])
    all_ids = torch.cat([ids, torch.from_numpy(CLIPS[elsewhere])])
    near = known.locate(ids, torch.zeros_like(ids)).numpy()
    noise = 0.2 * np.random.default_rng(seed).normal(size=(2, len(batch), DIM)).astype(np.float32)
    audio = functional.normalize(torch.from_numpy(rows.audio[near] + noise[0]), dim=1)
    text = functional.normalize(torch.from_numpy(rows.text[near] + noise[1]), dim=1)
    reading = known.read(audio, text, ids, all_ids, AskSettings(exclude=exclude, neighbours=neighbours))["fine"]
    for found, queries, table, truth in (
        (reading.by_audio, audio, reading.audio, rows.audio),
        (reading.by_text, text, reading.text, rows.text),
    ):
        assert found.rows.shape == found.valid.shape == (len(batch), neighbours)
        for row, own in enumerate(ids.tolist()):
            barred = {"self": {own}, "batch": set(all_ids.tolist()), "none": set()}[exclude]
            allowed = np.array([number not in barred for number in known.entries.numbers.tolist()])
            scores = np.sort((truth @ queries[row].numpy())[allowed])[::-1][:neighbours]
            places = found.rows[row][found.valid[row]]
            assert int(found.valid[row].sum()) == len(scores) == min(neighbours, allowed.sum())
            assert not set(reading.numbers[places].tolist()) & barred
            assert len(set(places.tolist())) == len(places)
            np.testing.assert_allclose(table[places] @ queries[row], scores, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(neighbours=st.integers(1, 40), exclude=st.sampled_from(["self", "batch", "none"]), seed=st.integers(0, 1000))
def test_tables_are_paired_rows_of_the_entries_they_name(stored, neighbours, exclude, seed):
    known, rows = stored
    ids = torch.from_numpy(CLIPS[:6])
    queries = [torch.from_numpy(unit(6, seed + way)) for way in (1000, 2000)]
    reading = known.read(*queries, ids, ids, AskSettings(exclude=exclude, neighbours=neighbours))["fine"]
    there = torch.cat([found.rows[found.valid] for found in (reading.by_audio, reading.by_text)]).unique()
    for place in there.tolist():
        entries = np.flatnonzero((rows.audio == reading.audio[place].numpy()).all(1))
        assert len(entries) == 1
        np.testing.assert_array_equal(reading.text[place], rows.text[entries[0]])
        assert reading.numbers[place] == known.entries.numbers[entries[0]]
        assert reading.sources[place] == known.entries.source[entries[0]]
    assert len(np.unique(reading.audio[there], axis=0)) == len(there)  # an entry has one row, whoever found it
    missing = ~torch.isin(torch.arange(len(reading.numbers)), there)
    assert (reading.numbers[missing] == -1).all()
    assert (reading.sources[missing] == -1).all()
    assert torch.isfinite(reading.audio).all()


def test_more_neighbours_than_entries_are_marked_as_missing(stored):
    known, rows = stored
    ids = torch.from_numpy(CLIPS[3:4])
    query = torch.from_numpy(unit(1, 77))
    reading = known.read(query, query, ids, ids, AskSettings(neighbours=100))["fine"]
    assert int(reading.by_audio.valid.sum()) == len(rows.audio) - COUNTS[3]
    assert reading.by_audio.rows.shape == (1, 100)


def test_prototypes_are_the_nearest_and_no_more_than_there_are(stored):
    known, _ = stored
    tables = unit(5, 8), unit(5, 9)
    queries = unit(7, 1), unit(7, 2)
    ids = torch.arange(7)
    for asked, expected in ((3, 3), (10, 5)):
        reading = known.read(*map(torch.from_numpy, queries), ids, ids, AskSettings(neighbours=asked))["coarse"]
        assert reading.by_audio.valid.all()
        assert (reading.numbers == -1).all()
        assert (reading.sources == -1).all()
        for found, query, table in ((reading.by_audio, queries[0], tables[0]), (reading.by_text, queries[1], tables[1])):
            truth = np.argsort(-(query @ table.T), axis=1)[:, :expected]
            np.testing.assert_array_equal(found.rows, truth)
        np.testing.assert_array_equal(reading.audio, tables[0])
        np.testing.assert_array_equal(reading.text, tables[1])


@pytest.mark.parametrize(("fine", "coarse"), [(True, True), (True, False), (False, True)])
def test_the_settings_choose_the_granularities(stored, fine, coarse):
    query, ids = torch.from_numpy(unit(2, 0)), torch.arange(2)
    made = stored[0].read(query, query, ids, ids, AskSettings(fine=fine, coarse=coarse, negatives="none"))
    assert list(made) == ["fine"] * fine + ["coarse"] * coarse


def test_a_base_without_prototypes_reads_entries_alone(tmp_path):
    home = Folder.at(str(tmp_path))
    put(home, 1, prototypes=0)
    query, ids = torch.from_numpy(unit(2, 0)), torch.arange(2)
    assert list(Knowledge(open_snapshot(home, 1, RUN, DIM), CPU).read(query, query, ids, ids, AskSettings())) == ["fine"]


def test_locate_finds_every_pair_and_nothing_else(stored):
    known, rows = stored
    assert len(known) == sum(COUNTS)
    assert (known.version, known.encoder_step) == (4, 400)
    place = 0
    for clip, count in zip(CLIPS, COUNTS, strict=True):
        which, own = torch.arange(7), "train" if clip != CLIPS[-1] else "elsewhere"
        found = known.locate(torch.full((7,), int(clip)), which, own)
        assert found.tolist() == [place + n if n < count else -1 for n in range(7)]
        place += count
    assert (known.locate(torch.from_numpy(CLIPS), torch.zeros(len(CLIPS), dtype=torch.int64))[:-1] >= 0).all()
    assert known.locate(torch.from_numpy(CLIPS[-1:]), torch.zeros(1, dtype=torch.int64)).tolist() == [-1]  # not a training clip
    strangers = torch.tensor([-1, 0, 10_001, 2**62])
    strangers = strangers[~torch.isin(strangers, torch.from_numpy(CLIPS))]
    assert (known.locate(strangers, torch.zeros_like(strangers)) == -1).all()
    audio, text = known.rows(torch.tensor([3, 0, 3]))
    np.testing.assert_array_equal(audio, rows.audio[[3, 0, 3]])
    np.testing.assert_array_equal(text, rows.text[[3, 0, 3]])


# --- loading, from a real refiner's line of versions ---


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Told:
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def tell(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})


def fail_by(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: unspecified")])
def test_a_version_that_a_gpu_has_no_room_for_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    home = Folder.at(str(tmp_path))
    put(home, 1)
    monkeypatch.setattr("ask_ray.knowledge.replica.Knowledge", fail_by(error))
    with pytest.raises(type(error), match="CUDA") as raised:
        Replica(None, home, RUN, DIM, CPU, Told(), 0).open(1, lambda _: None)
    assert raised.value is error


def test_an_index_that_a_gpu_has_no_room_for_is_not_taken_for_damaged(tmp_path, monkeypatch):
    home, full = Folder.at(str(tmp_path)), RuntimeError("alloc fail")
    put(home, 1)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: SimpleNamespace(setTempMemory=lambda size: None), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", fail_by(full), raising=False)
    with pytest.raises(RuntimeError) as raised:
        Replica(None, home, RUN, DIM, torch.device("cuda"), Told(), 0).open(1, lambda _: None)
    assert raised.value is full


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told) -> Iterator[Replica]:
    """A replica that is offered v1, whole, by a refiner without Ray as soon as it watches."""

    def next_after(seen: int, seconds: float) -> int | None:
        time.sleep(0.01)
        return None if seen else 1

    monkeypatch.setattr("ask_ray.knowledge.replica.ray", SimpleNamespace(get=lambda answer, timeout: answer))
    refiner = SimpleNamespace(next_after=SimpleNamespace(remote=next_after))
    home = Folder.at(str(tmp_path))
    put(home, 1)
    made = Replica(refiner, home, RUN, DIM, CPU, told, 0)
    yield made
    made.stop()


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), KeyError("unknown"), torch.OutOfMemoryError("CUDA out of memory"), StorageError("away")]
)
def test_whatever_ends_the_loading_thread_is_an_error_of_the_worker(offered, monkeypatch, error):
    monkeypatch.setattr("ask_ray.knowledge.replica.Knowledge", fail_by(error))
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    offered.watch(0)
    offered.wait_until_seen(1, seconds=20)
    with pytest.raises(type(error)) as raised:
        _ = offered.newest
    assert raised.value is error


def test_a_version_is_not_told_as_refused_where_the_loading_thread_has_ended(offered, told, monkeypatch):
    monkeypatch.setattr("ask_ray.knowledge.replica.Knowledge", fail_by(MemoryError("no memory")))
    offered.watch(0)
    offered.wait_until_seen(1, seconds=20)
    assert told.events == []


class Line:
    """A refiner whose line of versions a test sets by hand, its journal and its replicas."""

    def __init__(self, home: Folder, refiner: ActorHandle, journal: Journal) -> None:
        self.home, self.refiner, self.journal = home, refiner, journal
        self.before = journal.read()[1]
        self.replicas: list[Replica] = []
        self.away: list[StorageError] = []
        self.offer(0)

    def offer(self, version: int) -> None:
        ray.get(self.refiner.start_from.remote(version))

    def replica(self, start: int) -> Replica:
        made = Replica(self.refiner, self.home, RUN, DIM, CPU, self.journal, rank=len(self.replicas))
        self.replicas.append(made)
        made.open(start, self.away.append)
        made.watch(start)
        return made

    def events(self, kind: str) -> list[dict]:
        return [event for event in self.journal.read(self.before)[0] if event["kind"] == kind]


@pytest.fixture(scope="module")
def actors(ray_session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ActorHandle, Journal]]:
    source = EncodingPlan((), 1, 1.0, ModelSettings(), PoolSettings())
    home = Folder.at(str(tmp_path_factory.mktemp("unused")))
    journal, keeper = Journal.start()
    refiner = Refiner.remote(RefreshPlan(home, RUN, source, KnowledgeSettings(), 0, 0), journal)
    yield refiner, journal
    ray.kill(refiner)
    ray.kill(keeper)
    for thread in threading.enumerate():
        if thread.name == "knowledge-loader":
            thread.join(10)  # none asks for the refiner after the session's end


@pytest.fixture
def line(actors, tmp_path: Path) -> Iterator[Line]:
    made = Line(Folder.at(str(tmp_path)), *actors)
    yield made
    for replica in made.replicas:
        replica.stop()


def read_first(replica: Replica) -> Tensor:
    assert replica.current is not None
    return replica.current.rows(torch.tensor([0]))[0]


def test_versions_are_loaded_beside_the_one_in_use_and_swapped_when_told(line):
    first, second = put(line.home, 1), put(line.home, 2)
    replica = line.replica(0)
    assert (replica.version, replica.newest, replica.current) == (0, 0, None)
    line.offer(1)
    replica.wait_until_seen(1)
    assert (replica.version, replica.newest, replica.has(1)) == (0, 1, True)
    replica.swap(1)
    assert (replica.version, replica.newest, replica.has(1)) == (1, 1, False)
    np.testing.assert_array_equal(read_first(replica)[0], first.audio[0])
    line.offer(2)
    replica.wait_until_seen(2)
    assert (replica.version, replica.newest) == (1, 2)
    np.testing.assert_array_equal(read_first(replica)[0], first.audio[0])
    replica.swap(2)
    np.testing.assert_array_equal(read_first(replica)[0], second.audio[0])
    wait_for(lambda: [event["version"] for event in line.events("loaded")] == [1, 2])

    resumed = line.replica(1)  # a restarted worker begins with the version that its checkpoint names
    assert resumed.version == 1
    np.testing.assert_array_equal(read_first(resumed)[0], first.audio[0])
    resumed.wait_until_seen(2)
    assert (resumed.version, resumed.newest) == (1, 2)


def damage(folder: Path, harm: str) -> None:
    if harm == "array":
        content = bytearray((folder / "audio.npy").read_bytes())
        content[-5] ^= 4
        (folder / "audio.npy").write_bytes(content)
    elif harm == "entries":
        (folder / "entries.parquet").write_bytes((folder / "entries.parquet").read_bytes()[:-20])
    elif harm == "gone":
        shutil.rmtree(folder)
    else:
        (folder / "manifest.json").write_text(harm)


def test_damaged_versions_are_refused_and_a_later_good_one_is_used(line):
    harms = ["array", "entries", "{", "[]", '{"format": 1}', "gone"]
    put(line.home, 1)
    replica = line.replica(1)
    for version, harm in enumerate(harms, 2):
        put(line.home, version)
        damage(line.home.local / f"v{version:06d}", harm)
        line.offer(version)
        replica.wait_until_seen(version, seconds=20)
        assert (replica.version, replica.newest, replica.has(version)) == (1, 1, False)
    wait_for(lambda: len(line.events("refused")) == len(harms))
    for version, event in enumerate(line.events("refused"), 2):
        assert (event["version"], event["rank"]) == (version, 0)
        assert f"v{version:06d}" in event["problem"]
    good = 2 + len(harms)
    put(line.home, good)
    line.offer(good)
    replica.wait_until_seen(good, seconds=20)
    replica.swap(good)
    assert replica.version == good
    assert len(line.events("refused")) == len(harms)


def test_starting_with_a_version_that_cannot_be_opened_is_an_error(line):
    put(line.home, 1)
    with pytest.raises(SnapshotError, match="v000009"):
        line.replica(9)


def test_a_version_that_a_disk_does_not_give_is_refused_too(line):
    """It can be made anew; to try again and again would give nothing else."""
    put(line.home, 1)
    (line.home.local / "v000001" / "audio.npy").unlink()
    (line.home.local / "v000001" / "audio.npy").mkdir()
    with pytest.raises(SnapshotError, match="v000001"):
        line.replica(1)
    replica = line.replica(0)
    line.offer(1)
    replica.wait_until_seen(1, seconds=20)
    wait_for(lambda: len(line.events("refused")) == 1)
    assert (replica.newest, line.away) == (0, [])


def test_storage_that_stays_away_is_an_error_of_the_worker(line, start_s3, monkeypatch):
    """Not a run that trains on without new versions, on all ranks, and ends as if nothing had been."""
    server = start_s3()
    line.home = Folder.at(server.uri("bucket/knowledge"))
    put(line.home, 1)
    replica = line.replica(0)
    server.stop()
    monkeypatch.setattr(storage, "PATIENCE", 0.6)
    line.offer(1)
    replica.wait_until_seen(1, seconds=60)
    with pytest.raises(StorageError, match="bucket/knowledge"):
        _ = replica.newest
    wait_for(lambda: bool(line.events("unreadable")))
    with pytest.raises(StorageError, match="bucket/knowledge"):
        line.replica(1)
    assert line.away


def test_a_replica_that_stopped_loads_nothing_more(line):
    put(line.home, 1)
    replica = line.replica(0)
    replica.stop()
    line.offer(1)
    replica.wait_until_seen(1, seconds=0.3)
    assert replica.newest == 0
    wait_for(lambda: bool(line.events("refused")))  # the user is told
    (event,) = line.events("refused")
    assert (event["version"], event["problem"]) == (1, "not loaded in 0.3 s: v0 stays in use")


def test_loading_goes_on_after_the_refiner_restarts(line):
    put(line.home, 1)
    put(line.home, 2)
    replica = line.replica(0)
    line.offer(1)
    replica.wait_until_seen(1)
    replica.swap(1)
    ray.kill(line.refiner, no_restart=False)

    def restarted() -> bool:
        try:
            return ray.get(line.refiner.next_after.remote(0, 0.0)) is None  # no version was published by it
        except ray.exceptions.RayActorError:
            return False

    wait_for(restarted)
    line.offer(2)
    replica.wait_until_seen(2, seconds=30)
    assert (replica.version, replica.newest) == (1, 2)
