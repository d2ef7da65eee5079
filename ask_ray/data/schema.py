"""The Arrow schema of a prepared corpus, of sounds or of pictures, and what makes a recording or a picture usable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ask_ray.config import UserError
from ask_ray.modality import Modality
from ask_ray.storage import digest_bytes

SPLITS = ("train", "validation", "test")

#: What a clip must not be found in, if it is to be trained on.
HELD_OUT = ("validation", "test")

#: Of manifests and files as written here; a corpus of another format is prepared anew.
FORMAT = 3

#: Clips in a row group of the Parquet files: what is read at once.
ROW_GROUP = 64


def _rows_of(*own: pa.Field) -> pa.Schema:
    """All captions of a clip, the file it came from, and its own columns; what it was taken from, named alike in every corpus
    (`freesound:1234`, `youtube:…`, `coco:…`), if that is known; the digest of its samples."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            *own,
            pa.field("source_id", pa.string()),
            pa.field("digest", pa.string(), nullable=False),
        ]
    )


#: A row is a clip: mono 16-bit samples at the corpus's rate, seconds.
CLIPS = _rows_of(pa.field("waveform", pa.list_(pa.int16()), nullable=False), pa.field("duration", pa.float32(), nullable=False))

#: A row is a picture: its pixels row by row, red, green and blue of each; both sides in pixels. They are kept as they are seen by
#: training, like the samples of a recording: a corpus is read many times, and nothing is decoded or lost again.
PICTURES = _rows_of(
    pa.field("pixels", pa.list_(pa.uint8()), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
)


class Kept(NamedTuple):
    """What a prepared corpus holds of a modality.

    samples: the column of samples, of so many `bytes` each; sides: the columns of their shape, if they have one; settings: of
    `data`, those that change it; added: numbers that are added up over clips; counted: numbers that clips are counted by.
    """

    schema: pa.Schema
    samples: str
    bytes: int
    sides: tuple[str, ...]
    settings: tuple[str, ...]
    added: tuple[str, ...]
    counted: tuple[str, ...]


KEPT: dict[Modality, Kept] = {
    "audio": Kept(
        CLIPS, "waveform", 2, (), ("sample_rate", "min_seconds", "keep_seconds"), ("seconds", "cut"), ("rates", "lengths")
    ),
    "image": Kept(PICTURES, "pixels", 1, ("height", "width"), ("image_size",), ("shrunk",), ("shorter", "longer")),
}

#: A row is a recording or manifest row that could not be used, and why.
REJECTED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

#: The reason of a row whose file is not there.
MISSING = "missing file"

#: Reasons that say nothing about a clip's quality; they do not count against `data.max_rejected`.
NO_CAPTION, BLACKLISTED = "no caption", "blacklisted"
BY_ID, BY_SOURCE, BY_DIGEST = "held out by id", "held out by source id", "held out by digest"
LEAKS = (BY_ID, BY_SOURCE, BY_DIGEST)
UNBLAMED = (NO_CAPTION, BLACKLISTED, *LEAKS)

#: Peaks below this (-80 dB of full scale) count as silence.
SILENCE = 1e-4

#: Pictures with a side of fewer pixels show nothing.
LEAST_SIDE = 8


class UnusableClip(UserError, ValueError):
    """A recording, picture or row that is set aside; `reason` is one of a few words, the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Clip:
    """A usable clip. `waveform`: (samples,) int16 mono at `rate` Hz.

    `recorded_rate`: Hz of the file; `cut`: whether it goes on after the clip's end.
    """

    id: str
    split: str
    captions: tuple[str, ...]
    waveform: np.ndarray = field(repr=False)
    source: str
    rate: int
    recorded_rate: int
    source_id: str | None = None
    cut: bool = False

    @cached_property
    def digest(self) -> str:
        """Of the samples: the same in every corpus of the same rate that holds the recording."""
        return digest_bytes(self.waveform.tobytes())

    def row(self) -> dict[str, object]:
        """The clip as a row of :data:`CLIPS`."""
        return {
            "id": self.id,
            "split": self.split,
            "captions": list(self.captions),
            "waveform": self.waveform,
            "source": self.source,
            "duration": len(self.waveform) / self.rate,
            "source_id": self.source_id,
            "digest": self.digest,
        }

    def tally(self) -> dict[str, float]:
        """What the data card is made from: see :data:`KEPT`. `rates`: Hz of the recording; `lengths`: whole seconds."""
        samples = len(self.waveform)
        told = {"samples": samples, "seconds": samples / self.rate, "cut": self.cut}
        return told | {"rates": self.recorded_rate, "lengths": samples // self.rate}


@dataclass(frozen=True)
class Picture:
    """A usable picture. `pixels`: (height, width, 3) uint8, red, green, blue; `shrunk`: whether the file holds more."""

    id: str
    split: str
    captions: tuple[str, ...]
    pixels: np.ndarray = field(repr=False)
    source: str
    source_id: str | None = None
    shrunk: bool = False

    @cached_property
    def digest(self) -> str:
        """Of the pixels and their shape: the same in every corpus of the same `data.image_size` that holds the picture."""
        return digest_bytes(repr(self.pixels.shape).encode() + self.pixels.tobytes())

    def row(self) -> dict[str, object]:
        """The picture as a row of :data:`PICTURES`."""
        height, width, _ = self.pixels.shape
        return {
            "id": self.id,
            "split": self.split,
            "captions": list(self.captions),
            "source": self.source,
            "pixels": self.pixels.ravel(),
            "height": height,
            "width": width,
            "source_id": self.source_id,
            "digest": self.digest,
        }

    def tally(self) -> dict[str, float]:
        """What the data card is made from: see :data:`KEPT`. `shorter`, `longer`: pixels of the sides."""
        sides = sorted(self.pixels.shape[:2])
        return {"samples": self.pixels.size, "shrunk": self.shrunk, "shorter": sides[0], "longer": sides[1]}


@dataclass(frozen=True)
class Rejection:
    """A row of :data:`REJECTED`. Names of files in it are :func:`told`."""

    id: str
    source: str
    reason: str
    detail: str = ""

    def __post_init__(self) -> None:
        for name, text in list(vars(self).items()):
            object.__setattr__(self, name, told(text))


def told(name: str | Path) -> str:
    """A file's name as text that can be written anywhere: bytes that are no UTF-8 stand as `\\xf6`, and so do those of half a
    character, which JSON can name."""
    try:
        content = os.fsencode(name)
    except UnicodeEncodeError:
        content = str(name).encode("utf-8", "surrogatepass")
    return content.decode("utf-8", "backslashreplace")


def id_number(clip_id: str) -> int:
    """A clip id as a stable non-negative 63-bit integer, for tensors that travel between workers."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big") >> 1


