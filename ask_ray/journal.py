"""The run's journal: an actor that everyone tells what happened, and that the driver reads while the run goes on."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Event = dict[str, Any]

#: Which life of a journal's actor was read, and how many of its events.
Mark = tuple[str, int]
START: Mark = ("", 0)

POLL_SECONDS = 0.5


@ray.remote(num_cpus=0, max_restarts=-1)
class _Keeper:
    """Holds the events of a run in the order of arrival. A restarted one has forgotten them, and another life."""

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._events: list[Event] = []

    def record(self, event: Event) -> None:
        self._events.append(event)

    def read(self, mark: Mark) -> tuple[list[Event], Mark]:
        new = self._events[mark[1] :] if mark[0] == self._life else self._events
        return new, (self._life, len(self._events))


@dataclass(frozen=True)
class Journal:
    """A journal by its name, so that it can be handed to any process of the job.

    An event is a flat mapping with `kind` and `time` (seconds, Unix).
    """

    name: str

    @classmethod
    def start(cls, name: str | None = None) -> tuple[Journal, ActorHandle]:
        """A new journal, and the actor that lives as long as the caller holds it, on the caller's node: no other node's loss
        takes it away. A name may be used again when the actor that had it is gone."""
        name = name or f"ask_ray-journal-{uuid.uuid4().hex}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        keeper = _Keeper.options(name=name, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        _found.cache_clear()  # this process may know the dead actor of an earlier journal of this name
        return cls(name), keeper

    def tell(self, kind: str, **fields: Any) -> None:
        """Record an event without waiting; a lost journal never stops the one who tells."""
        self._tell(kind, fields)

    def tell_first(self, kind: str, **fields: Any) -> None:
        """As :meth:`tell`, but wait until it is recorded, seconds at most: before all that anyone tells because of it."""
        recorded = self._tell(kind, fields)
        if recorded is not None:
            ray.wait([recorded], timeout=10)

    def _tell(self, kind: str, fields: dict[str, Any]) -> Any:
        keeper = _keeper(self.name)
        return None if keeper is None else keeper.record.remote({"kind": kind, "time": time.time(), **fields})

    def read(self, mark: Mark = START) -> tuple[list[Event], Mark]:
        """The events since a mark, and the mark to read on from; no events if the journal cannot be reached.

        What a journal that died had told nobody yet is lost; what it is told after its restart is not.
        """
        keeper = _keeper(self.name)
        if keeper is None:
            return [], mark
        try:
            found: Any = ray.get(keeper.read.remote(mark), timeout=10)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return [], mark
        events, reached = found
        return events, reached

    def events(self) -> list[Event]:
        """All events."""
        return self.read()[0]


class Follower:
    """Hands on what a journal is told, from a thread of its own, as long as a `with` lasts.

    Args:
        heed: called every half second with the new events, none if there are none, and whether it is the last time: then
            with all that was told before the `with` ended. It must not raise: nothing would be heard any more.
    """

    def __init__(self, journal: Journal, heed: Callable[[list[Event], bool], None]) -> None:
        self._journal, self._heed = journal, heed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        over, mark = False, START
        while not over:
            over = self._over.wait(POLL_SECONDS)
            new, mark = self._journal.read(mark)
            self._heed(new, over)


def _keeper(name: str) -> ActorHandle | None:
    """The actor of a journal, None if there is none: then it is looked for again the next time."""
    try:
        return _found(name)
    except ValueError:
        return None


@lru_cache(maxsize=8)
def _found(name: str) -> ActorHandle:
    return ray.get_actor(name)
