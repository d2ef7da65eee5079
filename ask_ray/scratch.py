"""Folders of a process in the system's temporary folder: another process removes them when that one is gone, however it went."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock


def make(kind: str) -> tuple[Path, int]:
    """A new folder of a kind, and the descriptor that holds it until it is closed or its process ends. What dead processes left
    of the kind is removed."""
    with _root(kind) as root:
        _remove_left(root)
        made = Path(tempfile.mkdtemp(dir=root))
        return made, lock(made)


def tidy(kind: str) -> None:
    """Remove from this node what dead processes left of a kind; a folder that cannot be tidied stops nobody."""
    with contextlib.suppress(OSError), _root(kind) as root:
        _remove_left(root)


@contextlib.contextmanager
def _root(kind: str) -> Iterator[Path]:
    """The folder of all processes' of this user, to make one in it or to remove some as long as the `with` lasts."""
    root = Path(tempfile.gettempdir()) / f"ask_ray-{kind}-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    with FileLock(root / "lock"):
        yield root


def _remove_left(root: Path) -> None:
    for left in root.iterdir():
        with contextlib.suppress(OSError):  # removed by its process just now, or on a filesystem without such locks
            if left.is_dir() and not in_use(left):
                shutil.rmtree(left, ignore_errors=True)


def lock(path: Path) -> int:
    """A descriptor that holds a file or folder, as others may too, until it is closed or its process ends."""
    lease = os.open(path, os.O_RDONLY)
    fcntl.flock(lease, fcntl.LOCK_SH)
    return lease


def in_use(path: Path) -> bool:
    """Whether a live process holds a file or folder by :func:`lock`."""
    lease = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lease)
