"""Decoding: any file that libsndfile reads, as mono float samples at one rate."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from ask_ray.data import containers
from ask_ray.data.files import present
from ask_ray.data.schema import UnusableClip


class Decoded(NamedTuple):
    """samples: (samples,) float32 at the asked rate, full scale 1; rate: the recording's, Hz; cut: whether more was there."""

    samples: np.ndarray
    rate: int
    cut: bool


def load(path: Path, rate: int, seconds: float = math.inf) -> Decoded:
    """:func:`decode` of a file.

    Raises:
        UnusableClip: if the file is missing, empty, broken off, or cannot be decoded.
    """
    present(path)
    return decode(path, str(path), rate, seconds)


def decode(source: Path | BinaryIO, name: str, rate: int, seconds: float = math.inf) -> Decoded:
    """Decode a recording (wav, flac, ogg, mp3, …) up to `seconds`, average its channels and resample it.

    Args:
        source: a file, or its bytes to read from.
        name: what to call it in messages.
        rate: Hz.

    Raises:
        UnusableClip: if it cannot be decoded, or is broken off as far as :func:`~ask_ray.data.containers.refuse_broken` can tell.
    """
    try:
        with soundfile.SoundFile(os.fsencode(source) if isinstance(source, Path) else source) as file:
            form = "MP3" if file.subtype.startswith("MPEG") else file.format  # a WAV file may hold MPEG frames
            found, frames = file.samplerate, file.frames
            kept = int(min(frames, math.ceil(seconds * found))) if seconds < math.inf else frames
            samples = file.read(kept, dtype="float32", always_2d=True)
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
            containers.refuse_broken(stream, form, kept, len(samples))
    except (RuntimeError, TypeError, ValueError, MemoryError, OSError) as error:  # a damaged header can promise any length
        raise UnusableClip("unreadable", f"{name}: {error}") from error
    mono = _mono(samples)
    if found != rate and mono.size > 0 and np.isfinite(mono).all():
        mono = np.asarray(soxr.resample(mono, found, rate), dtype=np.float32)
    return Decoded(mono, found, frames > kept)


def _mono(samples: np.ndarray) -> np.ndarray:
    """The mean of (samples, channels), channel by channel: many times as fast as along the rows."""
    mono = samples[:, 0].copy()
    for channel in range(1, samples.shape[1]):
        mono += samples[:, channel]
    mono /= samples.shape[1]
    return mono
