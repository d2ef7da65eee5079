"""What a training worker holds of the knowledge base: the version in use, and newer ones loaded in the background."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from ask_ray.config import AskSettings
from ask_ray.journal import Journal
from ask_ray.knowledge import index as indexes
from ask_ray.knowledge.cache import Cache
from ask_ray.knowledge.overlay import Overlay
from ask_ray.knowledge.requests import AWAY
from ask_ray.knowledge.snapshot import TRAIN, Embeddings, Entries, Snapshot, SnapshotError, open_snapshot
from ask_ray.storage import Folder, StorageError, Tell, patiently


@dataclass(frozen=True)
class Neighbourhood:
    """What one modality's search found for a batch. `rows` (B, K) int64 into a reading's tables; `valid` (B, K) bool."""

    rows: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Reading:
    """One granularity's answer to a batch.

    by_audio, by_text: the neighbourhoods that audio and text retrieved; audio, text: (U, d) float32 tables of the rows
    they name, paired; numbers: (U,) int64 clip numbers of the table's rows, -1 for prototypes; sources: (U,) int64, their
    sources' places in :attr:`~ask_ray.knowledge.snapshot.Entries.sources`, -1 for prototypes.
    """

    by_audio: Neighbourhood
    by_text: Neighbourhood
    audio: Tensor
    text: Tensor
    numbers: Tensor
    sources: Tensor


class Knowledge:
    """A snapshot ready to be read on a device.

    overlay: its corrected rows and indexes, on the CPU, where the settings ask for corrections.
    """

    def __init__(self, snapshot: Snapshot, device: torch.device, overlay: Overlay | None = None) -> None:
        self.version = snapshot.version
        self.encoder_step = int(snapshot.manifest["encoder_step"])
        self.entries: Entries = snapshot.entries
        self._copy = snapshot.copy  # stays on this node for as long as this does
        self._device = device
        self.overlay = overlay
        if overlay is None:
            self._indexes = _on(device, snapshot.audio_index), _on(device, snapshot.text_index)
            self._audio, self._text, self._prototypes_audio, self._prototypes_text = (
                torch.from_numpy(array).to(device)
                for array in (snapshot.audio, snapshot.text, snapshot.prototypes_audio, snapshot.prototypes_text)
            )
        self._locator = self.entries.locator()

    def __len__(self) -> int:
        return len(self.entries)

    def rows(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Stored audio and text rows, (n, d) float32 each, of entries (n,) int64."""
        if self.overlay is not None:
            there = entry.cpu()
            return self.overlay.audio[there].to(self._device), self.overlay.text[there].to(self._device)
        return self._audio[entry], self._text[entry]

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """Paired audio and text prototypes, (Nc, d) float32 each; Nc may be 0."""
        if self.overlay is not None:
            return self.overlay.prototypes_audio.to(self._device), self.overlay.prototypes_text.to(self._device)
        return self._prototypes_audio, self._prototypes_text

    def locate(self, numbers: Tensor, which: Tensor, source: str = TRAIN) -> Tensor:
        """The entries of (clip number, caption) pairs of a source, both (n,) int64: (n,) int64, -1 where the base has none."""
        return torch.from_numpy(self._locator.find(numbers.cpu().numpy(), which.cpu().numpy(), source)).to(numbers.device)

    def read(self, audio: Tensor, text: Tensor, ids: Tensor, all_ids: Tensor, ask: AskSettings) -> dict[str, Reading]:
        """Retrieve for a batch (method: ASK §4.2), within each modality, by inner product.

        Args:
            audio, text: (B, d) float32 unit vectors; no gradient passes.
            ids: (B,) int64 clip numbers of the pairs; all_ids: those of the global batch.

        Returns:
            `fine` and `coarse` readings, as the settings ask for.
        """
        made = {}
        if ask.fine:
            made["fine"] = self._fine(audio, text, _excluded(ids, all_ids, ask), ask.neighbours)
        tables = self.prototypes()
        if ask.coarse and len(tables[0]):
            made["coarse"] = self._coarse(audio, text, tables, ask.neighbours)
        return made

    def _fine(self, audio: Tensor, text: Tensor, excluded: np.ndarray, k: int) -> Reading:
        held = self._indexes if self.overlay is None else (self.overlay.audio_index, self.overlay.text_index)
        found = [
            indexes.retrieve(index, query.cpu().numpy(), k, self.entries.numbers, excluded, self.entries.most_per_clip).entry
            for index, query in zip(held, (audio, text), strict=True)
        ]
        unique, inverse = np.unique(np.stack(found), return_inverse=True)
        table = torch.from_numpy(np.maximum(unique, 0)).to(self._device)
        places = torch.from_numpy(inverse.reshape(2, *found[0].shape)).to(self._device)
        valid = torch.from_numpy(np.stack(found) >= 0).to(self._device)
        told = [
            torch.from_numpy(np.where(unique >= 0, of[np.maximum(unique, 0)].astype(np.int64), -1)).to(self._device)
            for of in (self.entries.numbers, self.entries.source)
        ]
        stored = self.rows(table)
        return Reading(Neighbourhood(places[0], valid[0]), Neighbourhood(places[1], valid[1]), *stored, *told)

    def _coarse(self, audio: Tensor, text: Tensor, tables: tuple[Tensor, Tensor], k: int) -> Reading:
        k = min(k, len(tables[0]))
        found = [(query.detach() @ table.T).topk(k, dim=1).indices for query, table in zip((audio, text), tables, strict=True)]
        every = torch.ones_like(found[0], dtype=torch.bool)
        none = torch.full((len(tables[0]),), -1, device=self._device)
        return Reading(Neighbourhood(found[0], every), Neighbourhood(found[1], every), *tables, none, none)


