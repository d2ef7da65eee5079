"""Where clips come from: the procedural soundscapes, and recordings or pictures that lists of captions name.

A source plans its work as shards before anything is decoded, so that preparing can be spread over a cluster, taken up
again after an interruption, and gives the same files whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from ask_ray.config import DataSettings, FolderSettings, SettingsError, SplitShares
from ask_ray.data import audio, embedded, files, folders, image_layouts, layouts, pictures
from ask_ray.data import rows as planning
from ask_ray.data.folders import Named
from ask_ray.data.held_out import HeldOut
from ask_ray.data.rows import Listing, Row
from ask_ray.data.schema import (
    BY_DIGEST,
    MISSING,
    NO_CAPTION,
    SPLITS,
    Clip,
    Picture,
    Rejection,
    UnusableClip,
    usable_captions,
    usable_pixels,
    usable_waveform,
)
from ask_ray.data.soundscapes import EventBank, RecordedBank, SynthesisedBank, compose
from ask_ray.modality import Modality
from ask_ray.storage import digest_bytes, local_path


@dataclass(frozen=True)
class Shard:
    """A unit of preparing: clips of one split, by their numbers in the source."""

    split: str
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """The stem of the files this shard becomes."""
        return f"{self.split}-{self.number:06d}"


class Source(Protocol):
    """What preparing needs of a corpus. Picklable: tasks on other nodes are handed it."""

    @property
    def modality(self) -> Modality:
        """What its captions describe."""

    def key(self) -> str:
        """Text that changes whenever the prepared corpus would."""

    def shards(self) -> list[Shard]:
        """All the work, in the order of the prepared corpus."""

    def recordings(self) -> int:
        """How many captioned recordings there are, usable or not: what the share of rejections refers to."""

    def early_rejections(self) -> list[Rejection]:
        """What was set aside while planning."""

    def origin(self) -> dict[str, Any]:
        """What the data card tells of where the corpus came from: `layout`, `folder`, and `lists` with their digests."""

    def clips(self, shard: Shard) -> Iterator[Clip | Picture | Rejection]:
        """The shard's clips, in order, and what had to be set aside.

        Raises:
            StorageError: if a file that planning saw cannot be read: nothing is set aside for what is the storage's fault.
        """


def source_of(data: DataSettings, held_out: HeldOut | None = None) -> Source:
    """The source that the settings name.

    Args:
        held_out: clips of other corpora that must not be trained on.

    Raises:
        SettingsError: if a folder or list is missing or malformed; the message says what was looked for.
    """
    if data.corpus == "soundscapes":
        return SoundscapeSource(data) if data.soundscapes.bank is None else _bank_source(data, held_out or HeldOut())
    listing = _listing(data)
    planned = planning.plan(listing.rows, _shares(data), held_out or HeldOut())
    kind = RecordingSource if data.modality == "audio" else PictureSource
    return kind(data, planned.usable, planned.rejected, listing.origin)


def _shares(data: DataSettings) -> SplitShares:
    """How clips that no list deals to a split are dealt."""
    if data.corpus == "coco":
        return SplitShares(validation=data.coco.validation, test=0)
    shares = getattr(data, data.corpus)
    return shares if isinstance(shares, SplitShares) else SplitShares()


def _listing(data: DataSettings) -> Listing:
    match data.corpus:
        case "audiocaps":
            return layouts.audiocaps(data.audiocaps)
        case "clotho":
            return layouts.clotho(data.clotho)
        case "wavcaps":
            return layouts.wavcaps(data.wavcaps)
        case "parquet":
            return embedded.parquet(data.parquet)
        case "coco":
            return image_layouts.coco(data.coco)
        case "flickr30k":
            return image_layouts.flickr30k(data.flickr30k)
        case _:
            return folders.folder(data.folder)


def _shards(split: str, first: int, count: int, size: int) -> list[Shard]:
    starts = range(first, first + count, size)
    return [Shard(split, n, start, min(start + size, first + count)) for n, start in enumerate(starts)]


# --- soundscapes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoundscapeSource:
    """Procedural clips: nothing is read but, if the settings name one, a bank of recordings, each for clips of its split alone.

    `rows`: the bank's usable ones; `aside`: what planning set aside of it; `held`: digests of what is evaluated on elsewhere.
    """

    data: DataSettings
    rows: tuple[Row, ...] = ()
    aside: tuple[Rejection, ...] = ()
    held: frozenset[str] = frozenset()

    @property
    def modality(self) -> Modality:
        return "audio"

    def key(self) -> str:
        return "".join(f"{row.split}: {row.key()}" for row in self.rows)  # not the key of scenes that were composed across splits

    def shards(self) -> list[Shard]:
        counts = {split: getattr(self.data.soundscapes, split) for split in SPLITS}
        return [shard for split in SPLITS for shard in _shards(split, 0, counts[split], self.data.shard_clips)]

    def recordings(self) -> int:
        soundscapes = self.data.soundscapes
        every = sum(getattr(soundscapes, split) for split in SPLITS)
        return every if soundscapes.bank is None else len(self.rows) + len(self.aside)

    def early_rejections(self) -> list[Rejection]:
        return [*self.aside, *self._recorded().rejected] if self.data.soundscapes.bank is not None else []

    def clips(self, shard: Shard) -> Iterator[Clip | Rejection]:
        bank = self._bank(shard.split)
        for index in range(shard.first, shard.last):
            scene = compose(self.data.soundscapes, bank, shard.split, index, self.data.sample_rate)
            rate = self.data.sample_rate
            yield Clip(scene.id, shard.split, scene.captions, scene.waveform, "soundscapes", rate, rate)

    def origin(self) -> dict[str, Any]:
        bank = self.data.soundscapes.bank
        return {"layout": "procedural soundscapes", "folder": bank and str(local_path(bank)), "lists": {}}

    def _bank(self, split: str) -> EventBank:
        return SynthesisedBank() if self.data.soundscapes.bank is None else self._recorded().banks[split]

    def _recorded(self) -> _Recorded:
        data = self.data
        found = _decoded(self.rows, data.sample_rate, data.min_seconds, data.keep_seconds, self.held)
        wanted = [split for split in SPLITS if getattr(data.soundscapes, split) and split not in found.banks]
        if not found.banks:
            raise SettingsError(
                f"data.soundscapes.bank: none of the {self.recordings()} recordings in {data.soundscapes.bank} can be used"
            )
        if wanted:
            raise SettingsError(
                f"data.soundscapes.bank: no usable recording in {data.soundscapes.bank} is for the split {wanted[0]}: tell each "
                "one's `split` in the manifest, or give more recordings"
            )
        return found


class _Recorded(NamedTuple):
    """A bank of recordings: the events of each split that has any, and the recordings that could not be used."""

    banks: dict[str, RecordedBank]
    rejected: tuple[Rejection, ...]


@lru_cache(maxsize=1)
def _decoded(rows: tuple[Row, ...], rate: int, min_seconds: float, keep_seconds: float, held: frozenset[str]) -> _Recorded:
    """The bank of these rows, decoded once per process. Rows of evaluation splits come first: their digests are `held` too."""
    takes: dict[str, list[tuple[np.ndarray, str]]] = {}
    rejected, evaluated = [], set(held)
    for row in sorted(rows, key=lambda row: row.split == "train"):
        try:
            waveform, caption = _take(row, rate, min_seconds, keep_seconds)
            digest = digest_bytes(waveform.tobytes())
            if row.split == "train" and digest in evaluated:
                raise UnusableClip(BY_DIGEST, "a recording that is evaluated on has the same samples")
            evaluated |= {digest} if row.split != "train" else set()
            takes.setdefault(str(row.split), []).append((waveform.astype(np.float32) / 32767.0, caption))
        except UnusableClip as error:
            rejected.append(_set_aside(row, error))
    return _Recorded({split: RecordedBank(of) for split, of in takes.items()}, tuple(rejected))


def _take(row: Row, rate: int, min_seconds: float, keep_seconds: float) -> tuple[np.ndarray, str]:
    """A recording, (samples,) int16, and its first caption.

    Raises:
        UnusableClip: if it is none that an event could be made of.
    """
    captions = usable_captions(row.captions)
    if not captions[0].strip(" .!;,"):
        raise UnusableClip("empty caption", "the first caption has no words")
    return usable_waveform(audio.load(row.path, rate, keep_seconds).samples, rate, min_seconds), captions[0]


def _bank_source(data: DataSettings, held_out: HeldOut) -> SoundscapeSource:
    """The source of scenes that are composed from a bank, whose recordings are dealt to splits as those of a folder are."""
    settings = FolderSettings(path=data.soundscapes.bank)
    rows = folders.manifest_rows(settings, Named("data.soundscapes.bank", "data.soundscapes.bank"))
    planned = planning.plan(rows, settings, held_out)
    aside = tuple(Rejection(**row) for row in planned.rejected.to_pylist())
    return SoundscapeSource(data, tuple(planning.rows_of(planned.usable)), aside, frozenset(held_out.digests))


# --- recordings and pictures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListedSource:
    """Clips that lists name.

    `rows`: a table of :data:`~ask_ray.data.rows.ROWS`, split by split; `rejected`: one of :data:`~ask_ray.data.schema.REJECTED`;
    all tasks share both. `come_from`: see :meth:`Source.origin`.
    """

    data: DataSettings
    rows: pa.Table
    rejected: pa.Table
    come_from: dict[str, Any]

    @property
    def modality(self) -> Modality:
        return self.data.modality

    def key(self) -> str:
        return planning.digest(self.rows) + repr(self.rejected.to_pydict())

    def shards(self) -> list[Shard]:
        made: list[Shard] = []
        splits = self.rows.column("split").to_pylist()
        for split in SPLITS:
            if split in splits:
                made += _shards(split, splits.index(split), splits.count(split), self.data.shard_clips)
        return made

    def recordings(self) -> int:
        return len(self.rows) + sum(reason != NO_CAPTION for reason in self.rejected.column("reason").to_pylist())

    def early_rejections(self) -> list[Rejection]:
        return [Rejection(**row) for row in self.rejected.to_pylist()]

    def origin(self) -> dict[str, Any]:
        return self.come_from

    def _rows(self, shard: Shard) -> list[Row]:
        return list(planning.rows_of(self.rows.slice(shard.first, shard.last - shard.first)))


class RecordingSource(ListedSource):
    """Recordings, in files or in Parquet."""

    def clips(self, shard: Shard) -> Iterator[Clip | Rejection]:
        for row, recording in _recordings(self._rows(shard)):
            try:
                yield self._clip(row, recording)
            except UnusableClip as error:
                yield _set_aside(row, error)

    def _clip(self, row: Row, recording: BinaryIO | Path | UnusableClip) -> Clip:
        captions, rate, seconds = usable_captions(row.captions), self.data.sample_rate, self.data.keep_seconds
        if isinstance(recording, UnusableClip):
            raise recording
        if isinstance(recording, Path):
            found = audio.load(recording, rate, seconds)
        else:
            found = audio.decode(recording, row.source, rate, seconds)
        waveform = usable_waveform(found.samples, rate, self.data.min_seconds)
        return Clip(row.id, str(row.split), captions, waveform, row.source, rate, found.rate, row.source_id, found.cut)


class PictureSource(ListedSource):
    """Pictures, in files."""

    def clips(self, shard: Shard) -> Iterator[Picture | Rejection]:
        for row in self._rows(shard):
            try:
                captions, found = usable_captions(row.captions), pictures.load(row.path, self.data.image_size)
                pixels = usable_pixels(found.pixels)
                yield Picture(row.id, str(row.split), captions, pixels, row.source, row.source_id, found.shrunk)
            except UnusableClip as error:
                yield _set_aside(row, error)


def _set_aside(row: Row, error: UnusableClip) -> Rejection:
    """The row as one that is set aside, for good: only its own fault may do that.

    Raises:
        StorageError: if its file, which planning saw, is gone or cannot be read.
    """
    if row.place is None:
        if error.reason == MISSING:
            raise files.away(row.path, "it is not there") from error
        files.read_through(row.path)
    return row.rejection(error.reason, error.detail)


def _recordings(rows: list[Row]) -> Iterator[tuple[Row, BinaryIO | Path | UnusableClip]]:
    """Each row with its recording: a file, or what Parquet holds, read forward."""
    for (path, inside), group in groupby(rows, lambda row: (row.path, row.place is not None)):
        held = list(group)
        if inside:
            yield from zip(held, embedded.recordings(path, [int(row.place or 0) for row in held]), strict=True)
        else:
            yield from ((row, row.path) for row in held)
