"""Folders of a process in the system's temporary folder: another process of the same node removes them when that one is gone,
however it went. Several nodes may have one temporary folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


def make(kind: str) -> tuple[Path, int]:
    """A new folder of a kind, and the descriptor that holds it until it is closed or its process ends. What dead processes left
    of the kind is removed. On a filesystem without locks nothing is held, and nobody removes anything."""
    with _root(kind) as root:
        _remove_left(root)
        made = Path(tempfile.mkdtemp(dir=root))
        return made, _held_if_possible(made, fcntl.LOCK_SH)


def tidy(kind: str) -> None:
    """Remove from this node what dead processes left of a kind; a folder that cannot be tidied stops nobody."""
    with contextlib.suppress(OSError), _root(kind) as root:
        _remove_left(root)


@contextlib.contextmanager
def _root(kind: str) -> Iterator[Path]:
    """The folder of all this user's processes on this node, to make one in it or to remove some as long as the `with` lasts."""
    root = Path(tempfile.gettempdir()) / f"ask_ray-{kind}-{os.getuid()}-{socket.gethostname()}"
    root.mkdir(mode=0o700, exist_ok=True)
    alone = _held_if_possible(root, fcntl.LOCK_EX)
    try:
        yield root
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(alone, fcntl.LOCK_UN)  # a process that was forked meanwhile has the descriptor too
        os.close(alone)


def _remove_left(root: Path) -> None:
    for left in root.iterdir():
        with contextlib.suppress(OSError):  # removed by its process just now, or on a filesystem without such locks
            if left.is_dir() and not in_use(left):
                shutil.rmtree(left, ignore_errors=True)


def _held_if_possible(path: Path, how: int) -> int:
    """A descriptor of a folder, locked where its filesystem can."""
    lease = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(lease, how)
    return lease


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
