"""What preparing a corpus costs beside its codecs: clips a second over those of a bare loop, on the same two cores.

    python benchmarks/prepare.py                       2000 clips
    python benchmarks/prepare.py --clips 100 --rounds 1

The clips are made for it: 10 s, 44.1 kHz, stereo, as wav, flac, ogg and mp3 in equal shares. The bare loop is two processes that
decode with libsndfile, average the channels, resample with soxr, quantise and write Parquet: no checks, no digests, nothing kept
out of training. Both prepare all clips in turn, and each round begins with the other one, so that whatever else the machine does
falls on both. Processes are started, and have imported what they need, before the first round.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import soundfile
import soxr

from ask_ray import cluster
from ask_ray.config import DataSettings, FolderSettings, Settings
from ask_ray.data.prepare import prepare

PROCESSES = 2
RATE, SECONDS, CHANNELS, TARGET = 44100, 10, 2, 16000
ENDINGS = ("wav", "flac", "ogg", "mp3")
FILE_CLIPS = 64
BAR = 0.85


def make(place: str, number: int) -> str:
    """Write one clip: a chord that swells and fades over noise, another one in each ear."""
    draw = np.random.default_rng(number)
    clock = np.arange(RATE * SECONDS, dtype=np.float32)[:, None] / RATE
    pitches, swell = draw.uniform(80, 4000, (4, CHANNELS)), draw.uniform(0.1, 1, CHANNELS)
    chord = sum(np.sin(2 * np.pi * pitch * clock) for pitch in pitches) * (0.5 + 0.5 * np.sin(2 * np.pi * swell * clock))
    samples = 0.08 * chord + 0.02 * draw.standard_normal((len(clock), CHANNELS), np.float32)
    name = f"{number:06d}.{ENDINGS[number % len(ENDINGS)]}"
    soundfile.write(Path(place) / name, samples, RATE)
    return name


def bare(files: list[str], target: Path) -> None:
    """Decode, average, resample, quantise and write a file of clips."""
    waveforms = []
    for file in files:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        mono = soxr.resample((samples[:, 0] + samples[:, 1]) / 2, rate, TARGET)
        waveforms.append(np.clip(np.rint(mono * 32767.0), -32768, 32767).astype(np.int16))
    offsets = np.cumsum([0, *(len(one) for one in waveforms)]).astype(np.int32)
    table = pa.table({"id": files, "waveform": pa.ListArray.from_arrays(offsets, np.concatenate(waveforms))})
    pq.write_table(table, target, row_group_size=FILE_CLIPS, compression="none", use_dictionary=False)


def by_bare_loop(pool: Pool, files: list[str], home: Path) -> None:
    """All clips by the bare loop."""
    home.mkdir()
    parts = [files[start : start + FILE_CLIPS] for start in range(0, len(files), FILE_CLIPS)]
    waiting = [pool.apply_async(bare, (part, home / f"{n}.parquet")) for n, part in enumerate(parts)]
    for one in waiting:
        one.get()


def by_ray_data(recordings: Path, home: Path) -> None:
    """All clips by the project."""
    corpus = prepare(data_of(recordings, home))
    if corpus.rejected():
        raise SystemExit(f"clips were set aside: {corpus.rejected()}")


def data_of(recordings: Path, home: Path) -> DataSettings:
    """Settings of the project's part."""
    return DataSettings(
        corpus="folder",
        folder=FolderSettings(path=str(recordings)),
        prepared=str(home),
        sample_rate=TARGET,
        shard_clips=FILE_CLIPS,
        prepare_tasks=PROCESSES,
    )


def listed(recordings: Path, names: list[str]) -> None:
    """Write the manifest of some clips."""
    with (recordings / "captions.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("file_name", "caption"), *((name, "a chord over noise") for name in names)])


def timed(job: Callable[[Path], None], place: Path) -> float:
    """Seconds that a job takes to fill a folder that is removed then."""
    home = place / "out"
    started = time.perf_counter()
    job(home)
    seconds = time.perf_counter() - started
    shutil.rmtree(home)
    return seconds


def measure(place: Path, clips: int, rounds: int) -> float:
    """The median over rounds of the bare loop's seconds over the project's."""
    recordings = place / "recordings"
    recordings.mkdir()
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        names = []
        for name in pool.imap(partial(make, str(recordings)), range(clips), chunksize=8):
            names.append(name)
            print(f"\rmade {len(names)} of {clips} clips", end="", flush=True)
        print()
        jobs: dict[str, Callable[[Path], None]] = {
            "bare": partial(by_bare_loop, pool, [str(recordings / name) for name in names]),
            "ray": partial(by_ray_data, recordings),
        }
        few = names[: 4 * PROCESSES]
        listed(recordings, few)
        warm = data_of(recordings, place / "warm").model_copy(update={"shard_clips": 1})
        prepare(warm)
        by_bare_loop(pool, [str(recordings / name) for name in few], place / "warm-bare")
        listed(recordings, names)
        ratios = []
        for number in range(rounds):
            order = list(jobs) if number % 2 == 0 else list(reversed(jobs))
            seconds = {kind: timed(jobs[kind], place) for kind in order}
            ratios.append(seconds["bare"] / seconds["ray"])
            told = ", ".join(f"{kind} {clips / seconds[kind]:.1f} clips/s" for kind in jobs)
            print(f"round {number + 1}: {told}, ratio {ratios[-1]:.3f}", flush=True)
    return statistics.median(ratios)


def main() -> None:
    """Measure and print the ratio; exits with 1 if it is below its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000, help="how many clips to make")
    parser.add_argument("--rounds", type=int, default=4, help="times that each prepares them all")
    arguments = parser.parse_args()
    cluster.connect(Settings(data=DataSettings(prepare_tasks=PROCESSES)))
    with tempfile.TemporaryDirectory() as place:
        ratio = measure(Path(place), arguments.clips, arguments.rounds)
    ray.shutdown()
    print(f"{arguments.clips} clips of {SECONDS} s, {PROCESSES} processes each: ratio {ratio:.3f} (bar {BAR:.2f})")
    raise SystemExit(int(ratio < BAR))


if __name__ == "__main__":
    main()
