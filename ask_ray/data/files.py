"""Files that lists name: whether they are there and hold anything, and whether it is they or the storage that fails."""

from __future__ import annotations

import os
import platform
import stat
from pathlib import Path

from ask_ray.data.schema import MISSING, UnusableClip
from ask_ray.storage import StorageError


def state(path: Path) -> os.stat_result | None:
    """A file's size and times; None if no file is there, as for a name that no filesystem takes."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def is_there(path: Path) -> bool:
    """Whether a file is there."""
    return state(path) is not None


def present(path: Path) -> None:
    """Set aside what cannot be opened.

    Raises:
        UnusableClip: if the file is missing or empty.
    """
    if not is_there(path):
        raise UnusableClip(MISSING, f"{path} is not there")
    refuse_empty(path)


def refuse_empty(path: Path) -> None:
    """Set aside a file that shows without being opened to hold nothing.

    Raises:
        UnusableClip: if it is there and empty.
    """
    found = state(path)
    if found is not None and found.st_size == 0:
        raise UnusableClip("empty", f"{path} holds no bytes")


def read_through(path: Path) -> None:
    """Read a file that could not be used once more, so that storage that fails is not taken for damage.

    Raises:
        StorageError: if it cannot be read, but for want of permission, which is the file's own fault.
    """
    try:
        with path.open("rb") as stream:
            while stream.read(1 << 20):
                pass
    except PermissionError:
        return
    except OSError as error:
        raise away(path, error) from error


def away(path: Path, problem: object) -> StorageError:
    """The error that storage fails a file which was there when the corpus was planned."""
    return StorageError(
        f"{path} was there when the corpus was planned, and cannot be read on {platform.node()}: {problem}. Every node must see "
        "the same files at the same path: mount them there, or mend the storage"
    )
