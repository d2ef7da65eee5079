"""Prepared Parquet in, batches of tensors out: shuffled shares for training, plain order for encoding.

Which clips a worker sees in a step follows from the seed, the epoch, the worker's rank, the number of workers and the size
of the shuffling window, so a run can be taken up at any step. Shuffling goes by row groups first and then within windows
that fit in memory: a corpus on remote storage is read about once per epoch, not once per worker; with loader processes, once
by each of them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ask_ray.config import DataSettings
from ask_ray.data.corpus import ClipRows, Corpus, Group
from ask_ray.data.schema import ROW_GROUP, id_number

Tokenise = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Batch:
    """A training batch on the host.

    inputs: (B, S) float32 waveforms in [-1, 1], sizes: (B,) int64 samples; or inputs: (B, 3, H, W) uint8 pictures, sizes: (B, 2)
    int64 heights and widths, both padded with zeros at the end; words: (B, L) int64 and mask:
    (B, L) bool; ids: (B,) int64, the clips' :func:`id_number`; captions: (B,) int64, which of a clip's captions.
    """

    inputs: Tensor
    sizes: Tensor
    words: Tensor
    mask: Tensor
    ids: Tensor
    captions: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def pad(signals: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Waveforms, or pictures, as :meth:`ask_ray.data.corpus.ClipRows.signal` gives them: `inputs` and `sizes` of a batch."""
    return _pad_pictures(signals) if signals[0].ndim == 3 else _pad_waveforms(signals)


def _pad_pictures(pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([one.shape[:2] for one in pictures], dtype=torch.int64)
    padded = torch.zeros(len(pictures), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
    for row, one in enumerate(pictures):
        padded[row, :, : one.shape[0], : one.shape[1]] = torch.from_numpy(np.array(one)).permute(2, 0, 1)
    return padded, sizes


def _pad_waveforms(waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(one) for one in waveforms], dtype=torch.int64)
    padded = torch.zeros(len(waveforms), int(lengths.max()))
    for row, one in enumerate(waveforms):
        padded[row, : len(one)] = torch.from_numpy(one.astype(np.float32) / 32768.0)
    return padded, lengths


def epoch_order(groups: Sequence[int], seed: int, epoch: int, rank: int, workers: int, window: int) -> list[tuple[int, int]]:
    """The clips a worker sees in an epoch, in order.

    Row groups are put in random order and their rows dealt to the workers as contiguous shares of equal size (what is
    left over sits out this epoch); each share is shuffled in windows.

    Args:
        groups: clips in each row group.
        window: clips shuffled together.

    Returns:
        (row group, row in it) pairs, the same number for every rank.
    """
    shared = np.random.default_rng([seed, epoch])
    rows = np.concatenate([[(group, row) for row in range(groups[group])] for group in shared.permutation(len(groups))])
    share = len(rows) // workers
    mine = rows[rank * share : (rank + 1) * share]
    own = np.random.default_rng([seed, epoch, rank])
    shuffled = [own.permutation(mine[start : start + window]) for start in range(0, len(mine), window)]
    return [(int(group), int(row)) for group, row in np.concatenate(shuffled)]


def steps_of(clips: int, workers: int, batch_size: int) -> int:
    """Steps of an epoch: each worker has an equal share of the clips, and only whole batches count."""
    return clips // workers // batch_size


@dataclass(frozen=True)
class TrainingBatches:
    """A worker's training batches.

    Every batch holds `batch_size` pairs: a clip with one of its captions, drawn anew each epoch.
    """

    corpus: Corpus
    data: DataSettings
    tokenise: Tokenise
    batch_size: int
    seed: int
    rank: int
    workers: int

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same for every rank."""
        return steps_of(self.corpus.clips("train"), self.workers, self.batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The epoch's batches from step `first` on."""
        loaders = self.data.loader_processes
        yield from DataLoader(
            _Epoch(self, epoch, first),
            batch_size=None,
            num_workers=loaders,
            generator=torch.Generator(),  # not the model's: an epoch that is taken up would draw one number more of it
            multiprocessing_context=_loader_context() if loaders else None,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a loader process is given: it fills a cache of its own."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _groups(self) -> list[Group]:
        return self.corpus.groups("train")

    @property
    def _cache_bytes(self) -> int:
        """What one process may keep: loader processes share what the worker is given."""
        return max((self.data.cache_mib << 20) // max(1, self.data.loader_processes), 1)

    @cached_property
    def _cache(self) -> LRUCache[Group, ClipRows]:
        """Row groups as they were read; the last one stays, however large it is."""
        limit = self._cache_bytes
        return LRUCache(maxsize=limit, getsizeof=lambda rows: min(rows.samples.nbytes, limit))

    def _rows(self, group: Group) -> ClipRows:
        if group not in self._cache:
            self._cache[group] = self.corpus.read(group)
        return self._cache[group]

    def _window(self) -> int:
        """Clips to shuffle together: as many as asked for, if the cache holds their row groups, whole also at both ends."""
        fit = int(self._cache_bytes / max(1.0, self.corpus.mean_bytes("train"))) - 2 * ROW_GROUP
        return max(self.batch_size, min(self.data.shuffle_clips, fit))

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        sizes = [group.clips for group in self._groups]
        return epoch_order(sizes, self.seed, epoch, self.rank, self.workers, self._window())

    def _batch(self, places: Sequence[tuple[int, int]], rng: np.random.Generator) -> Batch:
        read = {group: self._rows(self._groups[group]) for group in dict.fromkeys(group for group, _ in places)}
        rows = [(read[group], row) for group, row in places]
        limit = longest(self.data.max_seconds, self.corpus.sample_rate)
        inputs, sizes = pad([crop(found.signal(row), limit, rng) for found, row in rows])
        chosen = [int(rng.integers(len(found.captions[row]))) for found, row in rows]
        words, mask = self.tokenise([found.captions[row][n] for (found, row), n in zip(rows, chosen, strict=True)])
        ids = torch.tensor([id_number(found.ids[row]) for found, row in rows], dtype=torch.int64)
        return Batch(inputs, sizes, words, mask, ids, torch.tensor(chosen, dtype=torch.int64))


def _loader_context() -> ForkServerContext:
    """Loader processes are forked from a process without threads: a fork of the worker inherits the locks that its threads
    hold at that moment, such as those of the client of an object storage, and waits for them for ever."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Epoch(IterableDataset[Batch]):
    """One epoch for torch's loader; with loader processes, each makes every n-th batch, and the order stays."""

    def __init__(self, batches: TrainingBatches, epoch: int, first: int) -> None:
        self.batches, self.number, self.first = batches, epoch, first

    def __iter__(self) -> Iterator[Batch]:
        batches = self.batches
        info = torch.utils.data.get_worker_info()
        skip, stride = (info.id, info.num_workers) if info else (0, 1)
        order = batches._order(self.number)
        for step in range(self.first + skip, batches.steps, stride):
            rng = np.random.default_rng([batches.seed, self.number, batches.rank, step])
            yield batches._batch(order[step * batches.batch_size : (step + 1) * batches.batch_size], rng)


def longest(seconds: float, sample_rate: int | None) -> int | None:
    """What clips are cropped to, in samples; None of pictures, which their towers crop."""
    return None if sample_rate is None else round(seconds * sample_rate)


def crop(signal: np.ndarray, limit: int | None, rng: np.random.Generator | None = None) -> np.ndarray:
    """At most `limit` samples: from a random place if `rng` is given, else from the start."""
    if limit is None or len(signal) <= limit:
        return signal
    start = 0 if rng is None else int(rng.integers(len(signal) - limit + 1))
    return signal[start : start + limit]
