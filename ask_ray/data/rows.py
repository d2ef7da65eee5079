"""The rows of a corpus's lists, before any recording is opened: which clip, which captions, which split, what is against it.

Rows become an Arrow table that tasks share without copying it: about as many bytes as the lists have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ask_ray.config import SplitShares
from ask_ray.data.files import present, state
from ask_ray.data.held_out import HeldOut
from ask_ray.data.schema import BY_ID, HELD_OUT, REJECTED, SPLITS, Rejection, UnusableClip, told, usable_captions

SPLIT_WORDS = {
    **{split: split for split in SPLITS},
    "training": "train", "development": "train", "val": "validation", "valid": "validation", "dev": "validation",
    "eval": "test", "evaluation": "test", "testing": "test",
}  # fmt: skip

#: Paths are bytes, as the filesystem has them: a name need not be UTF-8.
ROWS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("path", pa.binary()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("split", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("place", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Row:
    """A clip as a list names it. `place`: row of the Parquet file that holds the recording, if one does; `problem`: a reason to
    set it aside, and `detail` more of it; `recording`: what tells recordings of one id apart, where an id alone does not."""

    id: str
    path: Path
    captions: tuple[str, ...]
    split: str | None = None
    source_id: str | None = None
    place: int | None = None
    problem: str | None = None
    detail: str = ""
    recording: str = ""

    @property
    def source(self) -> str:
        """Where the recording is."""
        return told(self.path) if self.place is None else f"{told(self.path)}#{self.place}"

    def rejection(self, reason: str, detail: str = "") -> Rejection:
        """The row as one that is set aside."""
        return Rejection(self.id, self.source, reason, detail)

    def key(self) -> str:
        """The row, and its file's size and time of change."""
        found = state(self.path)
        stamp = found and (found.st_size, found.st_mtime_ns)
        return repr((self.id, self.source, self.captions, self.split, self.source_id, stamp))


class Listing(NamedTuple):
    """What a corpus's lists say. `origin`: the layout, the folder, and the lists with their digests, for the data card."""

    rows: list[Row]
    origin: dict[str, Any]


class Plan(NamedTuple):
    """`usable`: a table of :data:`ROWS`, split by split; `rejected`: one of :data:`~ask_ray.data.schema.REJECTED`, what is set
    aside before anything is decoded."""

    usable: pa.Table
    rejected: pa.Table


def texts(captions: Iterable[object]) -> tuple[str, ...]:
    """Of a row's captions, what is text. JSON may hold halves of characters, which no file takes: they become question marks."""
    return tuple(caption.encode("utf-8", "replace").decode() for caption in captions if isinstance(caption, str))


def merged(rows: Iterable[Row]) -> list[Row]:
    """Rows of one recording, under one id in one split, as one clip with all their captions; the file is the first there is."""
    clips: dict[object, Row] = {}
    for number, row in enumerate(rows):
        key = (row.id, row.split, row.recording) if row.id else number
        first = clips.get(key, row)
        best = row if first.problem and not row.problem else first
        clips[key] = row if first is row else replace(best, captions=first.captions + row.captions)
    return list(clips.values())


def rows_of(table: pa.Table) -> Iterator[Row]:
    """The rows of a table of :data:`ROWS`."""
    for row in table.to_pylist():
        yield Row(row["id"], Path(os.fsdecode(row["path"])), tuple(row["captions"]), row["split"], row["source_id"], row["place"])


def plan(rows: Iterable[Row], shares: SplitShares, held_out: HeldOut) -> Plan:
    """Decide on every row: its split, and whether anything is against it that shows without decoding.

    Rows without a split are dealt to splits by a hash of their source id, else of their id, so that adding clips moves few and
    most takes of one source stay together. A clip of an evaluation split, here or in `held_out`, is not trained on; it counts as
    one even if it cannot be used.
    """
    aside: list[Rejection] = []
    good: list[Row] = []
    for row in rows:
        if row.problem is None:
            good.append(row)
        else:
            aside.append(row.rejection(row.problem, row.detail))
    good = _deal(list(_once(good, aside)), shares)
    own = _evaluated(good)
    kept: dict[str, list[Row]] = {split: [] for split in SPLITS}
    everywhere = own.joined(held_out)
    for row in good:
        try:
            _judge(row, everywhere)
            kept[str(row.split)].append(row)
        except UnusableClip as error:
            aside.append(row.rejection(error.reason, error.detail))
    usable = [row for split in SPLITS for row in _in_files(kept[split])]
    columns = {name: [getattr(row, name) for row in usable] for name in ROWS.names}
    columns["path"] = [os.fsencode(path) for path in columns["path"]]
    return Plan(pa.table(columns, schema=ROWS), pa.Table.from_pylist([vars(one) for one in aside], schema=REJECTED))


def _judge(row: Row, evaluated: HeldOut) -> None:
    """Raise ``UnusableClip`` for a training clip of `evaluated`, a row without captions, or a missing or empty file."""
    found = evaluated.find(row.id, row.source_id) if row.split == "train" else None
    if found:
        raise UnusableClip(found.reason, f"it is {found.where}")
    usable_captions(row.captions)
    if row.place is None:
        present(row.path)


def digest(rows: pa.Table) -> str:
    """Text that changes with any row, and with any of their files."""
    state = hashlib.blake2b(digest_size=16)
    for batch in rows.to_batches(max_chunksize=4096):
        for row in rows_of(pa.Table.from_batches([batch])):
            state.update(row.key().encode())
    return state.hexdigest()


def _once(rows: list[Row], aside: list[Rejection]) -> Iterator[Row]:
    """Each id once: where it is repeated, an evaluation split keeps it, and the test split before the validation split. What two
    recordings share is a name that cannot stand, and no leak."""
    order = {"test": 0, "validation": 1}
    seen: dict[str, Row] = {}
    kept = set()
    for row in sorted(rows, key=lambda row: order.get(str(row.split), 2)):
        first = seen.setdefault(row.id, row)
        if first is row:
            kept.add(id(row))
        elif first.split in HELD_OUT and row.split not in HELD_OUT and first.recording == row.recording:
            aside.append(row.rejection(BY_ID, f"it is {first.split} clip {row.id!r}"))
        else:
            aside.append(row.rejection("duplicate id", f"{first.source} has it too"))
    yield from (row for row in rows if id(row) in kept)


def _deal(rows: list[Row], shares: SplitShares) -> list[Row]:
    def hashed(row: Row) -> tuple[bytes, bytes]:
        return _hash(row.source_id or row.id), _hash(row.id)

    free = sorted((row for row in rows if row.split is None), key=hashed)
    validation, test = round(len(free) * shares.validation), round(len(free) * shares.test)
    dealt = ["validation"] * validation + ["test"] * test + ["train"] * (len(free) - validation - test)
    return [row for row in rows if row.split] + [replace(row, split=split) for row, split in zip(free, dealt, strict=True)]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _evaluated(rows: list[Row]) -> HeldOut:
    where = {row.id: f"{row.split} clip {row.id!r}" for row in rows if row.split in HELD_OUT}
    return HeldOut(where, {row.source_id: where[row.id] for row in rows if row.id in where and row.source_id}, {})


def _in_files(rows: list[Row]) -> list[Row]:
    """Recordings that lie in Parquet files in the order of the files, so that each is read once and forward."""
    if all(row.place is None for row in rows):
        return rows
    return sorted(rows, key=lambda row: (str(row.path), row.place or 0))
