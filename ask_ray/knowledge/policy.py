"""When to refresh the knowledge base (method: ASK §4.4). Policies look at the step alone, so a resumed run keeps its plan."""

from __future__ import annotations

from dataclasses import dataclass

from ask_ray.config import RefreshSettings


@dataclass(frozen=True)
class Schedule:
    """The steps at which refreshes are asked for.

    first: the step that builds the first version; interval: steps between refreshes, or None to build only once.
    """

    first: int
    interval: int | None

    def reason(self, step: int, has_knowledge: bool, epoch_starts: bool) -> str | None:
        """Why a refresh is due before this step, or None.

        A run that should have a knowledge base by now but has none asks again at each epoch: its first refresh may have
        failed, or a restart may have lost it.
        """
        if step < self.first:
            return None
        if step == self.first:
            return "warm-up is over"
        if self.interval is not None and (step - self.first) % self.interval == 0:
            return f"{self.interval} steps since the last"
        return "no knowledge base yet" if epoch_starts and not has_knowledge else None


def schedule_of(settings: RefreshSettings, steps_per_epoch: int) -> Schedule:
    """The schedule for epochs of so many steps; an interval shorter than a step is one step."""
    first = round(settings.warmup_epochs * steps_per_epoch)
    if settings.policy == "static":
        return Schedule(first, None)
    return Schedule(first, max(1, round(settings.interval * steps_per_epoch)))
