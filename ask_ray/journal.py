"""The run's journal: an actor that everyone tells what happened, and that the driver reads while the run goes on."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle


@ray.remote(num_cpus=0, max_restarts=-1)
class Journal:
    """Events of a run in the order of arrival. An event is a flat mapping with `kind` and `time` (seconds, Unix)."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def record(self, event: dict[str, Any]) -> None:
        """Add an event."""
        self._events.append(event)

    def since(self, count: int) -> list[dict[str, Any]]:
        """The events after the first `count`."""
        return self._events[count:]


def tell(journal: ActorHandle | None, kind: str, **fields: Any) -> None:
    """Record an event without waiting; a lost journal never stops the one who tells."""
    if journal is not None:
        journal.record.remote({"kind": kind, "time": time.time(), **fields})
