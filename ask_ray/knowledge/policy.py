"""When to refresh the knowledge base (method: ASK §4.4, and the paper's open question on adaptive intervals).

A policy looks at a :class:`Moment` and gives a reason or None. It keeps no state of its own, so a resumed run, whose
checkpoint holds the step of its last request, decides as an unbroken one would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ask_ray.config import RefreshSettings


@dataclass(frozen=True)
class Moment:
    """What is known before a step.

    step: steps done, by a :class:`Clock`; epoch_starts: no step of this epoch is done yet; asked: the step of the last refresh
    asked for, by the same clock, None before the first; has_knowledge: a version is in use; busy: a refresh is under way;
    drift: RDM in nats of the version in use, the mean of both modalities, or None where nothing was measured since the last
    moment.
    """

    step: int
    epoch_starts: bool
    asked: int | None
    has_knowledge: bool
    busy: bool
    drift: float | None = None


@dataclass(frozen=True)
class Clock:
    """Steps done as the schedule counts them: epochs have another number of steps since workers were lost or came.

    step: steps done when this worker began; position: the same in epochs of now; pace: steps of an epoch now over those before.
    """

    step: int = 0
    position: int = 0
    pace: float = 1.0

    def at(self, step: int) -> int:
        """The position of a step, of now or of before."""
        since = step - self.step
        return self.position + (since if since >= 0 else round(since * self.pace))


class Policy(Protocol):
    """When a refresh is due."""

    def reason(self, now: Moment) -> str | None:
        """Why a refresh is due before this step, or None."""


@dataclass(frozen=True)
class Static:
    """One version, once warm-up is over. first: the step that builds it.

    A run that should have a knowledge base by now but has none asks again at each epoch: its first refresh may have failed.
    """

    first: int

    def reason(self, now: Moment) -> str | None:
        """See :class:`Policy`."""
        if now.asked is None:
            return "warm-up is over" if now.step >= self.first else None
        lost = now.epoch_starts and not now.has_knowledge and not now.busy and now.step > now.asked
        return "no knowledge base yet" if lost else None


@dataclass(frozen=True)
class Fixed:
    """A refresh every `interval` steps, counted from the first, however late single ones were asked for."""

    first: int
    interval: int

    def reason(self, now: Moment) -> str | None:
        """See :class:`Policy`."""
        if now.asked is not None and (now.step - self.first) // self.interval > (now.asked - self.first) // self.interval:
            return f"{now.step - now.asked} steps since the last"
        return Static(self.first).reason(now)


@dataclass(frozen=True)
class Adaptive:
    """A refresh when drift passes `threshold` nats, at least `floor` and at most `ceiling` steps after the last."""

    first: int
    threshold: float
    floor: int
    ceiling: int

    def reason(self, now: Moment) -> str | None:
        """See :class:`Policy`."""
        if now.asked is None or not now.has_knowledge:
            return Static(self.first).reason(now)
        since = now.step - now.asked
        if now.busy or since < self.floor:
            return None
        if now.drift is not None and now.drift > self.threshold:
            return f"RDM {now.drift:.3f} passed {self.threshold:g}, {since} steps since the last"
        seen = "no reading of RDM" if now.drift is None else f"RDM still under {self.threshold:g}"
        return f"{since} steps since the last, {seen}" if since >= self.ceiling else None


@dataclass(frozen=True)
class Continuous:
    """The next refresh starts when the last is in, at least `floor` steps after it was asked for."""

    first: int
    floor: int

    def reason(self, now: Moment) -> str | None:
        """See :class:`Policy`."""
        if now.asked is None:
            return Static(self.first).reason(now)
        since = now.step - now.asked
        return f"the last is in, {since} steps after it was asked for" if not now.busy and since >= self.floor else None


def policy_of(settings: RefreshSettings, steps_per_epoch: int) -> Policy:
    """The policy that the settings name, for epochs of so many steps; an interval shorter than a step is one step."""
    unit = steps_per_epoch if settings.unit == "epochs" else 1
    first = round(settings.warmup_epochs * steps_per_epoch)
    interval, floor, ceiling = (
        max(1, round(length * unit)) for length in (settings.interval, settings.min_interval, settings.max_interval)
    )
    policies: dict[str, Policy] = {
        "static": Static(first),
        "fixed": Fixed(first, interval),
        "adaptive": Adaptive(first, settings.threshold, floor, ceiling),
        "continuous": Continuous(first, floor),
    }
    return policies[settings.policy]
