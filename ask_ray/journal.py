"""The run's journal: an actor that everyone tells what happened, and that the driver reads while the run goes on."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
from ray.actor import ActorHandle

Event = dict[str, Any]


@ray.remote(num_cpus=0, max_restarts=-1)
class _Keeper:
    """Holds the events of a run in the order of arrival."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def record(self, event: Event) -> None:
        self._events.append(event)

    def since(self, count: int) -> list[Event]:
        return self._events[count:]


@dataclass(frozen=True)
class Journal:
    """A journal by its name, so that it can be handed to any process of the job.

    An event is a flat mapping with `kind` and `time` (seconds, Unix).
    """

    name: str

    @classmethod
    def start(cls) -> tuple[Journal, ActorHandle]:
        """A new journal, and the actor that lives as long as the caller holds it."""
        name = f"ask_ray-journal-{uuid.uuid4().hex}"
        return cls(name), _Keeper.options(name=name).remote()  # type: ignore[attr-defined]

    def tell(self, kind: str, **fields: Any) -> None:
        """Record an event without waiting; a lost journal never stops the one who tells."""
        keeper = _keeper(self.name)
        if keeper is not None:
            keeper.record.remote({"kind": kind, "time": time.time(), **fields})

    def since(self, count: int) -> list[Event]:
        """The events after the first `count`; none if the journal cannot be reached."""
        keeper = _keeper(self.name)
        try:
            return list(ray.get(keeper.since.remote(count), timeout=10)) if keeper is not None else []
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return []


@lru_cache(maxsize=8)
def _keeper(name: str) -> ActorHandle | None:
    try:
        return ray.get_actor(name)
    except ValueError:
        return None
