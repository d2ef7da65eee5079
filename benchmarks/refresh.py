"""What a refresh costs: the pool against a bare loop, the swap of a large knowledge base, `async` against `sync`.

    python benchmarks/refresh.py                        all three, about a quarter of an hour
    python benchmarks/refresh.py --parts encoding swap

encoding: clips a second of one encoder actor, its start-up aside, over those of a plain loop over the same
    batches with the same model in an actor of the same share. In turn, so that whatever else the machine does falls on both.
swap: milliseconds that a swap takes of the step loop of two data-parallel processes, with 100 000 entries of 512 numbers; then
    with write-back, where a version takes over what was overwritten while it was made.
modes: seconds of the same training steps in `async` over those in `sync` mode, with two workers (no core is idle) and with one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed
from ray.actor import ActorHandle
from step_overhead import batch_of, rows

from ask_ray.config import PoolSettings, load
from ask_ray.data.batches import Batch
from ask_ray.data.prepare import prepare
from ask_ray.journal import Journal
from ask_ray.knowledge import index, snapshot
from ask_ray.knowledge.encoding import Encoder, EncodingPlan, encode
from ask_ray.knowledge.policy import Clock
from ask_ray.knowledge.replica import Replica
from ask_ray.knowledge.snapshot import TRAIN, Embeddings, Entries
from ask_ray.knowledge.sources import sources_of
from ask_ray.models import registry
from ask_ray.storage import Folder
from ask_ray.training.gauges import Gauges
from ask_ray.training.step import Stepper
from ask_ray.training.upkeep import Upkeep

ROOT = Path(__file__).parents[1]
RANKS = 2

#: The bars: the least share of the bare loop, the most milliseconds of a swap at the 95th percentile, the largest ratio of modes.
SHARE, SWAP_MS, RATIO = 0.90, 20.0, 1.02


def start_ray() -> None:
    """A session of this benchmark's own, in which nothing waits for a CPU."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


# --- encoding ---


@ray.remote
class Loop:
    """The bare loop: an encoder that is handed one unit after the other by nobody."""

    def __init__(self, plan: EncodingPlan, weights: list[ray.ObjectRef]) -> None:
        self._encoder = Encoder(plan, weights)

    def run(self) -> float:
        """Clips a second, the first unit aside, as of the pool."""
        clips, started = 0, 0.0
        for unit in range(len(self._encoder.units)):
            made = self._encoder({"unit": np.array([unit])})
            if unit == 0:
                started = time.perf_counter()
            else:
                clips += int(made["clips"][0])
        return clips / (time.perf_counter() - started)


def pooled(plan: EncodingPlan, weights: ray.ObjectRef) -> float:
    """Clips a second of the pool over the last three quarters: the first units come late, several at once."""
    seen: list[tuple[float, int]] = []
    encode(plan, weights, lambda done, total: seen.append((time.perf_counter(), done)))
    last, after = seen[-1]
    first, before = next(one for one in seen if one[1] >= after / 4)
    return (after - before) / (last - first)


def encoding(prepared: str, rounds: int, clips: int) -> bool:
    """Whether the pool reaches its share of the bare loop."""
    soundscapes = {"train": clips, "validation": 0, "test": 1}
    settings = load({"data": {"prepared": prepared, "soundscapes": soundscapes}})
    start_ray()
    try:
        corpus = prepare(settings.data)
        pool = PoolSettings(cpus=0.5)
        plan = EncodingPlan(sources_of([TRAIN], corpus.folder.uri), 1, settings.data.max_seconds, settings.model, pool)
        weights = ray.put(registry.build(settings.model, corpus.sample_rate).state_dict())
        loop = Loop.options(num_cpus=pool.cpus).remote(plan, [weights])  # type: ignore[attr-defined]
        ratios, loops = [], []
        for number in range(rounds):
            in_turn: list[Callable[[], float]] = [lambda: pooled(plan, weights), lambda: ray.get(loop.run.remote())]
            told = {kind: in_turn[kind]() for kind in ((0, 1) if number % 2 else (1, 0))}
            ratios.append(told[0] / told[1])
            loops.append(told[1])
            print(f"\rencoding: round {number + 1} of {rounds}, {ratios[-1]:.3f}", end="", flush=True)
    finally:
        ray.shutdown()
    share = statistics.median(ratios)
    print(f"\rencoding: the pool reaches {share:.3f} of a bare loop's {statistics.median(loops):.0f} clips/s (bar {SHARE:.2f}); "
          f"{rounds} rounds from {min(ratios):.3f} to {max(ratios):.3f}")  # fmt: skip
    return share >= SHARE


# --- the swap ---


