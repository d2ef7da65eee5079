"""What ASK costs a training step: seconds a step with it over seconds a step of plain NT-Xent, in one pair of processes.

    python benchmarks/step_overhead.py                          tiny towers, then resnet38 + bert
    python benchmarks/step_overhead.py --towers tiny --steps 40
    python benchmarks/step_overhead.py --device cuda --towers paper --pairs 64 --seconds 10 --entries 1000000 --steps 30

Two data-parallel processes (gloo), or one on a GPU, hold two copies of the same towers. They take a plain step and an ASK step
in turn, on the same batches, so that whatever else the machine does falls on both. The knowledge base has 10 000 entries, if not
told otherwise. The bars are for the sizes that two cores can hold, and for these alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing

from ask_ray.config import AskSettings, ModelSettings, Settings
from ask_ray.data.batches import Batch
from ask_ray.knowledge import index, snapshot
from ask_ray.knowledge.replica import Knowledge
from ask_ray.knowledge.snapshot import TRAIN, Embeddings, Entries
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.storage import Folder
from ask_ray.training.step import Stepper

RANKS = 2

#: towers: audio, text, Hz, seconds a clip, pairs per process, steps, the largest ratio that is good enough.
CASES = {"tiny": ("tiny", "tiny", 16000, 4.0, 32, 30, 1.30), "paper": ("resnet38", "bert", 32000, 2.0, 4, 5, 1.05)}


def rows(count: int, dim: int, seed: int) -> np.ndarray:
    """(count, dim) float32 unit rows."""
    drawn = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)


def publish(home: Folder, entries: int, dim: int, prototypes: int) -> None:
    """A knowledge base of random unit rows: the cost of reading it does not depend on what they mean."""
    audio, text = rows(entries, dim, 1), rows(entries, dim, 2)
    numbers = np.arange(entries, dtype=np.int64)
    told = Entries.of_lists([f"e{n}" for n in numbers], numbers, ["a sound"] * entries, numbers * 0, [TRAIN] * entries)
    paired = Embeddings(*index.prototypes(audio, text, prototypes, 0))
    built = index.build(audio, 50_000, 32, 0), index.build(text, 50_000, 32, 0)
    snapshot.publish(home, 1, told, Embeddings(audio, text), paired, built, {"run": "benchmark", "encoder_step": 0})


def batch_of(model: DualEncoder, size: int, samples: int, rank: int) -> Batch:
    """A batch whose ids are entries of the knowledge base."""
    draw = np.random.default_rng(rank)
    words, mask = model.tokenise([f"a dog barks {n} times before the rain falls on a roof" for n in range(size)])
    ids = torch.arange(rank * size, (rank + 1) * size)
    waveforms = torch.from_numpy(draw.standard_normal((size, samples)).astype(np.float32)) * 0.1
    return Batch(waveforms, torch.full((size,), samples), words, mask, ids, ids * 0)


def measure(rank: int, place: str, name: str, asked: argparse.Namespace) -> None:
    """One process of as many as there are; rank 0 writes the medians."""
    torch.set_num_threads(1)
    device = torch.device(asked.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{place}/meet", rank=rank, world_size=ranks(asked.device))
    audio, text, rate, seconds, size, default_steps, _ = CASES[name]
    seconds, size = asked.seconds or seconds, asked.pairs or size
    home, model_settings = Folder(place), ModelSettings(audio=audio, text=text)
    base = Settings(model=model_settings)
    plain = base.model_copy(update={"ask": AskSettings(enabled=False)})
    if rank == 0:
        publish(home, asked.entries, base.model.dim, base.ask.prototypes)
    torch.distributed.barrier()
    known = Knowledge(snapshot.open_snapshot(home, 1, "benchmark", base.model.dim), device)
    kinds = {"plain": (plain, None), "ask": (base, known)}
    steppers, batch = {}, None
    for kind, (settings, _) in kinds.items():
        torch.manual_seed(0)
        model = registry.build(settings.model, rate).to(device)
        batch = batch_of(model, size, round(seconds * rate), rank).to(device)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        steppers[kind] = Stepper(wrapped, model, settings, 1000, device)
    assert batch is not None
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for step in range((asked.steps or default_steps) + 1):
        for kind in kinds if step % 2 else reversed(list(kinds)):
            torch.distributed.barrier()
            started = time.perf_counter()
            steppers[kind].take(batch, kinds[kind][1])
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step:  # the first step of each warms up
                taken[kind].append(time.perf_counter() - started)
        if rank == 0:
            print(f"\r{name}: step {step}", end="", flush=True)
    if rank == 0:
        medians = {kind: statistics.median(times) for kind, times in taken.items()}
        (Path(place) / "medians.json").write_text(json.dumps(medians), encoding="utf-8")
    torch.distributed.destroy_process_group()


def ranks(device: str) -> int:
    """How many processes take part."""
    return 1 if device == "cuda" else RANKS


def main() -> None:
    """Measure the cases asked for and print a line each; exits with 1 if a ratio is above its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", choices=sorted(CASES), nargs="*", default=list(CASES), help="which pairs of towers")
    parser.add_argument("--entries", type=int, default=10_000, help="N, entries of the knowledge base")
    parser.add_argument("--steps", type=int, default=None, help="timed steps of each kind; unset: as many as suit the towers")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="two processes on CPUs, or one on a GPU")
    parser.add_argument("--pairs", type=int, default=None, help="pairs a process and step; unset: what two cores can hold")
    parser.add_argument("--seconds", type=float, default=None, help="seconds a clip; unset: as many as suit the towers")
    arguments = parser.parse_args()
    missed = False
    for name in arguments.towers:
        with tempfile.TemporaryDirectory() as place:
            torch.multiprocessing.spawn(measure, (place, name, arguments), nprocs=ranks(arguments.device))
            medians = json.loads((Path(place) / "medians.json").read_text(encoding="utf-8"))
        ratio, bar = medians["ask"] / medians["plain"], CASES[name][-1]
        judged = arguments.device == "cpu" and not (arguments.pairs or arguments.seconds)
        missed |= judged and ratio > bar
        print(
            f"\r{CASES[name][0]} + {CASES[name][1]}, N = {arguments.entries}: plain {medians['plain']:.3f} s, ASK "
            f"{medians['ask']:.3f} s a step, ratio {ratio:.3f}" + (f" (bar {bar:.2f})" if judged else "")
        )
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
