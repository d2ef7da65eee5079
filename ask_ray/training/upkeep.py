"""A rank's dealings with the knowledge base: the version in use, when it is refreshed, swapped and corrected."""

from __future__ import annotations

import time

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from ask_ray.config import KnowledgeSettings
from ask_ray.journal import Journal
from ask_ray.knowledge.overlay import Overlay
from ask_ray.knowledge.policy import Clock, Moment, policy_of
from ask_ray.knowledge.replica import Knowledge, Replica
from ask_ray.knowledge.requests import Requests
from ask_ray.knowledge.snapshot import SnapshotError
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.storage import patiently
from ask_ray.training.corrections import Corrections
from ask_ray.training.gather import agree_on_least, tell_all
from ask_ray.training.gauges import Gauges
from ask_ray.training.means import Means
from ask_ray.training.step import Taken

#: What of a checkpoint's memory is an overlay, what the corrections' window, and what the drift read since the last decision.
OVERLAY, WINDOW, DRIFT = "overlay.", "window.", "drift."

#: Seconds after which ranks that wait for a refresh meet again.
MEETING_SECONDS = 1.0


class Upkeep:
    """The knowledge base as one rank keeps it up. All ranks call its public methods at the same steps, but for
    :meth:`refresh` without `wait`, which is rank 0's."""

    def __init__(
        self,
        settings: KnowledgeSettings,
        replica: Replica,
        refiner: ActorHandle,
        journal: Journal,
        gauges: Gauges,
        model: DualEncoder,
        steps_per_epoch: int,
        rank: int,
        device: torch.device,
    ) -> None:
        self._settings, self._replica, self._refiner, self._journal = settings, replica, refiner, journal
        self._gauges, self._adaptive = gauges, settings.refresh.policy == "adaptive"
        self._model, self._rank, self._device = model, rank, device
        self._policy, self._clock = policy_of(settings.refresh, steps_per_epoch), Clock()
        self._requests = Requests(refiner) if rank == 0 else None
        self._drift = Means()
        wanted = settings.corrections
        self._corrections = Corrections(wanted, steps_per_epoch) if wanted.write_back or wanted.drift_map else None
        self._correcting = 0.0
        self._asked_at: dict[int, float] = {}
        self._last_swap: dict[str, float] = {}
        self.asked: int | None = None

    @property
    def known(self) -> Knowledge | None:
        """The version in use, if there is one."""
        return self._replica.current

    @property
    def version(self) -> int:
        """Its number, 0 for none."""
        return self._replica.version

    # --- the start and the end of a run ---

    def begin(self, version: int, asked: int | None, clock: Clock, memory: dict[str, Tensor]) -> None:
        """Take up the version that a checkpoint names, 0 for none, as it was corrected; and make a damaged one anew.

        A refresh that was asked for and not in when the run broke off is forgotten: the policy then asks for it again.

        Args:
            asked: the step of the last refresh asked for.
            clock: how steps are counted from here on.
            memory: what :meth:`memory` told of.
        """
        self._clock, step = clock, clock.step
        self._tell_refiner(version)
        whole = agree_on_least(int(self._opened(version)), self._device)
        if not whole:
            self._replica.current = None
            self._tell_refiner(0)
        known = self._replica.current
        if self._corrections is not None:
            self._corrections.begin(step)
            if known is not None and memory:
                self._restore(known, memory)
        self._drift.restore(part_of(memory, DRIFT), self._device)
        in_use = known.encoder_step if known is not None else None
        self.asked = asked if asked is None or (in_use is not None and asked <= in_use) else in_use
        self._replica.watch(version)
        if not whole:
            self.refresh(step, f"v{version} of the checkpoint was refused", wait=True)

    def _tell_refiner(self, version: int) -> None:
        if self._rank == 0:
            told = {"version": version, "rank": self._rank}
            patiently(
                lambda: ray.get(self._refiner.start_from.remote(version)),
                lambda error: self._journal.tell("unreadable", **told, problem=str(error)),
            )
        tell_all(None)  # no rank asks for later versions before the refiner has forgotten them

    def _opened(self, version: int) -> bool:
        told = {"version": version, "rank": self._rank}
        try:
            self._replica.open(version, lambda error: self._journal.tell("unreadable", **told, problem=str(error)))
        except SnapshotError as error:
            self._journal.tell("refused", **told, problem=str(error))
            return False
        return True

    def finish(self, step: int) -> None:
        """A last version by the final weights; a refresh that is under way is given up for it."""
        self.refresh(step, "a knowledge base by the final weights", wait=True, urgent=True)
        self._replica.stop()
        if self._requests is not None:
            self._requests.stop()

    # --- around a step ---

    def before_step(self, step: int, epoch_starts: bool) -> None:
        """Every few steps, and when an epoch starts: swap to the newest version that every rank has, and ask for a refresh
        if one is due."""
        refresh = self._settings.refresh
        polls = step % refresh.poll_steps == 0
        if polls:
            self._swap(step)
        if polls or epoch_starts:
            reason = self._due(step, epoch_starts) if self._rank == 0 else None
            waits = refresh.mode == "sync"
            if waits:
                reason = tell_all(reason)
            if reason is not None:
                self.refresh(step, reason, waits)

    def after_step(self, taken: Taken, step: int) -> None:
        """Read drift from a step, and correct stored entries by it. `step` counts the step."""
        if taken.pairs is None:
            return
        if self._adaptive and self._settings.refresh.signal == "batch":
            self._drift.add(rdm=(taken.figures["rdm_audio"] + taken.figures["rdm_text"]) / 2)
        known = self._replica.current
        if self._corrections is not None and known is not None and known.overlay is not None:
            started = time.perf_counter()
            self._corrections.after_step(known.overlay, taken.pairs, step)
            self._correcting += time.perf_counter() - started

    def probed(self, rdm: float) -> None:
        """A drift reading by a probe of stored entries, for the next decision."""
        self._drift.add(rdm=torch.tensor(rdm))

    def probe_due(self, step: int) -> bool:
        """Whether the policy wants a probe before this step."""
        refresh = self._settings.refresh
        wanted = self._adaptive and refresh.signal == "probe" and self.version > 0
        return wanted and step % refresh.probe_steps == 0

    def _due(self, step: int, epoch_starts: bool) -> str | None:
        assert self._requests is not None
        self._requests.check()  # training on with entries that nobody renews would pass unnoticed
        drift = self._drift.take().get("rdm")
        unseen = self._requests.version is not None and not self._replica.seen(self._requests.version)
        busy = self._requests.busy or unseen
        now, asked = self._clock.at(step), None if self.asked is None else self._clock.at(self.asked)
        return self._policy.reason(Moment(now, epoch_starts, asked, self.version > 0, busy, drift))

    # --- refreshing and swapping ---

    def refresh(self, step: int, reason: str, wait: bool, urgent: bool = False) -> None:
        """Hand this step's weights to the refiner and, if asked to, wait until the version is in."""
        started = time.perf_counter()
        self.asked = step
        self._asked_at[step] = started
        if self._requests is not None:
            weights = {name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}
            self._requests.ask(step, reason, weights, urgent)
            self._journal.tell("asked", step=step, reason=reason, seconds=time.perf_counter() - started)
        if wait:
            version = self._awaited()
            if version is not None:
                self._replica.wait_until_seen(version)
            self._swap(step)
            if self._rank == 0:
                self._journal.tell("waited", step=step, seconds=time.perf_counter() - started)

    def _awaited(self) -> int | None:
        """The version that the newest request gives, on every rank.

        All meet again and again until it is over, however long it takes: a rank that waited for rank 0 in one collective would be
        ended with the process group's patience.
        """
        while not tell_all(self._requests is None or self._requests.wait(MEETING_SECONDS)):
            pass
        version: int | None = tell_all(self._requests.version if self._requests is not None else None)
        return version

    def _swap(self, step: int) -> None:
        """Use the newest version that all ranks have, from this step on (one tiny all-reduce, no barrier besides)."""
        started = time.perf_counter()
        version = agree_on_least(self._replica.newest, self._device)
        if version <= self.version or not agree_on_least(int(self._replica.has(version)), self._device):
            return
        self._replica.swap(version)
        known = self._replica.current
        assert known is not None
        self._drift.take()
        if self._corrections is not None:
            self._corrections.begin(step)
        now = time.perf_counter()
        self._last_swap = {"swap_ms": 1000 * (now - started)}
        if (asked := self._asked_at.get(known.encoder_step)) is not None:  # by this rank, since it started
            self._last_swap["refresh_seconds"] = now - asked
        lag = step - known.encoder_step
        self._journal.tell("swapped", rank=self._rank, version=version, step=step, lag_steps=lag, **self._last_swap)
        if self._rank == 0:
            self._gauges.set(knowledge_version=version, step=step, lag_steps=lag, **self._last_swap)
            self._refiner.swapped.remote(version)

    # --- what is told and kept ---

    def facts(self, step: int) -> dict[str, float]:
        """Metrics of the version in use: its lag behind the step, its swap and, with corrections, their share, the age they save
        and their cost."""
        known = self._replica.current
        if known is None:
            return {}
        facts: dict[str, float] = {"lag_steps": step - known.encoder_step, **self._last_swap}
        if known.overlay is not None:
            age, without = known.overlay.age(step), known.overlay.age_without(step)
            facts |= {"corrected_share": known.overlay.share(), "entry_age_steps": age, "corrected_age_steps": without - age}
            facts["correction_seconds"] = self._correcting  # since the worker started
        return facts

    def memory(self) -> dict[str, Tensor]:
        """For a checkpoint: the drift read since the last decision, and with corrections their entries and the open window."""
        held = {f"{DRIFT}{name}": value for name, value in self._drift.state().items()}
        known = self._replica.current
        if self._corrections is None or known is None or known.overlay is None:
            return held
        held |= {f"{OVERLAY}{name}": torch.from_numpy(value) for name, value in known.overlay.state().items()}
        return held | {f"{WINDOW}{name}": value for name, value in self._corrections.state().items()}

    def _restore(self, known: Knowledge, memory: dict[str, Tensor]) -> None:
        assert self._corrections is not None
        known.overlay = Overlay.of({name: value.numpy() for name, value in part_of(memory, OVERLAY).items()})
        self._corrections.restore(part_of(memory, WINDOW))


def part_of(memory: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What of a checkpoint's memory has names that begin with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in memory.items() if name.startswith(prefix)}
