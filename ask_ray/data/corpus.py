"""A prepared corpus, of sounds or of pictures: its manifest and its Parquet files, read a row group at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from ask_ray.config import SettingsError
from ask_ray.data.schema import FORMAT, KEPT, ROW_GROUP, SPLITS, Kept
from ask_ray.modality import Form
from ask_ray.storage import Folder, StorageError, masked

LOG = logging.getLogger(__name__)


class Group(NamedTuple):
    """A row group: the unit that is read at once."""

    file: str
    number: int
    clips: int


class Identities(NamedTuple):
    """How the clips of a split can be recognised elsewhere, a list each in the order of the corpus."""

    ids: list[str]
    source_ids: list[str | None]
    digests: list[str]


@dataclass(frozen=True)
class ClipRows:
    """Clips read from Parquet. `offsets`: (clips + 1,) into `samples`: (all samples,) int16, of pictures uint8; `sides`: of
    pictures, (clips, 2) int64 heights and widths."""

    ids: list[str]
    captions: list[list[str]]
    samples: np.ndarray
    offsets: np.ndarray
    sides: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def signal(self, row: int) -> np.ndarray:
        """A waveform, (samples,) int16, or a picture, (height, width, 3) uint8."""
        samples = self.samples[self.offsets[row] : self.offsets[row + 1]]
        return samples if self.sides is None else samples.reshape(*self.sides[row], 3)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: its folder and its manifest."""

    folder: Folder
    manifest: dict[str, Any]

    @classmethod
    def open(cls, place: str) -> Corpus:
        """Open a prepared corpus.

        Raises:
            SettingsError: if the folder holds no finished corpus, or its manifest is another file's.
        """
        folder = Folder.at(place)
        if not folder.exists("manifest.json"):
            raise SettingsError(f"{folder}: no prepared corpus is there (manifest.json is missing); run jobs/prepare.py")
        try:
            manifest = folder.read_json("manifest.json")
        except ValueError as error:
            raise SettingsError(f"{folder / 'manifest.json'}: not JSON ({error}); prepare the corpus anew") from error
        if not isinstance(manifest, dict) or set(manifest.get("splits", ())) != set(SPLITS):
            raise SettingsError(f"{folder / 'manifest.json'}: not the manifest of a prepared corpus; run jobs/prepare.py")
        if manifest.get("format") != FORMAT:
            raise SettingsError(
                f"{folder / 'manifest.json'}: a corpus of format {manifest.get('format')}, and this ask_ray reads format "
                f"{FORMAT}: prepare it anew"
            )
        return cls(folder, manifest)

    @property
    def form(self) -> Form:
        """What its clips are, and how they are kept."""
        if self.manifest["modality"] == "image":
            return Form("image", int(self.manifest["image_size"]))
        return Form("audio", int(self.manifest["sample_rate"]), float(self.manifest["settings"]["keep_seconds"]))

    @property
    def sample_rate(self) -> int | None:
        """Hz; None of pictures."""
        return self.form.sample_rate

    @property
    def kept(self) -> Kept:
        """What the files hold."""
        return KEPT[self.form.modality]

    def clips(self, split: str) -> int:
        """Number of clips of a split."""
        return int(self._split(split)["clips"])

    def cut_otherwise(self, splits: Iterable[str], form: Form) -> bool:
        """Whether another form would keep more or less of a recording of these splits, so that its samples could not be compared.
        Reads the durations where the manifest cannot tell."""
        least = min(self.form.seconds, form.seconds)
        return self.form.seconds != form.seconds and any(self._holds_longer(split, least) for split in splits)

    def rejected(self) -> dict[str, int]:
        """How many clips were set aside, by reason."""
        return dict(self.manifest["rejected"])

    def entries(self, split: str, captions_per_clip: int) -> int:
        """Most knowledge-base entries that a split can make (clips may have fewer captions than asked for)."""
        return sum(group.clips for group in self.groups(split)) * min(captions_per_clip, self._most_captions(split))

    def mean_bytes(self, split: str) -> float:
        """Mean bytes of a clip's samples."""
        found = self._split(split)
        return float(self.kept.bytes) * found["samples"] / max(1, found["clips"])

    def groups(self, split: str) -> list[Group]:
        """The split's row groups in the order of the corpus."""
        made = []
        for file in self._split(split)["files"]:
            starts = range(0, file["clips"], ROW_GROUP)
            made += [Group(file["name"], n, min(ROW_GROUP, file["clips"] - start)) for n, start in enumerate(starts)]
        return made

    def columns(self, split: str) -> list[str]:
        """Names of the columns that the split's files have; none if the split has no clips."""
        with self._reading():
            return list(self._files(split).schema.names)

    def ids(self, split: str) -> list[str]:
        """Ids of the split's clips in the order of the corpus. Reads that one column."""
        with self._reading():
            files = self._files(split)
            return list(files.to_table(columns=["id"]).column("id").to_pylist()) if files.files else []

    def captions(self, split: str) -> Iterator[list[str]]:
        """Each clip's captions in the order of the corpus. Reads that one column, a batch at a time."""
        with self._reading():
            files = self._files(split)
            for batch in files.to_batches(columns=["captions"]) if files.files else ():
                yield from batch.column("captions").to_pylist()

    def identities(self, split: str) -> Identities:
        """Ids, source ids and digests of the split's clips. Reads those columns."""
        names = ["id", "source_id", "digest"]
        with self._reading():
            files = self._files(split)
            table = files.to_table(columns=names) if files.files else None
        return Identities(*(table.column(name).to_pylist() if table else [] for name in names))

    def signals(self, split: str, places: Iterable[int]) -> dict[int, np.ndarray]:
        """:meth:`ClipRows.signal` of clips by their places in the order of the corpus; reads their row groups."""
        groups = self.groups(split)
        ends = np.cumsum([group.clips for group in groups])
        wanted: dict[int, list[int]] = {}
        for place in places:
            wanted.setdefault(int(np.searchsorted(ends, place, side="right")), []).append(place)
        found: dict[int, np.ndarray] = {}
        for number, held in wanted.items():
            rows = self.read(groups[number])
            start = int(ends[number]) - len(rows)
            found |= {place: rows.signal(place - start).copy() for place in held}
        return found

    def read(self, group: Group) -> ClipRows:
        """Read one row group. Remote storage that is away is tried again for a while: what is read here is read in the middle of
        things.

        Raises:
            StorageError: if it stays away, or the file is damaged.
        """
        with self._reading():
            table = self.folder.patiently(lambda: self._table(group), _not_read)
        held = table.column(self.kept.samples).combine_chunks()
        sides = [table.column(name).to_numpy() for name in self.kept.sides]
        ids, captions = (table.column(name).to_pylist() for name in ("id", "captions"))
        shapes = np.stack(sides, axis=1) if sides else None
        return ClipRows(ids, captions, held.values.to_numpy(), held.offsets.to_numpy(), shapes)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """What is wrong with the files of clips as a StorageError: a finished corpus has them all, and whole."""
        try:
            yield
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"{self.folder / 'clips'} cannot be read: {masked(str(error))}; mend the storage, or prepare the corpus anew"
            ) from error

    def _table(self, group: Group) -> pa.Table:
        names = ["id", "captions", self.kept.samples, *self.kept.sides]
        with (self.folder / "clips").open(group.file) as stream:
            return pq.ParquetFile(stream).read_row_group(group.number, columns=names)

    def _holds_longer(self, split: str, seconds: float) -> bool:
        """Whether a recording of the split is longer than this, which is at most what is kept of one."""
        found = self._split(split)
        if found["cut"] or seconds == self.form.seconds or max(map(int, found["lengths"]), default=0) <= seconds - 1:
            return bool(found["cut"])
        with self._reading():
            durations = self._files(split).to_table(columns=["duration"]).column("duration").to_numpy()
        return bool(durations.max(initial=0) > seconds + 2 / self.form.resolution)  # resampling may add a sample

    def _files(self, split: str) -> pa.dataset.FileSystemDataset:
        filesystem, path = (self.folder / "clips").resolve()
        paths = [f"{path}/{file['name']}" for file in self._split(split)["files"]]
        return pa.dataset.dataset(paths, filesystem=filesystem, format="parquet")

    def _split(self, split: str) -> dict[str, Any]:
        if split not in SPLITS:
            raise SettingsError(f"{split!r} is no split; choose one of {', '.join(SPLITS)}")
        return dict(self.manifest["splits"][split])

    def _most_captions(self, split: str) -> int:
        return int(self._split(split)["most_captions"])


def _not_read(error: StorageError) -> None:
    LOG.warning("clips are not read yet: %s", error)
