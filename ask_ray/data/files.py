"""Files that lists name: whether they are there and hold anything, and whether it is they or the storage that fails."""

from __future__ import annotations

import errno
import os
import platform
import stat
from pathlib import Path

from ask_ray.data.schema import MISSING, UnusableClip
from ask_ray.storage import StorageError

#: What a system answers of a name under which nothing is, or can be.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def state(path: Path) -> os.stat_result | None:
    """A file's size and times; None if no file is there, as for a name that no filesystem takes.

    Raises:
        StorageError: if it cannot be told whether one is there.
    """
    try:
        found = path.stat()
    except ValueError:
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise StorageError(
            f"whether {path} is there cannot be told on {platform.node()}: {error}. Let its folder be read, or mend the storage"
        ) from error
    return found if stat.S_ISREG(found.st_mode) else None


def is_there(path: Path) -> bool:
    """Whether a file is there."""
    return state(path) is not None


def present(path: Path) -> None:
    """Set aside a file that shows without being opened to hold nothing.

    Raises:
        UnusableClip: if it is missing or empty.
        StorageError: as :func:`state`.
    """
    found = state(path)
    if found is None:
        raise UnusableClip(MISSING, f"{path} is not there")
    if found.st_size == 0:
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
