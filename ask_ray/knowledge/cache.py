"""Copies of remote versions on a node's disk: one for all of its processes, bounded, the least recently used go first.

A copy is kept in a folder named by the digest of the version's manifest, so that versions of different runs never mix. Who uses
one holds a shared lock (``flock``) on a file in it, which ends with the process, however it ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ask_ray.config import KnowledgeSettings
from ask_ray.scratch import in_use, lock
from ask_ray.storage import Folder, expanded

#: The file of a copy that its users lock; its time is that of the last use.
LEASE = ".lease"
#: Where a copy is fetched to; there is one at a time.
FETCHING = ".fetching"


class Copy:
    """A version's files on this node, in the folder `path`. They are kept as long as this object lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease = lock(path / LEASE)
        weakref.finalize(self, os.close, self._lease)

    def stands(self) -> bool:
        """Whether this is still the copy at its place: another process may have replaced it."""
        try:
            return os.path.samestat(os.fstat(self._lease), (self.path / LEASE).stat())
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Cache:
    """The copies of this node. folder: where they are, None for the system's temporary folder; gib: GiB they may take."""

    folder: str | None = None
    gib: float = KnowledgeSettings().cache_gib

    @classmethod
    def of(cls, knowledge: KnowledgeSettings) -> Cache:
        """The cache that the settings ask for."""
        return cls(knowledge.cache, knowledge.cache_gib)

    @property
    def root(self) -> Path:
        """The folder on this node."""
        if self.folder is None:
            return Path(tempfile.gettempdir()) / f"ask_ray-knowledge-{os.getuid()}"
        return expanded(self.folder)

    def hold(self, key: str, sizes: Mapping[str, int], fetch: Callable[[Path], None], intact: Callable[[Path], bool]) -> Copy:
        """The copy `key`, fetched if it is not there, not whole or damaged. Processes that ask at once wait for one of them to
        fetch; what another one fetched, each verifies itself, beside the others.

        Before a copy is fetched, others that nobody uses make room for it; it is kept even if it alone is larger than the bound.

        Args:
            key: a name that no other content has.
            sizes: bytes of each of its files.
            fetch: fills an empty folder and verifies it, and raises what is to be raised if it cannot.
            intact: whether a copy that was there, of the right sizes, has the right content.

        Raises:
            StorageError: naming `knowledge.cache`, if the folder cannot be written.
        """
        path, guard = self.root / key, self.root / "lock"
        Folder(str(self.root)).check_writable("knowledge.cache")
        while True:
            with FileLock(guard):
                fetched = not _whole(path, sizes)
                if fetched:
                    self._make_room(key, sum(sizes.values()))
                    _replace(path, fetch)
                (path / LEASE).touch()
                copy = Copy(path)
            if fetched or intact(path):
                return copy
            with FileLock(guard):
                if copy.stands():
                    shutil.rmtree(path)  # who still uses it keeps its files open

    def _make_room(self, key: str, size: int) -> None:
        """Remove the least recently used copies, until one of `size` bytes fits beside the others."""
        limit = self.gib * 2**30
        others = sorted((path for path in self.root.iterdir() if (path / LEASE).exists() and path.name != key), key=_last_used)
        taken = {path: sum(file.stat().st_size for file in path.iterdir()) for path in others}
        for path in others:
            if size + sum(taken.values()) > limit and not in_use(path / LEASE):
                shutil.rmtree(path)
                del taken[path]


def _whole(copy: Path, sizes: Mapping[str, int]) -> bool:
    """Whether all files are there and as long as they should be."""
    there = {file.name: file.stat().st_size for file in copy.iterdir()} if copy.is_dir() else {}
    return all(there.get(name) == size for name, size in sizes.items())


def _replace(copy: Path, fetch: Callable[[Path], None]) -> None:
    """Fetch a copy beside its place, and put it there whole and safe on the disk. Who still uses a damaged one keeps its files
    open."""
    made = copy.parent / FETCHING
    shutil.rmtree(made, ignore_errors=True)  # what a process that died left
    made.mkdir()
    try:
        fetch(made)
        (made / LEASE).touch()
        for path in (*made.iterdir(), made):
            _sync(path)
        shutil.rmtree(copy, ignore_errors=True)
        made.rename(copy)
        _sync(copy.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _last_used(copy: Path) -> float:
    return (copy / LEASE).stat().st_mtime


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # for folders, some filesystems cannot
            raise
    finally:
        os.close(descriptor)
