"""Immutable, versioned snapshots of a knowledge base: write, verify, open, prune.

A version is a folder ``v000001`` of plain files. ``manifest.json`` is written last and names every other file with its
size and digest, and carries a digest of itself: a folder without one is no snapshot, and one that does not fit its
manifest is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ask_ray import scratch
from ask_ray.config import UserError
from ask_ray.knowledge import index as indexes
from ask_ray.knowledge.cache import Cache, Copy
from ask_ray.storage import Folder, digest_bytes, digest_file

FORMAT = 2
MANIFEST = "manifest.json"
ENTRIES = "entries.parquet"
ARRAYS = ("audio", "text", "prototypes_audio", "prototypes_text")
INDEXES = ("audio", "text")

#: The source of the entries made of the run's own training split.
TRAIN = "train"


class SnapshotError(UserError, RuntimeError):
    """A snapshot that is missing, damaged or not the one asked for. The message names the folder and the file."""


@dataclass(frozen=True, eq=False)
class Entries:
    """What the rows of a knowledge base are: one (clip, caption) pair each.

    Texts stay in Arrow memory, and only those asked for become Python's: opening 100 000s of entries in a thread beside the
    training loop does not hold it up.

    ids, captions: (N,) Arrow strings: ``ids[n].as_py()`` is one; numbers: (N,) int64, the clips' numbers; which: (N,) int64,
    which caption of the clip; source: (N,) int32 into `sources`, the names of what the entries come from; most_per_clip: the
    most entries that one clip has, over all sources.
    """

    ids: pa.ChunkedArray
    numbers: np.ndarray
    captions: pa.ChunkedArray
    which: np.ndarray
    source: np.ndarray
    sources: list[str]
    most_per_clip: int

    @classmethod
    def of_lists(
        cls, ids: Sequence[str], numbers: np.ndarray, captions: Sequence[str], which: np.ndarray, sources: Sequence[str]
    ) -> Entries:
        """Entries from a value each; `sources` holds their sources' names."""
        columns = {"id": pa.array(ids, pa.string()), "number": numbers, "caption": pa.array(captions, pa.string())}
        named = pa.array(sources, pa.string()).dictionary_encode()
        return cls.of(pa.table({**columns, "which": which, "source": named}))

    @classmethod
    def of(cls, table: pa.Table) -> Entries:
        """The entries that :meth:`table` wrote."""
        numbers = table.column("number").to_numpy()
        source = table.column("source").unify_dictionaries().combine_chunks()
        return cls(
            table.column("id"),
            numbers,
            table.column("caption"),
            table.column("which").to_numpy(),
            source.indices.to_numpy(),
            source.dictionary.to_pylist(),
            int(np.unique(numbers, return_counts=True)[1].max(initial=0)),
        )

    def table(self) -> pa.Table:
        """The entries as an Arrow table."""
        named = pa.DictionaryArray.from_arrays(self.source, pa.array(self.sources, pa.string()))
        columns = {"id": self.ids, "number": self.numbers, "caption": self.captions, "which": self.which}
        return pa.table({**columns, "source": named})

    def __len__(self) -> int:
        return len(self.numbers)

    def per_source(self) -> dict[str, int]:
        """How many entries come from each source."""
        counts = np.bincount(self.source, minlength=len(self.sources))
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def locator(self) -> Locator:
        """What finds entries by their clip and caption. Sorts all entries: make it once."""
        return Locator(self)


class Locator:
    """Finds the entries of (clip, caption) pairs in one source at a time: the same pair may stand in several."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._order = np.lexsort((entries.which, entries.numbers, entries.source))
        self._numbers = entries.numbers[self._order]
        ends = np.cumsum(list(entries.per_source().values()))
        self._ranges = {
            name: (int(end) - count, int(end)) for (name, count), end in zip(entries.per_source().items(), ends, strict=True)
        }

    def find(self, numbers: np.ndarray, which: np.ndarray, source: str = TRAIN) -> np.ndarray:
        """The entries of pairs in a source, by default those of the run's own training pairs.

        Args:
            numbers: (n,) int64 clip numbers; which: (n,) int64, which caption of the clip in that source.

        Returns:
            (n,) int64, -1 where the knowledge base has none.
        """
        first, last = self._ranges.get(source, (0, 0))
        if first == last:
            return np.full(len(numbers), -1, np.int64)
        # A clip's entries are its first captions, so that the wanted one stands `which` places after the first.
        place = first + np.searchsorted(self._numbers[first:last], numbers) + which
        entry = self._order[np.minimum(place, last - 1)]
        there = (self._entries.numbers[entry] == numbers) & (self._entries.which[entry] == which)
        return np.where(there, entry, -1)


@dataclass(frozen=True)
class Embeddings:
    """(N, d) float32 rows of unit length: row n of both is entry n."""

    audio: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class Snapshot:
    """An opened version. Arrays are memory-mapped float32; indexes are FAISS's."""

    version: int
    manifest: dict[str, Any]
    entries: Entries
    audio: np.ndarray
    text: np.ndarray
    prototypes_audio: np.ndarray
    prototypes_text: np.ndarray
    audio_index: faiss.Index
    text_index: faiss.Index
    copy: Copy | None = None  # what keeps the files on this node, where they came from remote storage


