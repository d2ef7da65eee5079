"""The refiner: an actor that runs refreshes one at a time, newest weights first, and never stops training.

A refresh is a task of its own (encode, build, publish), so that one that hangs can be ended and one that dies takes
nothing with it. What fails is tried again with a growing pause; what still fails leaves the old version in use.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import ray

from ask_ray.config import KnowledgeSettings
from ask_ray.journal import Journal
from ask_ray.knowledge import index, snapshot
from ask_ray.knowledge.encoding import EncodingPlan, encode
from ask_ray.knowledge.snapshot import Embeddings
from ask_ray.storage import Folder


@dataclass(frozen=True)
class RefreshPlan:
    """All that a refresh needs but weights.

    home: folder of the versions; run: the run they belong to; encoding: what is encoded; prototypes: Nc; seed: of k-means.
    """

    home: Folder
    run: str
    encoding: EncodingPlan
    knowledge: KnowledgeSettings
    prototypes: int
    seed: int


@dataclass(frozen=True)
class _Request:
    ticket: int
    step: int
    reason: str
    weights: ray.ObjectRef


@ray.remote(num_cpus=0, max_retries=0)
def refresh(
    plan: RefreshPlan, version: int, step: int, reason: str, weights: list[ray.ObjectRef], journal: Journal
) -> dict[str, Any]:
    """Encode the source with `weights[0]`, build prototypes and indexes, publish the version.

    Returns:
        the manifest.
    """
    started = time.time()
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done == total or done / total >= told + 0.25:
            told = done / total
            journal.tell("encoding", version=version, done=done, total=total)

    entries, rows = encode(plan.encoding, weights[0], progress)
    encoded = time.time()
    paired = Embeddings(*index.prototypes(rows.audio, rows.text, plan.prototypes, plan.seed))
    limits = (plan.knowledge.exact_below, plan.knowledge.probes, plan.seed)
    built = (index.build(rows.audio, *limits), index.build(rows.text, *limits))
    facts = {
        "run": plan.run,
        "encoder_step": step,
        "reason": reason,
        "sources": {plan.encoding.corpus: len(entries.ids)},
        "started": started,
        "encode_seconds": encoded - started,
        "build_seconds": time.time() - encoded,
    }
    return snapshot.publish(plan.home, version, entries, rows, paired, built, facts)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=5)
class Refiner:
    """Runs refreshes and knows the versions of the run's current line."""

    def __init__(self, plan: RefreshPlan, journal: Journal) -> None:
        self._plan = plan
        self._journal = journal
        self._last = max(snapshot.versions(plan.home), default=0)
        self._line = snapshot.versions(plan.home)  # what a restart of this actor must not forget
        self._live = 0
        self._pinned: set[int] | None = None
        self._tickets = 0
        self._outcomes: dict[int, int | None] = {0: None}
        self._pending: _Request | None = None
        self._current: ray.ObjectRef | None = None
        self._worker: asyncio.Task[None] | None = None

    async def start_from(self, version: int) -> None:
        """Begin (again) at a version, 0 for none: later ones belong to steps that a restart took back."""
        self._line = [version] if version else []
        self._live = version
        self._give_up()

    async def request(self, step: int, reason: str, weights: list[ray.ObjectRef], only_if_idle: bool = False) -> int:
        """Ask for a refresh with these weights (a reference in a list) and go on. An older request still waiting yields.

        Args:
            only_if_idle: do nothing if a refresh is under way.

        Returns:
            a ticket for :meth:`settled`; 0 if nothing was done.
        """
        if only_if_idle and self._worker is not None and not self._worker.done():
            return 0
        self._tickets += 1
        if self._pending is not None:
            self._settle(self._pending, None, "superseded by newer weights")
        self._pending = _Request(self._tickets, step, reason, weights[0])
        self._journal.tell("requested", ticket=self._tickets, step=step, reason=reason)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return self._tickets

    async def settled(self, ticket: int, wait_seconds: float) -> tuple[bool, int | None]:
        """Whether a request is over, and the version it gave; waits a while. A ticket that a restart lost is over."""
        end = time.monotonic() + wait_seconds
        while ticket <= self._tickets and ticket not in self._outcomes and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return ticket > self._tickets or ticket in self._outcomes, self._outcomes.get(ticket)

    async def next_after(self, version: int, wait_seconds: float) -> int | None:
        """The first version of the line after `version`; waits a while for one."""
        end = time.monotonic() + wait_seconds
        while not (later := [known for known in self._line if known > version]) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return later[0] if later else None

    async def swapped(self, version: int) -> None:
        """Training now uses `version`."""
        self._live = version

    async def pin(self, versions: list[int]) -> None:
        """The versions that kept checkpoints name; nothing is pruned before the first call."""
        self._pinned = set(versions)
        self._prune()

    async def stop(self) -> None:
        """Give up what is under way."""
        self._give_up()

    def _give_up(self) -> None:
        if self._pending is not None:
            self._settle(self._pending, None, "given up")
            self._pending = None
        if self._worker is not None:
            self._worker.cancel()
            self._worker = None
        if self._current is not None:
            ray.cancel(self._current, force=True)
            self._current = None

    async def _work(self) -> None:
        while self._pending is not None:
            request, self._pending = self._pending, None
            try:
                await self._run(request)
            except asyncio.CancelledError:
                self._settle(request, None, "given up")
                raise

    async def _run(self, request: _Request) -> None:
        """Try a request as often as the settings allow."""
        refresh_settings = self._plan.knowledge.refresh
        pause, problem = refresh_settings.backoff_seconds, ""
        for attempt in range(1, refresh_settings.attempts + 1):
            self._last += 1
            try:
                manifest = await self._attempt(request, self._last, refresh_settings.timeout_seconds)
            except (TimeoutError, Exception) as error:
                problem = _told(error)
                self._journal.tell("failed", step=request.step, version=self._last, attempt=attempt, problem=problem)
                if attempt < refresh_settings.attempts:
                    await asyncio.sleep(pause)
                    pause *= 2
                continue
            self._line.append(manifest["version"])
            self._settle(request, manifest["version"], "published")
            facts = {name: value for name, value in manifest.items() if name not in ("files", "run", "digest")}
            self._journal.tell("published", **facts)
            self._prune()
            return
        self._settle(request, None, f"failed {refresh_settings.attempts} times, the last time: {problem}")

    async def _attempt(self, request: _Request, version: int, seconds: float) -> dict[str, Any]:
        self._journal.tell("started", version=version, step=request.step)
        task = refresh.remote(self._plan, version, request.step, request.reason, [request.weights], self._journal)
        self._current = task
        try:
            manifest: dict[str, Any] = await asyncio.wait_for(asyncio.wrap_future(task.future()), seconds)
            return manifest
        except TimeoutError:
            ray.cancel(task, force=True)
            raise
        finally:
            if self._current is task:
                self._current = None

    def _settle(self, request: _Request, version: int | None, outcome: str) -> None:
        self._outcomes[request.ticket] = version
        self._journal.tell("settled", ticket=request.ticket, step=request.step, version=version, outcome=outcome)

    def _prune(self) -> None:
        if self._pinned is not None:
            needed = self._pinned | {version for version in self._line if version >= self._live}
            try:
                snapshot.prune(self._plan.home, self._plan.knowledge.keep, needed)
            except OSError as error:  # storage that is away for now: the next refresh prunes again
                self._journal.tell("not pruned", problem=str(error))


def _told(error: BaseException) -> str:
    """The cause of a failure in a line."""
    if isinstance(error, asyncio.TimeoutError):
        return "took longer than knowledge.refresh.timeout_seconds"
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else ''}"
