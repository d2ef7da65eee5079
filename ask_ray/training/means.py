"""Running means that no step waits for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Means:
    """Running means of scalars over an epoch, kept on the device: no step waits for a number. NaN is left out."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor | None) -> None:
        """Add a step's values; None is left out."""
        for name, value in values.items():
            if value is not None:
                known = torch.isfinite(value)
                self.sums[name] = self.sums.get(name, 0.0) + torch.where(known, value.detach().double(), 0.0)
                self.counts[name] = self.counts.get(name, 0.0) + known.double()

    def take(self) -> dict[str, float]:
        """The means so far, and start over. A scalar that was never finite has none."""
        means = {name: float(total / self.counts[name]) for name, total in self.sums.items() if self.counts[name] > 0}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Tensor]:
        """What was added since the last :meth:`take`, for a checkpoint."""
        held = {"sums": self.sums, "counts": self.counts}
        return {f"{part}.{name}": value for part, of in held.items() for name, value in of.items()}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take up what :meth:`state` told of."""
        held: dict[str, dict[str, Tensor]] = {"sums": {}, "counts": {}}
        for key, value in state.items():
            part, name = key.split(".", 1)
            held[part][name] = value.to(device)
        self.sums, self.counts = held["sums"], held["counts"]