def folder_of(home: Folder, version: int) -> Folder:
    """Where a version is kept."""
    return home / f"v{version:06d}"


def versions(home: Folder) -> list[int]:
    """The finished versions, oldest first. A folder without a manifest is none.

    Raises:
        StorageError: if they cannot be listed.
    """
    return [version for version in _numbers(home) if folder_of(home, version).exists(MANIFEST)]


def _numbers(home: Folder) -> list[int]:
    """The numbers of all folders of versions, finished or not, in their order."""
    return sorted(int(name[1:]) for name in home.names() if re.fullmatch(r"v\d{6,}", name))


def publish(
    home: Folder,
    version: int,
    entries: Entries,
    rows: Embeddings,
    paired: Embeddings,
    built: tuple[faiss.Index, faiss.Index],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write a version whole: readers see it when its manifest is there, never before.

    Args:
        rows, paired: embeddings of the entries and of the prototypes.
        built: the audio and the text index.
        facts: what else the manifest should say (run, encoder step, times, …).

    Returns:
        the manifest.

    Raises:
        StorageError: if it cannot be written; there is no version then, and what was written of it is removed if that can be.
    """
    target = folder_of(home, version)
    with _staging(home) as staging:
        pq.write_table(entries.table(), staging / ENTRIES)
        for name, array in zip(ARRAYS, (rows.audio, rows.text, paired.audio, paired.text), strict=True):
            np.save(staging / f"{name}.npy", array)
        for name, index in zip(INDEXES, built, strict=True):
            indexes.save(index, staging / f"{name}.index")
        manifest = {
            "format": FORMAT,
            "version": version,
            "entries": len(entries),
            "dim": int(rows.audio.shape[1]),
            "prototypes": len(paired.audio),
            **facts,
            "files": {
                path.name: {"bytes": path.stat().st_size, "digest": digest_file(path)} for path in sorted(staging.iterdir())
            },
        }
        manifest["digest"] = _digest(manifest)
        target.delete()  # what an interrupted try may have left
        try:
            target.upload(staging)
            target.write_json(MANIFEST, manifest)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(target)
            raise
        return manifest


def _remove(folder: Folder) -> None:
    """Remove a version, its manifest first, so that one half removed is none."""
    folder.remove(MANIFEST)
    folder.delete()


@contextlib.contextmanager
def _staging(home: Folder) -> Iterator[Path]:
    """A local folder to build in, under the versions if they are local: their disk is the one meant for it. It is removed in the
    end; one that is left by a refresh that was ended is removed before the next is made."""
    local = home.local
    if local is None:
        with _temporary() as made:
            yield made
        return
    for name in Folder(str(local)).names():
        if name.startswith(".staging-"):  # only one refresh runs at a time
            (Folder(str(local)) / name).delete()
    made = local / f".staging-{uuid.uuid4().hex}"
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A folder in the system's temporary folder, held as long as the `with` lasts. What other runs hold there stays."""
    made, lease = scratch.make("staging")
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lease)


