"""Immutable, versioned snapshots of a knowledge base: write, verify, open, prune.

A version is a folder ``v000001`` of plain files. ``manifest.json`` is written last and names every other file with its
size and digest, and carries a digest of itself: a folder without one is no snapshot, and one that does not fit its
manifest is refused by name.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ask_ray.config import UserError
from ask_ray.knowledge import index as indexes
from ask_ray.storage import Folder, digest_bytes, digest_file

FORMAT = 1
MANIFEST = "manifest.json"
ENTRIES = "entries.parquet"
ARRAYS = ("audio", "text", "prototypes_audio", "prototypes_text")
INDEXES = ("audio", "text")


class SnapshotError(UserError, RuntimeError):
    """A snapshot that is missing, damaged or not the one asked for. The message names the folder and the file."""


@dataclass(frozen=True)
class Entries:
    """What the rows of a knowledge base are: one (clip, caption) pair each.

    ids, captions, sources: N texts; numbers: (N,) int64, the clips' numbers; which: (N,) int64, which caption of the clip.
    """

    ids: list[str]
    numbers: np.ndarray
    captions: list[str]
    which: np.ndarray
    sources: list[str]

    def table(self) -> pa.Table:
        """The entries as an Arrow table."""
        return pa.table(
            {"id": self.ids, "number": self.numbers, "caption": self.captions, "which": self.which, "source": self.sources}
        )

    @classmethod
    def of(cls, table: pa.Table) -> Entries:
        """The entries that :meth:`table` wrote."""
        columns = {name: table.column(name) for name in table.column_names}
        return cls(
            columns["id"].to_pylist(),
            columns["number"].to_numpy(),
            columns["caption"].to_pylist(),
            columns["which"].to_numpy(),
            columns["source"].to_pylist(),
        )

    @cached_property
    def most_per_clip(self) -> int:
        """The most entries that one clip has."""
        return int(np.unique(self.numbers, return_counts=True)[1].max(initial=0))


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


def folder_of(home: Folder, version: int) -> Folder:
    """Where a version is kept."""
    return home / f"v{version:06d}"


def versions(home: Folder) -> list[int]:
    """The finished versions, oldest first. A folder without a manifest is none."""
    named = [int(name[1:]) for name in home.names() if re.fullmatch(r"v\d{6,}", name)]
    return [version for version in sorted(named) if folder_of(home, version).exists(MANIFEST)]


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
    """
    target = folder_of(home, version)
    staging = _staging(home)
    try:
        pq.write_table(entries.table(), staging / ENTRIES)
        for name, array in zip(ARRAYS, (rows.audio, rows.text, paired.audio, paired.text), strict=True):
            np.save(staging / f"{name}.npy", array)
        for name, index in zip(INDEXES, built, strict=True):
            indexes.save(index, staging / f"{name}.index")
        manifest = {
            "format": FORMAT,
            "version": version,
            "entries": len(entries.ids),
            "dim": int(rows.audio.shape[1]),
            "prototypes": len(paired.audio),
            **facts,
            "files": {
                path.name: {"bytes": path.stat().st_size, "digest": digest_file(path)} for path in sorted(staging.iterdir())
            },
        }
        manifest["digest"] = _digest(manifest)
        target.delete()  # what an interrupted try may have left
        target.upload(staging)
        target.write_json(MANIFEST, manifest)
        return manifest
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(home: Folder) -> Path:
    """A local folder to build in, under the versions if they are local: their disk is the one meant for it."""
    local = home.local
    if local is None:
        return Path(tempfile.mkdtemp(prefix="ask_ray-snapshot-"))
    for name in Folder(str(local)).names():
        if name.startswith(".staging-"):  # a refresh that was ended left it, and only one runs at a time
            (Folder(str(local)) / name).delete()
    made = local / f".staging-{uuid.uuid4().hex}"
    made.mkdir(parents=True)
    return made


def open_snapshot(home: Folder, version: int, run: str, dim: int, device: int | None = None, mutable: bool = False) -> Snapshot:
    """Open a version after checking that it is whole and the one meant.

    Args:
        run: the run it must belong to.
        dim: the width its embeddings must have.
        device: GPU to search on; None searches on the CPU.
        mutable: read the indexes into memory, on the CPU, so that they can be corrected.

    Raises:
        SnapshotError: naming the folder, the file and what is wrong.
    """
    folder = folder_of(home, version)
    manifest = _read_manifest(folder, version, run, dim)
    local = folder.local or _fetched(folder)
    for name, told in manifest["files"].items():
        _verify(local / name, told)
    arrays = {name: np.load(local / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in ARRAYS}
    for name, count in zip(ARRAYS, [manifest["entries"]] * 2 + [manifest["prototypes"]] * 2, strict=True):
        if arrays[name].shape != (count, dim):
            raise SnapshotError(f"{folder}/{name}.npy: holds {arrays[name].shape}, the manifest says {(count, dim)}")
    files = [local / f"{name}.index" for name in INDEXES]
    audio_index, text_index = (indexes.open_mutable(file) if mutable else indexes.open_mapped(file, device) for file in files)
    return Snapshot(
        version=version,
        manifest=manifest,
        entries=Entries.of(pq.read_table(local / ENTRIES)),
        audio_index=audio_index,
        text_index=text_index,
        **arrays,
    )


def _read_manifest(folder: Folder, version: int, run: str, dim: int) -> dict[str, Any]:
    try:
        manifest = folder.read_json(MANIFEST)
    except FileNotFoundError as error:
        raise SnapshotError(f"{folder}: no {MANIFEST}: the snapshot was never finished or has been removed") from error
    except ValueError as error:
        raise SnapshotError(f"{folder}/{MANIFEST}: not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise SnapshotError(f"{folder}/{MANIFEST}: holds no mapping: the file is damaged")
    for field, wanted in (("format", FORMAT), ("version", version), ("run", run), ("dim", dim)):
        if manifest.get(field) != wanted:
            raise SnapshotError(f"{folder}/{MANIFEST}: {field} is {manifest.get(field)!r}, expected {wanted!r}")
    if manifest.get("digest") != _digest(manifest):
        raise SnapshotError(f"{folder}/{MANIFEST}: does not fit its own digest: the file is damaged")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """The digest of what a manifest says, apart from the digest itself."""
    told = {name: value for name, value in manifest.items() if name != "digest"}
    return digest_bytes(json.dumps(told, sort_keys=True).encode())


def _verify(path: Path, told: dict[str, Any]) -> None:
    if not path.is_file():
        raise SnapshotError(f"{path}: missing, though the manifest names it")
    if path.stat().st_size != told["bytes"]:
        raise SnapshotError(f"{path}: {path.stat().st_size} bytes, the manifest says {told['bytes']}: truncated or changed")
    if digest_file(path) != told["digest"]:
        raise SnapshotError(f"{path}: its digest differs from the manifest's: the file is damaged")


def _fetched(folder: Folder) -> Path:
    """A local copy of a snapshot on remote storage."""
    local = Path(tempfile.mkdtemp(prefix="ask_ray-knowledge-")) / folder.name
    folder.download(local)
    return local


def prune(home: Folder, keep: int, needed: Iterable[int]) -> list[int]:
    """Remove all but the newest `keep` versions and those still needed.

    Returns:
        the versions removed.
    """
    there = versions(home)
    safe = {*there[-keep:], *needed}
    gone = [version for version in there if version not in safe]
    for version in gone:
        folder_of(home, version).delete()
    return gone