@ray.remote(num_cpus=0)
class Line:
    """The versions there are: what a replica asks of a refiner."""

    def __init__(self) -> None:
        self._versions: list[int] = []

    def add(self, version: int) -> None:
        """A version was published."""
        self._versions.append(version)

    def next_after(self, version: int, wait_seconds: float) -> int | None:
        """The first version after `version`."""
        time.sleep(min(wait_seconds, 0.05))
        return next((known for known in self._versions if known > version), None)

    def start_from(self, version: int) -> None:
        """A refiner forgets later versions here; this line has none."""

    def swapped(self, version: int) -> None:
        """A refiner prunes by it."""

    def refused(self, version: int) -> None:
        """A replica could not use a version."""
        raise RuntimeError(f"v{version} was refused")


def large(entries: int, dim: int) -> tuple[Entries, Embeddings, Embeddings, tuple]:
    """A knowledge base of random rows about 1000 centres, with what a refresh builds of it."""
    centres = rows(1000, dim, 0)[np.random.default_rng(0).integers(0, 1000, entries)]
    audio, text = (_unit(centres + 0.5 * rows(entries, dim, seed)) for seed in (1, 2))
    numbers = np.arange(entries, dtype=np.int64)
    told = Entries.of_lists([f"e{n}" for n in numbers], numbers, ["a sound"] * entries, numbers * 0, [TRAIN] * entries)
    paired = Embeddings(*index.prototypes(audio, text, 128, 0))
    return told, Embeddings(audio, text), paired, (index.build(audio, 50_000, 32, 0), index.build(text, 50_000, 32, 0))


def _unit(drawn: np.ndarray) -> np.ndarray:
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)


@ray.remote
class Rank:
    """One of two data-parallel processes that step, read the knowledge base, and swap."""

    def __init__(
        self, rank: int, place: str, dim: int, entries: int, write_back: bool, line: ActorHandle, journal: Journal
    ) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", f"file://{place}/meet", rank=rank, world_size=RANKS)
        knowledge = {"refresh": {"policy": "static"}, "corrections": {"write_back": write_back}}
        self._settings = load({"model": {"dim": dim}, "knowledge": knowledge})
        self._ids = np.random.default_rng(rank).permutation(np.arange(rank, entries, RANKS))  # no pair is on two ranks
        model = registry.build(self._settings.model, 16000)
        self._batch = batch_of(model, 32, 64000, rank)
        cpu = torch.device("cpu")
        replica = Replica(line, Folder(place) / "knowledge", "benchmark", dim, cpu, journal, rank, corrected=write_back)
        gauges = Gauges("benchmark")
        self._upkeep = Upkeep(self._settings.knowledge, replica, line, journal, gauges, model, 10**6, rank, cpu)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        self._stepper = Stepper(wrapped, model, self._settings, 10**6, cpu)

    def run(self, swaps: int) -> list[float]:
        """Step until so many versions were swapped in: seconds of each step."""
        self._upkeep.begin(0, None, Clock(), {})
        took: list[float] = []
        while self._upkeep.version < swaps:
            started = time.perf_counter()
            self._upkeep.before_step(len(took), epoch_starts=False)
            taken = self._stepper.take(self._next(len(took)), self._upkeep.known)
            self._upkeep.after_step(taken, len(took) + 1)
            took.append(time.perf_counter() - started)
        return took

    def _next(self, step: int) -> Batch:
        """The batch of a step, with the ids of other entries each time."""
        places = step * len(self._batch.ids) + np.arange(len(self._batch.ids))
        return dataclasses.replace(self._batch, ids=torch.from_numpy(self._ids[places % len(self._ids)]))


def swap(swaps: int, entries: int, dim: int) -> bool:
    """Whether swaps are short enough, without and with write-back."""
    short = [_swap(swaps, entries, dim, write_back) for write_back in (False, True)]
    return all(short)