def open_snapshot(
    home: Folder,
    version: int,
    run: str,
    dim: int,
    mutable: bool = False,
    cache: Cache = Cache(),  # noqa: B008 (frozen)
) -> Snapshot:
    """Open a version after checking that it is whole and the one meant. From remote storage it is fetched to this node once.

    Args:
        run: the run it must belong to.
        dim: the width its embeddings must have.
        mutable: read the indexes into memory, on the CPU, so that they can be corrected.
        cache: this node's copies of remote versions.

    Raises:
        SnapshotError: naming the folder, the file and what is wrong.
        StorageError: if the storage cannot be reached.
    """
    folder = folder_of(home, version)
    manifest = _read_manifest(folder, version, run, dim)
    local, copy = folder.local, None
    if local is None:
        sizes = {name: told["bytes"] for name, told in manifest["files"].items()}
        copy = cache.hold(
            manifest["digest"],
            sizes,
            fetch=lambda target: _fetch(folder, manifest, target),
            intact=lambda path: _intact(path, folder, manifest),
        )
        local = copy.path
    else:
        _verify(local, folder, manifest)
    arrays = {name: np.load(local / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in ARRAYS}
    for name, count in zip(ARRAYS, [manifest["entries"]] * 2 + [manifest["prototypes"]] * 2, strict=True):
        if arrays[name].shape != (count, dim):
            raise SnapshotError(f"{folder / f'{name}.npy'}: holds {arrays[name].shape}, the manifest says {(count, dim)}")
    files = [local / f"{name}.index" for name in INDEXES]
    audio_index, text_index = (indexes.open_mutable(file) if mutable else indexes.open_mapped(file) for file in files)
    return Snapshot(
        version=version,
        manifest=manifest,
        entries=Entries.of(pq.read_table(local / ENTRIES, memory_map=True)),
        audio_index=audio_index,
        text_index=text_index,
        copy=copy,
        **arrays,
    )


def _read_manifest(folder: Folder, version: int, run: str, dim: int) -> dict[str, Any]:
    try:
        manifest = folder.read_json(MANIFEST)
    except FileNotFoundError as error:
        raise SnapshotError(f"{folder}: no {MANIFEST}: the snapshot was never finished or has been removed") from error
    except ValueError as error:
        raise SnapshotError(f"{folder / MANIFEST}: not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise SnapshotError(f"{folder / MANIFEST}: holds no mapping: the file is damaged")
    for field, wanted in (("format", FORMAT), ("version", version), ("run", run), ("dim", dim)):
        if manifest.get(field) != wanted:
            raise SnapshotError(f"{folder / MANIFEST}: {field} is {manifest.get(field)!r}, expected {wanted!r}")
    if manifest.get("digest") != _digest(manifest):
        raise SnapshotError(f"{folder / MANIFEST}: does not fit its own digest: the file is damaged")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """The digest of what a manifest says, apart from the digest itself."""
    told = {name: value for name, value in manifest.items() if name != "digest"}
    return digest_bytes(json.dumps(told, sort_keys=True).encode())


def _verify(local: Path, folder: Folder, manifest: dict[str, Any]) -> None:
    """Refuse the version in `folder` if the files in `local` are not those that its manifest names."""
    for name, told in manifest["files"].items():
        path, place = local / name, folder / name
        if not path.is_file():
            raise SnapshotError(f"{place}: missing, though the manifest names it")
        if path.stat().st_size != told["bytes"]:
            raise SnapshotError(f"{place}: {path.stat().st_size} bytes, the manifest says {told['bytes']}: truncated or changed")
        if digest_file(path) != told["digest"]:
            raise SnapshotError(f"{place}: its digest differs from the manifest's: the file is damaged")


def _intact(local: Path, folder: Folder, manifest: dict[str, Any]) -> bool:
    """Whether the files in `local` can be read and are those that the manifest names."""
    try:
        _verify(local, folder, manifest)
    except (SnapshotError, OSError):
        return False
    return True


def _fetch(folder: Folder, manifest: dict[str, Any], target: Path) -> None:
    """Download a version and verify it."""
    try:
        folder.download(target)
    except FileNotFoundError as error:
        raise SnapshotError(f"{folder}: removed while it was fetched") from error
    _verify(target, folder, manifest)


def prune(home: Folder, keep: int, needed: Iterable[int]) -> list[int]:
    """Remove all but the newest `keep` versions and those still needed, and what tries that came to nothing left.

    What is unfinished and older than the newest version is such: a version's number is higher than those of all finished before.

    Returns:
        the versions removed.

    Raises:
        StorageError: if the storage cannot be reached: some may be left.
    """
    numbers, there = _numbers(home), versions(home)
    safe = {*there[-keep:], *needed}
    gone = [version for version in there if version not in safe]
    for version in gone:
        _remove(folder_of(home, version))
    for number in numbers:
        if number not in there and number not in safe and number < max(there, default=0):
            folder_of(home, number).delete()
    return gone
