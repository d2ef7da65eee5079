"""Decoding: any file that libsndfile reads, as mono float samples at one rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import soxr

from ask_ray.data.schema import UnusableClip


def is_there(path: Path) -> bool:
    """Whether a file is there; false too for a name that no filesystem takes."""
    try:
        return path.is_file()
    except OSError:
        return False


def load(path: Path, rate: int) -> np.ndarray:
    """Decode a file (wav, flac, ogg, mp3, …), average its channels and resample it.

    Returns:
        (samples,) float32 at `rate` Hz, full scale 1.

    Raises:
        UnusableClip: if the file is missing or cannot be decoded.
    """
    if not is_there(path):
        raise UnusableClip("missing file", f"{path} is not there")
    if path.stat().st_size == 0:
        raise UnusableClip("empty", f"{path} holds no bytes")
    try:
        samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:  # a damaged header can promise any length
        raise UnusableClip("unreadable", f"{path}: {error}") from error
    mono = samples.mean(axis=1)
    if found == rate or mono.size == 0 or not np.isfinite(mono).all():
        return mono
    return np.asarray(soxr.resample(mono, found, rate), dtype=np.float32)