def _swap(swaps: int, entries: int, dim: int, write_back: bool) -> bool:
    """The versions are published while two processes step, each as of the step at which the last one came into use."""
    start_ray()
    name = "swap, with write-back" if write_back else "swap"
    with tempfile.TemporaryDirectory() as place:
        try:
            print(f"{name}: building a version", end="", flush=True)
            told, whole, paired, built = large(entries, dim)
            line = Line.options(max_concurrency=8).remote()  # type: ignore[attr-defined]
            journal, keeper = Journal.start()
            made = [Rank.remote(rank, place, dim, entries, write_back, line, journal) for rank in range(RANKS)]  # type: ignore[attr-defined]
            stepping, home, step = [rank.run.remote(swaps) for rank in made], Folder(place) / "knowledge", 0
            for version in range(1, swaps + 1):
                snapshot.publish(home, version, told, whole, paired, built, {"run": "benchmark", "encoder_step": step})
                ray.get(line.add.remote(version))
                step = _swapped_at(journal, version)
                snapshot.prune(home, 2, [])
                print(f"\r{name}: version {version} of {swaps}    ", end="", flush=True)
            steps = [one for took in ray.get(stepping) for one in took]
            took = [event["swap_ms"] for event in journal.events() if event["kind"] == "swapped"]
            ray.kill(keeper)
        finally:
            ray.shutdown()
    worst = float(np.percentile(took, 95))
    print(
        f"\r{name}: N = {entries}, d = {dim}: {statistics.median(took):.1f} ms in the median, {worst:.1f} ms at the 95th "
        f"percentile of {len(took)} (bar {SWAP_MS:.0f}); steps meanwhile {1000 * statistics.median(steps):.0f} ms in the median, "
        f"{1000 * float(np.percentile(steps, 99)):.0f} ms at the 99th percentile"
    )
    return worst <= SWAP_MS


def _swapped_at(journal: Journal, version: int) -> int:
    """The step from which all ranks use a version, when they do."""
    while True:
        steps = [event["step"] for event in journal.events() if event["kind"] == "swapped" and event["version"] == version]
        if len(steps) == RANKS:
            return max(steps)
        time.sleep(0.1)


# --- the modes ---

#: Refreshes after epochs 1, 4, 7 and 10 of 12: each has three epochs' time to come in, so that both modes make all of them.
MODES = ["--training.epochs", "12", "--training.evaluate_every", "0", "--knowledge.drift_probe", "0"]
MODES += ["--knowledge.refresh.interval", "3", "--knowledge.refresh.warmup_epochs", "1", "--tracking.enabled", "false"]


def seconds(mode: str, workers: int, prepared: str, clips: int) -> tuple[float, int]:
    """Seconds that all steps of a run took, its refreshes included, and how many versions were swapped in meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        told = ["--run.storage", folder, "--run.name", "run", "--data.prepared", prepared, "--knowledge.refresh.mode", mode]
        told += ["--training.workers", str(workers), "--training.batch_size", str(64 // workers)]
        told += ["--data.soundscapes.train", str(clips), "--data.soundscapes.test", "64", "--data.soundscapes.validation", "0"]
        subprocess.run([sys.executable, str(ROOT / "jobs/train.py"), *MODES, *told], check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "run/result.json").read_text())
        return float(result["training_seconds"]), len(result["refreshes"]) - 1  # the last is for search


def modes(prepared: str, rounds: int, clips: int) -> bool:
    """Whether `async` takes no longer than `sync` for the same steps and refreshes where no core is idle, less where one is."""
    good = True
    for workers, told, bar in ((2, "two workers, no idle core", RATIO), (1, "one worker, an idle core", 1.0)):
        ratios = []
        for number in range(rounds):
            order = ("async", "sync") if number % 2 else ("sync", "async")
            took = {mode: seconds(mode, workers, prepared, clips) for mode in order}
            (later, its), (waiting, others) = took["async"], took["sync"]
            ratios.append(later / waiting)
            both = f"async {later:.1f} s ({its} refreshes), sync {waiting:.1f} s ({others})"
            print(f"modes: {told}: {both}, ratio {ratios[-1]:.3f}", flush=True)
            if its != others:
                print("modes: they did not do the same: train on more clips (--clips), so that each refresh has time to come in")
                good = False
        print(f"modes: {told}: async over sync {statistics.median(ratios):.3f} (bar: below {bar:.2f})", flush=True)
        good &= statistics.median(ratios) < bar
    return good


def main() -> None:
    """Measure the parts asked for; exits with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", choices=["encoding", "swap", "modes"], nargs="*", default=["encoding", "swap", "modes"])
    parser.add_argument("--rounds", type=int, default=4, help="pairs of measurements of encoding; half as many of modes")
    parser.add_argument("--clips", type=int, default=2000, help="clips encoded, and trained on")
    parser.add_argument("--swaps", type=int, default=25, help="versions swapped in")
    parser.add_argument("--entries", type=int, default=100_000, help="N of the swapped versions")
    parser.add_argument("--dim", type=int, default=512, help="d of the swapped versions")
    parser.add_argument("--prepared", default="prepared", help="where prepared corpora are kept")
    asked = parser.parse_args()
    parts: dict[str, Callable[[], bool]] = {
        "encoding": lambda: encoding(asked.prepared, asked.rounds, asked.clips),
        "swap": lambda: swap(asked.swaps, asked.entries, asked.dim),
        "modes": lambda: modes(asked.prepared, max(1, asked.rounds // 2), asked.clips),
    }
    missed = [part for part in asked.parts if not parts[part]()]
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
