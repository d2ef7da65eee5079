"""Files that lists name: whether they are there and hold anything."""

from __future__ import annotations

from pathlib import Path

from ask_ray.data.schema import MISSING, UnusableClip


def is_there(path: Path) -> bool:
    """Whether a file is there; false too for a name that no filesystem takes."""
    try:
        return path.is_file()
    except OSError:
        return False


def present(path: Path) -> None:
    """Set aside what cannot be opened.

    Raises:
        UnusableClip: if the file is missing or empty.
    """
    if not is_there(path):
        raise UnusableClip(MISSING, f"{path} is not there")
    if path.stat().st_size == 0:
        raise UnusableClip("empty", f"{path} holds no bytes")
