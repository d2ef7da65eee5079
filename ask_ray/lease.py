"""One driver at a time: what the driver of a run, a sweep or a corpus writes there, so that no second takes it up meanwhile."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import psutil

from ask_ray.config import SettingsError
from ask_ray.storage import Folder, StorageError

LOG = logging.getLogger(__name__)

FILE = "driver.json"

#: Seconds between two beats of a driver, and how many may be missing before it is taken for dead.
BEAT, MISSING = 10.0, 3

#: Beats that prove a driver alive: the first may have been its last.
ALIVE = 2


@dataclass(frozen=True)
class Driver:
    """A process that drives a run. token: its own name; started: of the process, Unix seconds; beat: counts up while it lives."""

    token: str
    host: str
    process: int
    started: float
    beat: int = 0

    @property
    def gone(self) -> bool:
        """Whether this machine knows that it has ended: a number that another process bears now is not the driver's."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.process)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


@contextlib.contextmanager
def held(folder: Folder, setting: str) -> Iterator[None]:
    """Drive the run or sweep in a folder, or prepare the corpus, alone, as long as the `with` lasts.

    A driver that was killed is known by its process, on the machine where it ran; elsewhere by its beats, which are
    waited for. No storage here offers a lock: two drivers that start within the same moment are not told apart.

    Raises:
        SettingsError: naming `setting`, if another driver lives.
        StorageError: if the folder cannot be read or written.
    """
    _wait_for_its_end(folder, setting)
    own = Driver(uuid.uuid4().hex, socket.gethostname(), os.getpid(), psutil.Process().create_time())
    folder.write_json(FILE, asdict(own))
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(folder, own, over), name="driver-beat", daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(StorageError):  # it then counts as dead, a little later
            if _is(own, _read(folder)):
                folder.remove(FILE)


def _wait_for_its_end(folder: Folder, setting: str) -> None:
    """Return when no driver lives.

    Raises:
        SettingsError: naming `setting`, if one does.
    """
    first, seen = _read(folder), time.monotonic()
    beat = first.beat if first is not None else 0
    if first is not None and not first.gone:
        LOG.warning("%s was driven by process %d on %s: waiting to see whether it lives", folder, first.process, first.host)
    while (found := _read(folder)) is not None and not found.gone and time.monotonic() - seen < MISSING * BEAT:
        if first is None or found.token != first.token or found.beat >= first.beat + ALIVE:
            raise SettingsError(
                f"{setting}: {folder} is under way, driven by process {found.process} on {found.host}; wait for its end, or "
                f"choose another {setting}"
            )
        if found.beat != beat:
            beat, seen = found.beat, time.monotonic()
        time.sleep(BEAT / 20)


def _beat(folder: Folder, own: Driver, over: threading.Event) -> None:
    while not over.wait(BEAT):
        own = replace(own, beat=own.beat + 1)
        try:
            if not _is(own, _read(folder)):
                LOG.error("%s was taken up by another driver while its storage was away: stop one", folder)
                return
            folder.write_json(FILE, asdict(own))
        except StorageError as error:
            LOG.warning("this driver's beat is not written: %s", error)


def _is(own: Driver, found: Driver | None) -> bool:
    return found is not None and found.token == own.token


def _read(folder: Folder) -> Driver | None:
    """Who drives, None if nobody does, or if what is written there is no driver's."""
    try:
        return Driver(**folder.read_json(FILE))
    except (FileNotFoundError, ValueError, TypeError):
        return None
