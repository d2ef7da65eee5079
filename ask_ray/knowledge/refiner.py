"""The refiner: an actor that runs refreshes one at a time, newest weights first, and never stops training.

A refresh is a task of its own (encode, build, publish), so that one that hangs can be ended and one that dies takes
nothing with it. What fails is tried again with a growing pause; what still fails leaves the old version in use.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError
from ray.util.metrics import Counter

from ask_ray.cluster import raised_by
from ask_ray.config import KnowledgeSettings
from ask_ray.journal import Journal
from ask_ray.knowledge import index, snapshot
from ask_ray.knowledge.encoding import EncodingError, EncodingPlan, encode
from ask_ray.knowledge.snapshot import Embeddings
from ask_ray.models.weights import not_finite
from ask_ray.storage import Folder, StorageError

#: Beside the versions: where the run's current line of versions begins.
LINE = "line.json"

SUPERSEDED = "superseded by newer weights"


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
class Request:
    """What a worker asks for. ticket: its own name for the request; step: of the weights; reason: why it was asked for."""

    ticket: str
    step: int
    reason: str


class Outcome(NamedTuple):
    """What became of a request: not `known` (a restart of the refiner lost it), or `over`, with its version if it gave one."""

    known: bool
    over: bool
    version: int | None


class UnusableWeights(EncodingError):
    """Weights that give no embeddings."""


#: Failures that another try would meet again: such weights, or weights that are gone with the worker that sent them.
HOPELESS = (UnusableWeights, ObjectLostError)


@ray.remote(num_cpus=0, max_retries=0)
def refresh(
    plan: RefreshPlan,
    version: int,
    request: Request,
    weights: list[ray.ObjectRef],
    journal: Journal,
    refiner: ActorHandle,
) -> dict[str, Any]:
    """Encode the source with `weights[0]`, build prototypes and indexes, publish the version. Storage that is away when all is
    made is tried again for a while, so that nothing is encoded twice.

    Args:
        refiner: is told of every piece of progress.

    Returns:
        the manifest.

    Raises:
        UnusableWeights: if the weights are not finite.
        EncodingError: if rows cannot be trusted.
        StorageError: if the version cannot be written.
    """
    started = time.time()
    if name := not_finite(ray.get(weights[0])):
        raise UnusableWeights(f"the weights of step {request.step} are not finite ({name}): the version in use stays")
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        refiner.progressed.remote(version)
        if done == total or done / total >= told + 0.25:
            told = done / total
            journal.tell("encoding", version=version, done=done, total=total)

    entries, rows = encode(plan.encoding, weights[0], progress)
    encoded = time.time()
    paired = Embeddings(*index.prototypes(rows.audio, rows.text, plan.prototypes, plan.seed))
    refiner.progressed.remote(version)
    limits = (plan.knowledge.exact_below, plan.knowledge.probes, plan.seed)
    built = (index.build(rows.audio, *limits), index.build(rows.text, *limits))
    refiner.progressed.remote(version)
    facts = {
        "run": plan.run,
        "encoder_step": request.step,
        "reason": request.reason,
        "sources": entries.per_source(),
        "started": started,
        "encode_seconds": encoded - started,
        "build_seconds": time.time() - encoded,
    }

    def away(error: StorageError) -> None:
        refiner.progressed.remote(version)
        journal.tell("not published", version=version, problem=str(error))

    return plan.home.patiently(lambda: snapshot.publish(plan.home, version, entries, rows, paired, built, facts), away)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=5)
class Refiner:
    """Runs refreshes and knows the versions of the run's current line: those that its steps can still swap in.

    A restarted refiner knows the line again from storage; requests that died with it are asked again by their worker.
    """

    def __init__(self, plan: RefreshPlan, journal: Journal) -> None:
        """Reads nothing: Ray does not restart an actor whose start failed."""
        self._plan = plan
        self._journal = journal
        self._recalled: asyncio.Task[None] | None = None
        self._last = 0
        self._line: list[int] = []
        self._live = 0
        self._latest = 0  # step of the newest weights taken
        self._pinned: set[int] | None = None
        self._outcomes: dict[str, Outcome] = {}
        self._pending: tuple[Request, ray.ObjectRef] | None = None
        self._newest: tuple[Request, ray.ObjectRef] | None = None
        self._refusals = 0
        self._current: ray.ObjectRef | None = None
        self._moved = 0.0
        self._worker: asyncio.Task[None] | None = None
        self._failures = Counter("ask_ray_refresh_failures", "tries of refreshes that failed", tag_keys=("run",))
        self._storing = asyncio.Lock()  # what is written and removed beside the versions, one after the other

    async def _recall(self) -> None:
        """Know what was published before this actor started. Read once, by the first who needs it.

        Raises:
            StorageError: if the storage cannot be reached. Whoever needs it next reads again.
        """
        if self._recalled is None or (self._recalled.done() and self._recalled.exception() is not None):
            self._recalled = asyncio.create_task(self._read())
        await asyncio.shield(self._recalled)

    async def _read(self) -> None:
        there = await asyncio.to_thread(snapshot.versions, self._plan.home)
        try:
            line, told = await asyncio.to_thread(_known_line, self._plan.home, there)
        except ValueError as error:  # no version of an unknown line is swapped in: a restart may have taken it back
            self._journal.tell("not read", file=LINE, problem=str(error))
            line, told = [], 0
        self._last, self._line = max([*there, told]), line

    async def start_from(self, version: int) -> None:
        """Begin (again) at a version, 0 for none: later ones belong to steps that a restart took back.

        Raises:
            StorageError: if this actor has just started and the storage cannot be reached. Nothing has changed then.
        """
        await self._recall()
        self._give_up()
        self._latest = 0
        self._line = [version] if version else []
        self._live = version
        self._last = max(self._last, version)  # one that is gone from storage must not be taken for a new one of its number
        line = {"from": version, "after": self._last}
        try:
            async with self._storing:
                await asyncio.to_thread(self._plan.home.write_json, LINE, line)
        except OSError as error:  # only a restart of this actor would miss it
            self._journal.tell("not written", file=LINE, problem=str(error))

    async def request(self, request: Request, weights: list[ray.ObjectRef], urgent: bool = False) -> None:
        """Ask for a refresh with these weights (a reference in a list) and go on. Asking twice with a ticket is asking once.

        Newest weights win, whatever the order of arrival: an older request still waiting yields. An urgent one also ends a
        refresh that is under way.
        """
        if request.ticket in self._outcomes:
            return
        if request.step < self._latest:  # what was on its way while the refiner was restarted may come late
            self._settle(request, None, SUPERSEDED)
            return
        if urgent:
            self._give_up()
        self._journal.tell("requested", ticket=request.ticket, step=request.step, reason=request.reason)
        self._take(request, weights[0])

    def _take(self, request: Request, weights: ray.ObjectRef) -> None:
        if self._pending is not None:
            self._settle(self._pending[0], None, SUPERSEDED)
        self._outcomes[request.ticket] = Outcome(known=True, over=False, version=None)
        self._latest = request.step
        self._pending = (request, weights)
        if not self._running:
            self._worker = asyncio.create_task(self._work())

    async def outcome(self, ticket: str, wait_seconds: float) -> Outcome:
        """What became of a request; waits a while for its end."""
        unknown = Outcome(known=False, over=True, version=None)
        end = time.monotonic() + wait_seconds
        while not (found := self._outcomes.get(ticket, unknown)).over and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return found

    async def next_after(self, version: int, wait_seconds: float) -> int | None:
        """The first version of the line after `version`; waits a while for one.

        Raises:
            StorageError: if this actor has just started and the storage cannot be reached.
        """
        await self._recall()
        end = time.monotonic() + wait_seconds
        while not (later := [known for known in self._line if known > version]) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return later[0] if later else None

    async def progressed(self, version: int) -> None:
        """The refresh that makes `version` has moved on."""
        if version == self._last:
            self._moved = time.monotonic()

    async def swapped(self, version: int) -> None:
        """Training now uses `version`."""
        self._live = version

    async def refused(self, version: int) -> None:
        """A worker could not use `version`: it leaves the line, and is made again if it is the newest and no newer weights were
        taken since."""
        await self._recall()
        if version not in self._line or version == self._live:
            return
        again = version == self._line[-1] and not self._running and self._pending is None
        self._line.remove(version)
        if again and self._newest and self._refusals + 1 < self._plan.knowledge.refresh.attempts:
            request, weights = self._newest
            if request.step >= self._latest:
                self._refusals += 1
                self._take(replace(request, reason=f"v{version} was refused"), weights)

    async def pin(self, versions: list[int]) -> None:
        """The versions that kept checkpoints name; nothing is pruned before the first call."""
        self._pinned = set(versions)
        await self._prune()

    async def tidied(self) -> None:
        """Wait until nothing is being removed any more."""
        async with self._storing:
            pass

    @property
    def _running(self) -> bool:
        """Whether a request is under way."""
        return self._worker is not None and not self._worker.done()

    def _give_up(self) -> None:
        if self._pending is not None:
            self._settle(self._pending[0], None, "given up")
            self._pending = None
        if self._worker is not None:
            self._worker.cancel()
            self._worker = None
        if self._current is not None:
            ray.cancel(self._current, force=True)
            self._current = None

    async def _work(self) -> None:
        while self._pending is not None:
            (request, weights), self._pending = self._pending, None
            try:
                await self._run(request, weights)
            except asyncio.CancelledError:
                if not self._outcomes[request.ticket].over:
                    self._settle(request, None, "given up")
                raise

    async def _run(self, request: Request, weights: ray.ObjectRef) -> None:
        """Try a request as often as the settings allow."""
        refresh_settings = self._plan.knowledge.refresh
        pause, problem = refresh_settings.backoff_seconds, ""
        for attempt in range(1, refresh_settings.attempts + 1):
            try:
                await self._recall()
                self._last += 1
                manifest = await self._attempt(request, weights, self._last, refresh_settings.stall_seconds)
            except Exception as error:
                problem = _told(error)
                self._journal.tell("failed", step=request.step, version=self._last, attempt=attempt, problem=problem)
                self._failures.inc(tags={"run": self._plan.run})
                if isinstance(_cause(error), HOPELESS):
                    break
                if attempt < refresh_settings.attempts:
                    await asyncio.sleep(pause)
                    pause *= 2
                continue
            await self._published(request, weights, manifest)
            return
        self._settle(request, None, f"failed, the last time: {problem}")

    async def _published(self, request: Request, weights: ray.ObjectRef, manifest: dict[str, Any]) -> None:
        if self._newest is None or self._newest[0].ticket != request.ticket:
            self._refusals = 0
        self._newest = (request, weights)
        self._line.append(manifest["version"])
        facts = {name: value for name, value in manifest.items() if name not in ("files", "run", "digest")}
        self._journal.tell("published", **facts)
        self._settle(request, manifest["version"], "published")
        await self._prune()

    async def _attempt(self, request: Request, weights: ray.ObjectRef, version: int, patience: float) -> dict[str, Any]:
        """One try, on a node of the pool, ended when it makes no progress for `patience` seconds: one that waits in vain raises
        nothing."""
        self._journal.tell("started", version=version, step=request.step)
        myself = ray.get_runtime_context().current_actor
        self._moved = time.monotonic()
        beside = refresh.options(label_selector=self._plan.encoding.pool.node_labels)
        self._current = task = beside.remote(self._plan, version, request, [weights], self._journal, myself)
        made = asyncio.wrap_future(task.future())
        try:
            while (left := self._moved + patience - time.monotonic()) > 0:
                if (await asyncio.wait([made], timeout=left))[0]:
                    manifest: dict[str, Any] = made.result()
                    return manifest
            ray.cancel(task, force=True)
            raise TimeoutError(f"no progress for {patience:g} s (knowledge.refresh.stall_seconds)")
        finally:
            made.cancel()
            if self._current is task:
                self._current = None

    def _settle(self, request: Request, version: int | None, outcome: str) -> None:
        self._outcomes[request.ticket] = Outcome(known=True, over=True, version=version)
        self._journal.tell("settled", ticket=request.ticket, step=request.step, version=version, outcome=outcome)

    async def _prune(self) -> None:
        if self._pinned is None:
            return
        try:
            await self._recall()
            async with self._storing:
                needed = self._pinned | {version for version in self._line if version >= self._live}
                await asyncio.to_thread(snapshot.prune, self._plan.home, self._plan.knowledge.keep, needed)
        except OSError as error:  # storage that is away for now: the next refresh prunes again
            self._journal.tell("not pruned", problem=str(error))


def _known_line(home: Folder, there: list[int]) -> tuple[list[int], int]:
    """The line as the last :meth:`Refiner.start_from` left it, with the versions published since; and the last number that was
    given by then.

    Raises:
        ValueError: if the file that tells of it is damaged.
        StorageError: if it cannot be read.
    """
    if not home.exists(LINE):
        return [], 0
    told = home.read_json(LINE)
    if not isinstance(told, dict) or not all(isinstance(told.get(name), int) for name in ("from", "after")):
        raise ValueError("it does not tell from which version on the line goes")
    return [version for version in there if version == told["from"] or version > told["after"]], int(told["after"])


def _cause(error: BaseException) -> BaseException:
    """What a task raised, where that is what failed it."""
    return getattr(error, "cause", None) or error


def _told(error: BaseException) -> str:
    """The cause of a failure in a line."""
    if raised := raised_by(error):
        return raised
    cause = _cause(error)
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else ''}"
