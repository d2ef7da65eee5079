"""A prepared corpus: its manifest and its Parquet files, read a row group at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from ask_ray.config import SettingsError
from ask_ray.data.schema import ROW_GROUP, SPLITS
from ask_ray.storage import Folder


class Group(NamedTuple):
    """A row group: the unit that is read at once."""

    file: str
    number: int
    clips: int


@dataclass(frozen=True)
class ClipRows:
    """Clips read from Parquet. `offsets`: (clips + 1,) into `samples`: (all samples,) int16."""

    ids: list[str]
    captions: list[list[str]]
    samples: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def waveform(self, row: int) -> np.ndarray:
        """(samples,) int16."""
        return self.samples[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: its folder and its manifest."""

    folder: Folder
    manifest: dict[str, Any]

    @classmethod
    def open(cls, place: str) -> Corpus:
        """Open a prepared corpus.

        Raises:
            SettingsError: if the folder holds no finished corpus.
        """
        folder = Folder.at(place)
        if not folder.exists("manifest.json"):
            raise SettingsError(f"{folder}: no prepared corpus is there (manifest.json is missing); run jobs/prepare.py")
        return cls(folder, folder.read_json("manifest.json"))

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return int(self.manifest["sample_rate"])

    def clips(self, split: str) -> int:
        """Number of clips of a split."""
        return int(self._split(split)["clips"])

    def rejected(self) -> dict[str, int]:
        """How many clips were set aside, by reason."""
        return dict(self.manifest["rejected"])

    def entries(self, split: str, captions_per_clip: int) -> int:
        """Most knowledge-base entries that a split can make (clips may have fewer captions than asked for)."""
        return sum(group.clips for group in self.groups(split)) * min(captions_per_clip, self._most_captions(split))

    def mean_bytes(self, split: str) -> float:
        """Mean bytes of a clip's samples."""
        found = self._split(split)
        return 2.0 * found["samples"] / max(1, found["clips"])

    def groups(self, split: str) -> list[Group]:
        """The split's row groups in the order of the corpus."""
        made = []
        for file in self._split(split)["files"]:
            starts = range(0, file["clips"], ROW_GROUP)
            made += [Group(file["name"], n, min(ROW_GROUP, file["clips"] - start)) for n, start in enumerate(starts)]
        return made

    def read(self, group: Group) -> ClipRows:
        """Read one row group."""
        filesystem, path = (self.folder / "clips" / group.file).resolve()
        with filesystem.open_input_file(path) as stream:
            table = pq.ParquetFile(stream).read_row_group(group.number, columns=["id", "captions", "waveform"])
        waveform = table.column("waveform").combine_chunks()
        offsets = waveform.offsets.to_numpy()
        samples = waveform.values.to_numpy()
        return ClipRows(table.column("id").to_pylist(), table.column("captions").to_pylist(), samples, offsets)

    def _split(self, split: str) -> dict[str, Any]:
        if split not in SPLITS:
            raise SettingsError(f"{split!r} is no split; choose one of {', '.join(SPLITS)}")
        return dict(self.manifest["splits"][split])

    def _most_captions(self, split: str) -> int:
        return int(self._split(split)["most_captions"])
