"""Where clips come from: the procedural soundscapes, and a folder of recordings with a manifest.

A source plans its work as shards before anything is decoded, so that preparing can be spread over a cluster, taken up
again after an interruption, and gives the same files whatever the number of workers.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ask_ray.config import DataSettings, FolderSettings, SettingsError
from ask_ray.data import audio
from ask_ray.data.schema import SPLITS, Clip, Rejection, UnusableClip, usable_captions, usable_waveform
from ask_ray.data.soundscapes import EventBank, RecordedBank, SynthesisedBank, compose

_SPLIT_WORDS = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "test", "evaluation": "test"}
_MANIFESTS = ("captions", "manifest")
_READERS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


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

    def key(self) -> str:
        """Text that changes whenever the prepared corpus would."""

    def shards(self) -> list[Shard]:
        """All the work, in the order of the prepared corpus."""

    def recordings(self) -> int:
        """How many recordings there are, usable or not: what the share of rejections refers to."""

    def early_rejections(self) -> list[Rejection]:
        """What was found unusable while planning."""

    def clips(self, shard: Shard) -> Iterator[Clip | Rejection]:
        """The shard's clips, in order, and what had to be set aside."""


def source_of(data: DataSettings) -> Source:
    """The source that the settings name.

    Raises:
        SettingsError: if a folder or manifest is missing or malformed; the message says what was looked for.
    """
    if data.corpus == "folder":
        rows = _folder_rows(data.folder, Named("data.folder.path", "data.folder.manifest"))
        return FolderSource(data, tuple(_split_rows(rows, data.folder)))
    return SoundscapeSource(data)


def _shards(split: str, first: int, count: int, size: int) -> list[Shard]:
    starts = range(first, first + count, size)
    return [Shard(split, n, start, min(start + size, first + count)) for n, start in enumerate(starts)]


# --- soundscapes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoundscapeSource:
    """Procedural clips: nothing is read but, if the settings name one, a bank of recordings."""

    data: DataSettings

    def key(self) -> str:
        bank = self.data.soundscapes.bank
        return "" if bank is None else "".join(row.key() for row in _bank_rows(bank))

    def shards(self) -> list[Shard]:
        counts = {split: getattr(self.data.soundscapes, split) for split in SPLITS}
        return [shard for split in SPLITS for shard in _shards(split, 0, counts[split], self.data.shard_clips)]

    def recordings(self) -> int:
        soundscapes = self.data.soundscapes
        every = sum(getattr(soundscapes, split) for split in SPLITS)
        return every if soundscapes.bank is None else len(_bank_rows(soundscapes.bank))

    def early_rejections(self) -> list[Rejection]:
        bank = self.data.soundscapes.bank
        return [] if bank is None else list(_recorded_bank(bank, self.data.sample_rate, self.data.min_seconds)[1])

    def clips(self, shard: Shard) -> Iterator[Clip | Rejection]:
        bank = self._bank()
        for index in range(shard.first, shard.last):
            scene = compose(self.data.soundscapes, bank, shard.split, index, self.data.sample_rate)
            yield Clip(scene.id, shard.split, scene.captions, scene.waveform, "soundscapes", self.data.sample_rate)

    def _bank(self) -> EventBank:
        if self.data.soundscapes.bank is None:
            return SynthesisedBank()
        return _recorded_bank(self.data.soundscapes.bank, self.data.sample_rate, self.data.min_seconds)[0]


@lru_cache(maxsize=1)
def _recorded_bank(folder: str, rate: int, min_seconds: float) -> tuple[RecordedBank, tuple[Rejection, ...]]:
    """The recordings of a folder as events, decoded once per process, and those that could not be used."""
    recordings, rejected = [], []
    for row in _bank_rows(folder):
        try:
            captions = usable_captions(row.captions)
            if not captions[0].strip(" .!;,"):
                raise UnusableClip("empty caption", "the first caption has no words")
            samples = audio.load(row.path, rate)
            usable_waveform(samples, rate, min_seconds)
            recordings.append((samples, captions[0]))
        except UnusableClip as error:
            rejected.append(Rejection(row.id, str(row.path), error.reason, error.detail))
    if not recordings:
        raise SettingsError(f"data.soundscapes.bank: none of the {len(rejected)} recordings in {folder} can be used")
    return RecordedBank(recordings), tuple(rejected)


@lru_cache(maxsize=1)
def _bank_rows(folder: str) -> tuple[ManifestRow, ...]:
    return tuple(_folder_rows(FolderSettings(path=folder), Named("data.soundscapes.bank", "data.soundscapes.bank")))


# --- a folder with a manifest ----------------------------------------------------------------------------------------


class Named(NamedTuple):
    """The settings that name a folder and its manifest, for messages."""

    folder: str
    manifest: str


@dataclass(frozen=True)
class ManifestRow:
    """A row of a manifest, before its recording is opened. `problem`: a reason to set it aside."""

    id: str
    path: Path
    captions: tuple[object, ...]
    split: str | None
    problem: str | None = None

    def key(self) -> str:
        """The row and its file's size and time of change."""
        stat = self.path.stat() if audio.is_there(self.path) else None
        return repr((self.id, str(self.path), self.captions, self.split, stat and (stat.st_size, stat.st_mtime_ns)))