def usable_captions(captions: Sequence[object]) -> tuple[str, ...]:
    """The captions without surrounding space; missing and empty ones are left out.

    Raises:
        UnusableClip: if none is left.
    """
    texts = tuple(text.strip() for text in captions if isinstance(text, str) and text.strip())
    if not texts:
        raise UnusableClip("empty caption", "no caption has any text")
    return texts


def usable_waveform(samples: np.ndarray, rate: int, min_seconds: float) -> np.ndarray:
    """Mono float samples in [-1, 1] as (samples,) int16.

    Raises:
        UnusableClip: if they are empty, too short, not finite, or silent.
    """
    if samples.size == 0:
        raise UnusableClip("empty", "the file holds no samples")
    if not np.isfinite(samples).all():
        raise UnusableClip("not finite", f"{int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    if samples.size < min_seconds * rate:
        raise UnusableClip("too short", f"{samples.size / rate:.3f} s, data.min_seconds is {min_seconds}")
    peak = float(np.abs(samples).max())
    if peak < SILENCE:
        raise UnusableClip("silent", f"the loudest sample is {peak:.1e} of full scale")
    return np.clip(np.rint(samples * 32767.0), -32768, 32767).astype(np.int16)


def usable_pixels(pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 as they are.

    Raises:
        UnusableClip: if a side is too short to show anything.
    """
    height, width, _ = pixels.shape
    if min(height, width) < LEAST_SIDE:
        raise UnusableClip("too small", f"{width} × {height} pixels; each side needs {LEAST_SIDE}")
    return pixels
