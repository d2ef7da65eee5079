"""Rank 0's side of a refresh: ask without waiting, know whether one is under way, and ask again for what was lost."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import ray
from ray.actor import ActorHandle

from ask_ray.knowledge.refiner import Outcome, Request

#: Exceptions of a refiner that is away for now: it restarts by itself.
AWAY = (ray.exceptions.RayError, ray.exceptions.GetTimeoutError)

#: So many answers in a row, half a second apart, that it has died mean that it stays dead: Ray calls one that it restarts
#: unavailable, or lets the caller wait.
DEATHS = 10


class RefinerDied(RuntimeError):
    """The refiner is dead, and Ray does not restart it."""


class Requests:
    """The newest request of a run. A background thread follows it, so that a step never waits for the refiner."""

    def __init__(self, refiner: ActorHandle) -> None:
        self._refiner = refiner
        self._open: tuple[Request, list[ray.ObjectRef]] | None = None
        self._version: int | None = None
        self._deaths = 0
        self._dead: str | None = None  # why the refiner does not come back
        self._changed = threading.Condition()
        self._stopped = False
        threading.Thread(target=self._follow, name="refresh-requests", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether the newest request is not over yet."""
        return self._open is not None

    @property
    def version(self) -> int | None:
        """The version that the newest request gave, None while it is under way or if it gave none."""
        return self._version

    def ask(self, step: int, reason: str, weights: dict[str, Any], urgent: bool = False) -> None:
        """Hand over a state dict on the CPU and go on. An urgent request ends what is under way."""
        request, reference = Request(uuid.uuid4().hex, step, reason), [ray.put(weights)]
        self._refiner.request.remote(request, reference, urgent)
        with self._changed:
            self._open, self._version = (request, reference), None
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the newest request's end, at most so long: whether it is over, and `version` holds what it gave.

        Raises:
            RefinerDied: if it will never end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._open is None or self._dead is not None, seconds)
            self.check()
            return self._open is None

    def check(self) -> None:
        """Find out, without waiting, whether the newest request can still end.

        Raises:
            RefinerDied: if it cannot.
        """
        if self._open is not None and self._dead is not None:
            raise RefinerDied(f"the refiner is dead and is not restarted, so no knowledge base can be made: {self._dead}")

    def stop(self) -> None:
        """Follow no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _follow(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._open is not None)
                if self._stopped or self._open is None or self._dead is not None:
                    return
                followed = self._open
            self._look(*followed)

    def _look(self, request: Request, weights: list[ray.ObjectRef]) -> None:
        try:
            found = Outcome(*ray.get(self._refiner.outcome.remote(request.ticket, 5.0), timeout=30))
        except AWAY as error:
            self._missed(error)
            time.sleep(0.5)
            return
        self._deaths = 0
        if not found.known:  # it died with the refiner, and the weights are still held here
            self._refiner.request.remote(request, weights)
        elif found.over:
            with self._changed:
                if self._open is not None and self._open[0] is request:
                    self._open, self._version = None, found.version
                    self._changed.notify_all()

    def _missed(self, error: BaseException) -> None:
        """Count the answers in a row that the refiner has died."""
        self._deaths = self._deaths + 1 if isinstance(error, ray.exceptions.ActorDiedError) else 0
        if self._deaths >= DEATHS:
            with self._changed:
                self._dead = str(error).strip().splitlines()[-1].strip()
                self._changed.notify_all()