def _excluded(ids: Tensor, all_ids: Tensor, ask: AskSettings) -> np.ndarray:
    """(B, E) int64 clip numbers that each pair may not retrieve."""
    own = ids.cpu().numpy()[:, None]
    if ask.exclude == "none":
        return own[:, :0]
    if ask.exclude == "self":
        return own
    every = np.unique(all_ids.cpu().numpy())
    return np.broadcast_to(every, (len(own), len(every)))


def _on(device: torch.device, index: faiss.Index) -> faiss.Index:
    """An opened index where a device's queries are best answered."""
    return indexes.on_gpu(index, device.index or 0) if device.type == "cuda" else index


def overlay_of(opened: Snapshot) -> Overlay:
    """A version's rows and indexes, opened mutable, ready to be corrected."""
    return Overlay(
        Embeddings(opened.audio, opened.text),
        Embeddings(opened.prototypes_audio, opened.prototypes_text),
        (opened.audio_index, opened.text_index),
        int(opened.manifest["encoder_step"]),
    )


class Replica:
    """The versions a worker has loaded. A background thread opens and verifies new ones in the order of their numbers."""

    def __init__(
        self,
        refiner: ActorHandle,
        home: Folder,
        run: str,
        dim: int,
        device: torch.device,
        journal: Journal,
        rank: int,
        corrected: bool = False,
        cache: Cache = Cache(),  # noqa: B008 (frozen)
    ) -> None:
        """`corrected` keeps an :class:`Overlay` of every version, for corrections between refreshes; `cache` is the node's."""
        self._corrected, self._cache = corrected, cache
        self._refiner, self._journal, self._rank = refiner, journal, rank
        self._home, self._run, self._dim, self._device = home, run, dim, device
        self._loaded: dict[int, Knowledge] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._seen = 0
        self._problem: Exception | None = None
        self.current: Knowledge | None = None

    def open(self, version: int, away: Tell) -> None:
        """Use `version` from the start, 0 for none. Storage that is away is tried again for a while; `away` hears of it.

        Raises:
            SnapshotError: if the version cannot be opened.
            StorageError: if it stays away.
        """
        if version:
            self.current = self._home.patiently(lambda: self._open(version), away)

    def watch(self, version: int) -> None:
        """Load the versions after `version` in the background, from now on."""
        self._seen = version
        threading.Thread(target=self._watch, name="knowledge-loader", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    @property
    def version(self) -> int:
        """The version in use, 0 for none."""
        return self.current.version if self.current else 0

    @property
    def newest(self) -> int:
        """The newest version loaded, which may be the one in use.

        Raises:
            Exception: what ended the background thread, such as a StorageError if a version could not be read for longer than
                storage is waited for: training on without new ones, on all ranks, would pass unnoticed.
        """
        if self._problem is not None:
            raise self._problem
        with self._lock:
            return max(self._loaded, default=self.version)

    def has(self, version: int) -> bool:
        """Whether a version could be swapped in now."""
        with self._lock:
            return version in self._loaded

    def seen(self, version: int) -> bool:
        """Whether a version has been loaded or refused."""
        return self._seen >= version

    def swap(self, version: int) -> None:
        """Use a loaded version from now on and let older ones go. It will catch up with the entries overwritten since its
        encoding."""
        with self._lock:
            older, newer = self.current, self._loaded[version]
            if newer.overlay is not None and older is not None and older.overlay is not None:
                newer.overlay.carry_over(older.overlay)
            self.current = newer
            self._loaded = {number: known for number, known in self._loaded.items() if number > version}

    def wait_until_seen(self, version: int, seconds: float = 600.0) -> None:
        """Wait until the background thread has loaded or refused `version`; one that takes longer is told as refused. What ended
        the thread is for :attr:`newest` to tell."""
        end = time.monotonic() + seconds
        while not self.seen(version) and self._problem is None and time.monotonic() < end:
            time.sleep(0.005)
        if not self.seen(version) and self._problem is None:
            problem = f"not loaded in {seconds:g} s: v{self.version} stays in use"
            self._journal.tell("refused", version=version, rank=self._rank, problem=problem)

    def _open(self, version: int) -> Knowledge:
        opened, overlay = self._read(version)
        return Knowledge(opened, self._device, overlay)  # what goes wrong here, such as a full GPU, is no fault of the version's

    def _read(self, version: int) -> tuple[Snapshot, Overlay | None]:
        """Raises SnapshotError if something is wrong with the version, StorageError if its storage or the disk of copies is."""
        try:
            opened = open_snapshot(self._home, version, self._run, self._dim, self._corrected, self._cache)
            return opened, overlay_of(opened) if self._corrected else None
        except SnapshotError:
            raise
        except OSError as error:
            if self._home.local is None:
                raise StorageError(f"{self._home}, v{version}: {error}") from error
            raise SnapshotError(f"{self._home}, v{version}: cannot be read ({error})") from error
        except (ValueError, RuntimeError) as error:  # of FAISS and NumPy
            raise SnapshotError(f"{self._home}, v{version}: cannot be opened ({error})") from error

    def _watch(self) -> None:
        try:
            while not self._stopped.is_set():
                self._load_next()
        except Exception as error:  # nobody hears what a thread raises
            self._problem = None if self._stopped.is_set() else error

    def _load_next(self) -> None:
        """Wait a while for the next version, and load it."""
        try:
            version: Any = ray.get(self._refiner.next_after.remote(self._seen, 5.0), timeout=30)
        except AWAY:
            time.sleep(0.5)
            return
        if version is not None and not self._stopped.is_set():
            self._load(version)

    def _load(self, version: int) -> None:
        """Open a version. Storage that is away is tried again for a while; a damaged snapshot is refused, and made again.

        Raises:
            StorageError: if it stays away.
        """
        started = time.time()
        try:
            known = patiently(lambda: self._open(version), lambda error: self._unreadable(version, error), self._stopped)
        except SnapshotError as error:
            self._journal.tell("refused", version=version, rank=self._rank, problem=str(error))
            self._refiner.refused.remote(version)
        else:
            with self._lock:
                self._loaded[version] = known
            self._journal.tell("loaded", version=version, rank=self._rank, seconds=time.time() - started)
        self._seen = version

    def _unreadable(self, version: int, error: StorageError) -> None:
        self._journal.tell("unreadable", version=version, rank=self._rank, problem=str(error))
