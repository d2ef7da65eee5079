"""Which versions of the knowledge base the kept checkpoints name, told to the refiner, which prunes the others."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from ray.actor import ActorHandle

from ask_ray.journal import Journal
from ask_ray.storage import Folder, StorageError
from ask_ray.training.checkpoint import pinned_versions


class Pins:
    """The versions that the checkpoints of a run name. A thread looks for them on storage, so that no step waits for it."""

    def __init__(self, run: Folder, refiner: ActorHandle, journal: Journal, kept: int) -> None:
        """`kept`: checkpoints that the run keeps."""
        self._run, self._refiner, self._journal = run, refiner, journal
        self._named: deque[int] = deque(maxlen=kept + 1)  # by checkpoints that may still be on their way to storage
        self._found: list[int] | None = None
        self._lock = threading.Lock()
        self._looker = ThreadPoolExecutor(1, "pins")
        self._looking: Future[None] | None = None

    def renew(self, version: int | None) -> None:
        """Pin anew, without waiting, after a checkpoint that names `version` was saved, 0 for none; or after None was.

        While storage is away, what the last look found stays pinned. Before the first one that succeeds nothing is told: the
        checkpoints of an earlier life of the run may name any version.
        """
        if version is not None:
            with self._lock:
                self._named.append(version)
        self._tell()
        if self._looking is not None and self._looking.done():
            self._looking.result()  # raises what went wrong otherwise than by storage
            self._looking = None
        if self._looking is None:
            self._looking = self._looker.submit(self._look)

    def _look(self) -> None:
        try:
            found = pinned_versions(self._run)
        except StorageError as error:
            self._journal.tell("not listed", problem=str(error))
            return
        with self._lock:
            self._found = found
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            if self._found is not None:
                self._refiner.pin.remote(sorted({*self._found, *self._named} - {0}))