@dataclass(frozen=True)
class FolderSource:
    """Audio files listed in a manifest. `rows` are grouped by split."""

    data: DataSettings
    rows: tuple[ManifestRow, ...]

    def key(self) -> str:
        return "".join(row.key() for row in self.rows)

    def shards(self) -> list[Shard]:
        made: list[Shard] = []
        for split in SPLITS:
            places = [place for place, row in enumerate(self.rows) if row.split == split and not row.problem]
            if places:
                made += _shards(split, places[0], len(places), self.data.shard_clips)
        return made

    def recordings(self) -> int:
        return len(self.rows)

    def early_rejections(self) -> list[Rejection]:
        return [Rejection(row.id, str(row.path), row.problem) for row in self.rows if row.problem]

    def clips(self, shard: Shard) -> Iterator[Clip | Rejection]:
        for row in self.rows[shard.first : shard.last]:
            try:
                captions = usable_captions(row.captions)
                samples = audio.load(row.path, self.data.sample_rate)
                waveform = usable_waveform(samples, self.data.sample_rate, self.data.min_seconds)
                yield Clip(row.id, shard.split, captions, waveform, str(row.path), self.data.sample_rate)
            except UnusableClip as error:
                yield Rejection(row.id, str(row.path), error.reason, error.detail)


def _folder_rows(settings: FolderSettings, named: Named) -> Iterator[ManifestRow]:
    """The manifest's rows in order; rows that can be judged without the audio already carry their problem."""
    folder = Path(settings.path or "").expanduser().resolve()
    if not folder.is_dir():
        raise SettingsError(f"{named.folder}: {folder} is not a folder; give the folder that holds the recordings")
    manifest = _manifest_path(folder, settings.manifest, named)
    table = _read_manifest(manifest, named)
    seen: set[str] = set()
    for row in table.to_pylist():
        made = _manifest_row(row, _audio_root(folder, row.get("file_name")), seen)
        seen.add(made.id)
        yield made


def _audio_root(folder: Path, name: object) -> Path:
    """The folder that a relative file name starts from: the corpus's own, or its `audio` folder."""
    inner = folder / "audio"
    if not isinstance(name, str) or audio.is_there(folder / name.strip()):
        return folder
    return inner if audio.is_there(inner / name.strip()) else folder


def _manifest_row(row: dict[str, Any], root: Path, seen: set[str]) -> ManifestRow:
    name = str(row.get("file_name") or "").strip()
    columns = sorted((key for key in row if re.fullmatch(r"caption(_\d+)?", key)), key=lambda key: (len(key), key))
    captions = tuple(row[key] for key in columns)
    identity = name if row.get("id") in (None, "") else str(row["id"])
    given = str(row.get("split") or "").strip().lower()
    split = _SPLIT_WORDS.get(given, given) or None
    problem = None
    if not name:
        problem = "no file name"
    elif identity in seen:
        problem = "duplicate id"
    elif split is not None and split not in SPLITS:
        problem = "unknown split"
    return ManifestRow(identity, root / name, captions, split, problem)


def _manifest_path(folder: Path, given: str | None, named: Named) -> Path:
    if given is not None:
        path = folder / Path(given).expanduser()
        if not path.is_file():
            raise SettingsError(f"{named.manifest}: {path} is not there; name the CSV, JSONL or Parquet of captions")
        return path
    names = [f"{stem}{ending}" for stem in _MANIFESTS for ending in _READERS]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        what = "none is there" if not found else f"{', '.join(path.name for path in found)} are there"
        raise SettingsError(f"{named.manifest}: looked in {folder} for one of {', '.join(names)}: {what}; name one")
    return found[0]


def _read_manifest(path: Path, named: Named) -> pa.Table:
    """The manifest as a table of text columns.

    Raises:
        SettingsError: if it cannot be parsed or lacks the columns, naming those it has.
    """
    kind = _READERS.get(path.suffix.lower())
    try:
        if kind == "csv":
            table = _read_csv(path)
        elif kind == "json":
            table = _read_json(path)
        elif kind == "parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            raise SettingsError(f"{named.manifest}: {path.name} is not a {', '.join(_READERS)} file")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{named.manifest}: {path} cannot be read: {error}") from error
    captions = [name for name in table.column_names if re.fullmatch(r"caption(_\d+)?", name)]
    if "file_name" not in table.column_names or not captions:
        found = ", ".join(table.column_names) or "none"
        raise SettingsError(
            f"{named.manifest}: {path} needs the columns file_name and caption (or caption_1 … caption_n); it has {found}"
        )
    return table


def _read_csv(path: Path) -> pa.Table:
    """A CSV whose every column is text: a caption that looks like a number or a date stays as it was written."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        types = dict.fromkeys(next(csv.reader(stream), []), pa.string())
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
    )


def _read_json(path: Path) -> pa.Table:
    """A JSONL file; text that looks like a date stays text."""
    table = pyarrow.json.read_json(path)
    dates = [(field.name, pa.string()) for field in table.schema if pa.types.is_timestamp(field.type)]
    return pyarrow.json.read_json(path, parse_options=pyarrow.json.ParseOptions(pa.schema(dates))) if dates else table


def _split_rows(rows: Iterator[ManifestRow], settings: FolderSettings) -> Iterator[ManifestRow]:
    """Rows grouped by split: as the manifest says, else by a hash of the id, so that adding clips moves few."""
    every = list(rows)
    yield from (row for row in every if row.problem)
    good = [row for row in every if row.problem is None]
    free = sorted((row for row in good if row.split is None), key=lambda row: hashlib.sha256(row.id.encode()).digest())
    validation, test = round(len(free) * settings.validation), round(len(free) * settings.test)
    dealt = ["validation"] * validation + ["test"] * test + ["train"] * (len(free) - validation - test)
    good = [row for row in good if row.split] + [
        ManifestRow(row.id, row.path, row.captions, split) for row, split in zip(free, dealt, strict=True)
    ]
    for split in SPLITS:
        yield from (row for row in good if row.split == split)
