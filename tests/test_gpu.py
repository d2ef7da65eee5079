"""What shows on a GPU alone: FAISS and PyTorch share it, and a run's workers and pool do. Skipped on a machine without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from runs import quiet, settings_of
from safetensors.torch import load_file

from ask_ray import experiment, inspection
from ask_ray.config import AskSettings, Settings
from ask_ray.data.corpus import Corpus
from ask_ray.knowledge import index, snapshot
from ask_ray.knowledge.replica import Knowledge
from ask_ray.knowledge.snapshot import TRAIN, Embeddings, Entries
from ask_ray.method.drift import rdm
from ask_ray.storage import Folder
from ask_ray.training import checkpoint, worker
from ask_ray.training.trainer import GPU_SEARCH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DIM, CENTRES = 64, 100


def rows(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    """(count, dim) float32 unit rows about a hundred centres, so that neighbours are told apart."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(CENTRES, dim))
    made = centres[np.arange(count) % CENTRES] + 0.7 * draw.normal(size=(count, dim))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def stored(home: Folder, count: int, exact_below: int, dim: int = DIM) -> snapshot.Snapshot:
    """A published version of so many entries, two a clip, opened."""
    numbers, which = np.repeat(np.arange(count // 2), 2).astype(np.int64), np.tile([0, 1], count // 2)
    entries = Entries.of_lists([f"clip {n}" for n in numbers], numbers, ["a sound"] * count, which, [TRAIN] * count)
    whole = Embeddings(rows(count, 1, dim), rows(count, 2, dim))
    paired = Embeddings(*index.prototypes(whole.audio, whole.text, 32, 0))
    built = tuple(index.build(of, exact_below, 32, 0) for of in (whole.audio, whole.text))
    snapshot.publish(home, 1, entries, whole, paired, built, {"run": "run", "encoder_step": 0})
    return snapshot.open_snapshot(home, 1, "run", dim)


def test_faiss_sees_the_gpus_that_pytorch_sees() -> None:
    assert faiss.get_num_gpus() == torch.cuda.device_count()


@pytest.mark.parametrize("exact_below", [10**6, 0], ids=["flat", "inverted lists"])
def test_a_gpu_finds_what_the_cpu_finds_up_to_the_most_it_can(tmp_path: Path, exact_below: int) -> None:
    opened = stored(Folder(str(tmp_path)), 6000, exact_below)
    queries, numbers = rows(64, 3), opened.entries.numbers
    on_gpu = index.on_gpu(opened.audio_index, 0)
    assert on_gpu is not opened.audio_index
    assert type(on_gpu).__name__.startswith("GpuIndex")
    excluded = np.broadcast_to(np.arange(500), (64, 500))
    for k in (10, GPU_SEARCH - 1000):
        truth, found = (
            index.retrieve(of, queries, k, numbers, excluded, opened.entries.most_per_clip) for of in (opened.audio_index, on_gpu)
        )
        np.testing.assert_allclose(found.similarity, truth.similarity, atol=2e-3)
        there = truth.entry >= 0
        assert (numbers[found.entry[found.entry >= 0]] >= 500).all()
        assert (found.entry == truth.entry)[there].mean() > 0.98, "all but near ties"


@pytest.mark.parametrize("exact_below", [10**6, 0], ids=["flat", "inverted lists"])
@pytest.mark.parametrize("exclude", ["self", "batch", "none"])
def test_a_batch_reads_on_a_gpu_what_it_reads_on_the_cpu(tmp_path: Path, exact_below: int, exclude: str) -> None:
    opened = stored(Folder(str(tmp_path)), 6000, exact_below)
    queries, ids = [torch.from_numpy(rows(16, seed)) for seed in (3, 4)], torch.arange(16)
    read = {
        device: Knowledge(opened, device).read(
            *(one.to(device) for one in queries), ids.to(device), ids.to(device), AskSettings(exclude=exclude)
        )
        for device in (CPU, CUDA)
    }
    for part in ("fine", "coarse"):
        truth, found = read[CPU][part], read[CUDA][part]
        assert found.audio.device.type == found.by_audio.rows.device.type == "cuda"
        for way in ("audio", "text"):
            near, there = (getattr(one, f"by_{way}") for one in (truth, found))
            similarity = [
                torch.einsum("qd,qkd->qk", query, getattr(one, way).cpu()[of.rows.cpu()])
                for one, of, query in ((truth, near, queries[way == "text"]), (found, there, queries[way == "text"]))
            ]
            torch.testing.assert_close(*similarity, atol=2e-3, rtol=0)


def test_two_versions_at_once_take_little_more_of_a_gpu_than_their_rows(tmp_path: Path) -> None:
    """While a version is swapped in there are two; each is held as embeddings and in the indexes."""
    opened = stored(Folder(str(tmp_path)), 20_000, 10**6, 256)
    Knowledge(opened, CUDA).read(*(torch.from_numpy(rows(64, 3, 256)).to(CUDA),) * 2, *(torch.arange(64).to(CUDA),) * 2, ASK)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    held = []
    for _ in range(2):
        held.append(Knowledge(opened, CUDA))
        held[-1].read(*(torch.from_numpy(rows(64, 3, 256)).to(CUDA),) * 2, *(torch.arange(64).to(CUDA),) * 2, ASK)
    taken = free - torch.cuda.mem_get_info()[0]
    of_rows = 2 * 4 * opened.audio.nbytes
    assert taken < of_rows + 2 * 2**30, f"{taken / 2**20:.0f} MiB for {of_rows / 2**20:.0f} MiB of rows"
    held.clear()
    torch.cuda.empty_cache()
    assert free - torch.cuda.mem_get_info()[0] < 64 * 2**20, "what a version took is given back"


ASK = AskSettings()


def settings_on_gpu(home: Path, name: str, **knowledge: Any) -> Settings:
    """A run of seconds, of which one GPU is shared by a worker and the pool; without corrections, unless they are asked for."""
    of = {"corrections": {"write_back": False, "drift_map": False}} | knowledge
    return settings_of(home, run={"name": name}, knowledge=of)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("exact_below", [50_000, 0], ids=["flat", "inverted lists"])
def test_a_run_and_its_pool_share_a_gpu(ray_session: None, home: Path, exact_below: int) -> None:
    result = experiment.run(settings_on_gpu(home, f"shared-{exact_below}", exact_below=exact_below), quiet())
    assert result["device"].startswith("cuda")
    assert [row["encoder_step"] for row in result["refreshes"]] == [8, 16, 24]
    assert all(row["entries"] == 128 for row in result["refreshes"])
    drift = drift_of_newest(result["folder"])
    assert max(drift.values()) < 1e-4, "what the pool encoded on the GPU is what the weights give on the CPU"


def drift_of_newest(run: str) -> dict[str, float]:
    """RDM of the newest version, as stored, against its entries encoded by the run's last weights on the CPU."""
    opened = inspection.OpenedRun.at(run)
    version = max(snapshot.versions(opened.place.knowledge))
    held = snapshot.open_snapshot(opened.place.knowledge, version, opened.place.name, opened.settings.model.dim)
    now, then = worker.probe_rows(
        Knowledge(held, CPU), opened.model.to(CPU), Corpus.open(opened.stood.corpus), opened.settings, CPU, 0
    )
    return {way: float(rdm(now[way], now[way], then[way], float(opened.model.temperature))) for way in now}


def test_corrections_keep_a_base_of_their_own_on_the_cpu(ray_session: None, home: Path) -> None:
    corrections = {"write_back": True, "drift_map": True}
    result = experiment.run(settings_on_gpu(home, "corrected", corrections=corrections), quiet())
    events = json.loads((Path(result["folder"]) / "history.json").read_text())
    last = [event for event in events if event["kind"] == "epoch"][-1]
    assert result["device"].startswith("cuda")
    assert 0 < last["corrected_share"] <= 1


def test_a_run_killed_on_a_gpu_goes_on_by_name(ray_session: None, home: Path, start_job: Callable) -> None:
    settings = settings_on_gpu(home, "killed")
    file = home / "killed.yaml"
    file.write_text(settings.to_yaml())
    run = Folder(str(home / "runs" / "killed"))
    job = start_job("train", "--config", str(file))
    job.kill_when(lambda: checkpoint.pinned_versions(run), seconds=300)
    heard: list[dict] = []
    result = experiment.run(settings, quiet(), listen=heard.append)
    (began,) = (event for event in heard if event["kind"] == "began")
    assert 0 < began["step"] < 24
    assert result["steps"] == 24
    with checkpoint.newest(Folder(result["folder"])) as folder:
        assert "rank0.cuda" in load_file(folder / "random.safetensors")
