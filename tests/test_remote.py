"""Runs and knowledge bases on object storage: a real S3 endpoint on this machine, of which every process knows by the URI."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from ask_ray import experiment, inspection, storage
from ask_ray.config import Settings, SettingsError, load, with_values
from ask_ray.data import corpus
from ask_ray.data.corpora import source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.prepare import prepare, write_shard
from ask_ray.knowledge import index, snapshot
from ask_ray.knowledge.cache import Cache
from ask_ray.knowledge.snapshot import Embeddings, Entries, SnapshotError, open_snapshot, publish
from ask_ray.knowledge.sources import check_sources, sources_of
from ask_ray.storage import Folder, StorageError
from ask_ray.training import checkpoint

DIM, RUN = 8, "some-run"


# --- the knowledge base ---


def put(home: Folder, version: int, run: str = RUN) -> Embeddings:
    """Publish 20 random entries."""
    rng = np.random.default_rng([version, *run.encode()])
    rows, paired = (
        Embeddings(*(made / np.linalg.norm(made, axis=2, keepdims=True)).astype(np.float32))
        for made in (rng.normal(size=(2, 20, DIM)), rng.normal(size=(2, 4, DIM)))
    )
    numbers = np.arange(20, dtype=np.int64)
    entries = Entries.of_lists([f"clip {n}" for n in numbers], numbers, ["a bell"] * 20, 0 * numbers, ["train"] * 20)
    built = (index.build(rows.audio, 10**6, 4, 0), index.build(rows.text, 10**6, 4, 0))
    publish(home, version, entries, rows, paired, built, {"run": run, "encoder_step": version})
    return rows


@pytest.fixture
def home(s3, tmp_path: Path) -> Folder:
    return Folder.at(s3.uri(f"bucket/{tmp_path.name}/knowledge"))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


def copies(cache: Cache) -> list[Path]:
    return [path for path in cache.root.iterdir() if path.is_dir()]


def test_a_version_published_to_s3_is_fetched_once_and_opened_with_its_content(home, cache):
    rows = put(home, 1)
    for _ in range(2):
        opened = open_snapshot(home, 1, RUN, DIM, cache=cache)
        np.testing.assert_array_equal(opened.audio, rows.audio)
        assert (opened.text_index.search(rows.text, 1)[1][:, 0] == np.arange(20)).all()
        (home / "v000001").remove("audio.npy")  # the second time it is not asked for
    assert len(copies(cache)) == 1


def test_versions_of_different_runs_never_mix(home, cache):
    rows = {run: put(home / run, 1, run) for run in ("one", "two")}
    for run in rows:
        np.testing.assert_array_equal(open_snapshot(home / run, 1, run, DIM, cache=cache).audio, rows[run].audio)
    assert len(copies(cache)) == 2


def test_a_version_damaged_on_s3_is_refused_by_name_and_not_kept(home, cache):
    put(home, 1)
    folder = home / "v000001"
    content = bytearray(folder.read("text.npy"))
    content[-1] ^= 1
    folder.write("text.npy", bytes(content))
    with pytest.raises(SnapshotError, match=r"v000001/text\.npy.*damaged"):
        open_snapshot(home, 1, RUN, DIM, cache=cache)
    folder.remove("text.npy")
    with pytest.raises(SnapshotError, match=r"v000001/text\.npy.*missing"):
        open_snapshot(home, 1, RUN, DIM, cache=cache)
    assert copies(cache) == []


def test_pruning_on_s3_leaves_what_is_needed(home, cache):
    for version in range(1, 5):
        put(home, version)
    (home / "v000009").write("audio.npy", b"half")
    assert snapshot.prune(home, 1, [2]) == [1, 3]
    assert snapshot.versions(home) == [2, 4]
    assert "v000001" not in home.names()
    with pytest.raises(SnapshotError, match=r"no manifest\.json"):
        open_snapshot(home, 1, RUN, DIM, cache=cache)


def test_storage_that_goes_away_is_no_damage_and_nothing_hangs(start_s3, cache):
    server = start_s3()
    home = Folder.at(server.uri("bucket/knowledge"))
    put(home, 1)
    put(home, 2)
    opened = open_snapshot(home, 1, RUN, DIM, cache=cache)
    server.stop()
    started = time.monotonic()
    for act in (
        lambda: snapshot.versions(home), lambda: snapshot.prune(home, 1, []), lambda: put(home, 3),
        lambda: open_snapshot(home, 2, RUN, DIM, cache=cache),
    ):  # fmt: skip
        with pytest.raises(StorageError, match=r"s3://\*\*\*@bucket/knowledge"):
            act()
    assert time.monotonic() - started < 60
    assert np.isfinite(opened.audio).all()
    assert len(copies(cache)) == 1


# --- a run ---


def settings_of(storage: str, prepared: str, home: Path, **training: object) -> Settings:
    """Settings of a run of seconds on one worker."""
    return load(
        {
            "run": {"storage": storage, "name": "remote"},
            "data": {
                "prepared": prepared,
                "shard_clips": 64,
                "loader_processes": 1,
                "soundscapes": {"train": 96, "validation": 0, "test": 24, "seconds": 1.0, "captions": 2},
            },
            "model": {"dim": 16, "width": 0.25},
            "ask": {"prototypes": 8},
            "knowledge": {
                "cache": str(home / "cache"),
                "drift_probe": 16,
                "refresh": {"interval": 1, "mode": "sync", "poll_steps": 1, "warmup_epochs": 1},
            },
            "training": {"epochs": 2, "batch_size": 16, "workers": 1, "evaluate_every": 0, **training},
            "tracking": {"enabled": False},
        }
    )


def test_a_run_lives_on_s3_from_the_corpus_to_the_search(ray_session, s3, tmp_path, monkeypatch):
    storage, prepared = s3.uri("bucket/runs"), s3.uri("bucket/prepared")
    said = (tmp_path / "said").open("w+")
    console = Console(file=said, width=120)
    settings = settings_of(storage, prepared, tmp_path)
    result = experiment.run(settings, console)
    place = Folder.at(storage) / "remote"
    assert place.read_json("result.json") == result
    assert result["steps"] == 12
    assert [row["version"] for row in result["refreshes"]] == [1, 2]
    assert "curves.png" in (place / "pictures").names()
    assert snapshot.versions(place / "knowledge") == [1, 2]
    assert checkpoint.pinned_versions(place) == [1]
    assert len(copies(Cache(str(tmp_path / "cache")))) == 2

    (corpus,) = Folder.at(prepared).names()
    inspection.evaluate(place.uri, (Folder.at(prepared) / corpus).uri, "test", [str(tmp_path / "figures.json")], console=console)
    assert json.loads((tmp_path / "figures.json").read_text())["final"]["t2a"]["n"] == 24
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a search keeps its copy
    assert len(inspection.search("a dog barks", None, storage, 3, console)) == 3

    place.remove("result.json")
    again = experiment.run(settings, console)  # all epochs are there: it evaluates and tells again
    assert again["steps"] == 12
    assert again["final"] == result["final"]
    said.seek(0)
    told = said.read()
    assert f"Continuing run remote in {place}" in told.replace("\n", "")
    for text in (told, place.read("result.json").decode(), (tmp_path / "figures.json").read_text()):
        assert s3.secret not in text


@pytest.mark.survival
def test_a_checkpoint_is_saved_though_storage_was_away_and_the_run_goes_on_meanwhile(ray_session, start_s3, tmp_path):
    server = start_s3()
    settings = settings_of(server.uri("bucket/runs"), str(tmp_path / "prepared"), tmp_path, epochs=12)
    heard = []

    def listen(event: dict) -> None:
        heard.append(event)
        if event["kind"] == "began":
            server.process.send_signal(signal.SIGSTOP)
        elif event["kind"] == "not uploaded":
            server.process.send_signal(signal.SIGCONT)

    result = experiment.run(with_values(settings, {"ask.enabled": False}), Console(quiet=True), listen)
    assert result["steps"] == 72
    kinds = [event["kind"] for event in heard]
    assert "not uploaded" in kinds
    assert kinds[: kinds.index("not uploaded")].count("epoch") >= 2, "it waited for the first epoch's upload"
    assert kinds.count("began") == 1
    assert all(server.secret not in event["problem"] for event in heard if "problem" in event)
    with checkpoint.newest(Folder.at(server.uri("bucket/runs/remote"))) as folder:
        assert checkpoint.place_of(folder).step == 72


def test_a_checkpoint_is_fetched_when_storage_is_back(s3, tmp_path):
    saved = Folder.at(s3.uri(f"bucket/{tmp_path.name}/checkpoint_a"))
    saved.write("state.json", b"{}")
    heard: list[StorageError] = []

    def tell(error: StorageError) -> None:
        heard.append(error)
        s3.process.send_signal(signal.SIGCONT)

    s3.process.send_signal(signal.SIGSTOP)
    try:
        with checkpoint.fetched(saved, tell) as folder:
            assert (folder / "state.json").read_bytes() == b"{}"
    finally:  # other tests use it too
        s3.process.send_signal(signal.SIGCONT)
    assert heard
    assert not folder.exists()


def test_clips_are_read_when_storage_is_back(s3, small_corpus, tmp_path, monkeypatch):
    place = s3.uri(f"bucket/{tmp_path.name}")
    Folder.at(place).upload(small_corpus.folder.local)
    there, heard = Corpus.open(place), []

    def not_read(error: StorageError) -> None:
        heard.append(error)
        s3.process.send_signal(signal.SIGCONT)

    monkeypatch.setattr(corpus, "_not_read", not_read)
    s3.process.send_signal(signal.SIGSTOP)
    try:
        read = there.read(there.groups("train")[1])
    finally:  # other tests use it too
        s3.process.send_signal(signal.SIGCONT)
    assert heard
    assert read.ids == small_corpus.read(small_corpus.groups("train")[1]).ids


def test_clips_of_a_damaged_file_on_this_machine_are_not_waited_for(small_corpus, tmp_path):
    shutil.copytree(small_corpus.folder.local, tmp_path / "damaged")
    here = Corpus.open(str(tmp_path / "damaged"))
    group = here.groups("train")[0]
    file = tmp_path / "damaged/clips" / group.file
    file.write_bytes(file.read_bytes()[:100])
    started = time.monotonic()
    with pytest.raises((StorageError, pa.ArrowInvalid)):
        here.read(group)
    assert time.monotonic() - started < storage.PATIENCE / 2


def test_storage_that_stays_away_is_an_error_in_the_end(no_s3, monkeypatch):
    saved = Folder.at(no_s3("bucket/runs/one/checkpoint_a"))
    monkeypatch.setattr(storage, "PATIENCE", 0.6)
    heard: list[StorageError] = []
    with pytest.raises(StorageError, match="checkpoint_a"), checkpoint.fetched(saved, heard.append):
        pass
    assert heard


@pytest.mark.parametrize("setting", ["run.storage", "data.prepared"])
@pytest.mark.parametrize("problem", ["nobody listens", "no such bucket", "wrong credentials"])
def test_a_place_that_cannot_work_is_refused_before_training(
    ray_session, s3, strict_s3, no_s3: Callable[[str], str], tmp_path: Path, setting: str, problem: str
) -> None:
    place = {
        "nobody listens": no_s3("bucket/x"),
        "no such bucket": s3.uri("no-bucket/x"),
        "wrong credentials": strict_s3.uri("bucket/x", secret="not-this-one"),
    }[problem]
    places = {"run.storage": str(tmp_path / "runs"), "data.prepared": str(tmp_path / "prepared"), setting: place}
    settings = settings_of(places["run.storage"], places["data.prepared"], tmp_path)
    started = time.monotonic()
    with pytest.raises(StorageError, match=rf"^{setting}: ") as refusal:
        experiment.run(settings, Console(quiet=True))
    assert time.monotonic() - started < 30
    assert "not-this-one" not in str(refusal.value)


def test_a_knowledge_source_that_cannot_be_reached_is_refused(strict_s3, no_s3, small_corpus):
    for place in (no_s3("bucket/x"), strict_s3.uri("bucket/x", secret="not-this-one")):
        with pytest.raises(SettingsError, match=r"^knowledge\.sources: .*bucket/x") as refusal:
            check_sources(sources_of(["train", place], small_corpus.folder.uri), small_corpus)
        assert "not-this-one" not in str(refusal.value)


def test_a_corpus_that_may_only_be_read_is_enough(ray_session, s3, tmp_path):
    data = settings_of("runs", s3.uri("bucket/shared"), tmp_path).data
    made = prepare(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "write", lambda *_: pytest.fail("written to"))
        assert prepare(data).manifest == made.manifest
    assert Corpus.open(made.folder.uri).clips("train") == 96


def test_a_shard_is_the_same_on_s3_and_a_local_folder(s3, tmp_path):
    data = settings_of("runs", "prepared", tmp_path).data
    source = source_of(data)
    shard = source.shards()[0]
    there, here = Folder.at(s3.uri(f"bucket/{tmp_path.name}")), Folder.at(str(tmp_path))
    assert write_shard(source, shard, there) == write_shard(source, shard, here)
    for folder, name in (
        ("clips", f"{shard.name}.parquet"),
        ("rejected", f"{shard.name}.parquet"),
        ("summaries", f"{shard.name}.json"),
    ):
        assert (there / folder).read(name) == (here / folder).read(name)
