"""What captions describe, sounds or pictures, and what that is called wherever a run speaks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Modality = Literal["audio", "image"]

#: What one of them is called, many at once.
THINGS: dict[Modality, str] = {"audio": "clips", "image": "images"}

#: Both directions of retrieval by what their figures are filed under, whatever the modality.
WAYS = ("t2a", "a2t")


def headings(modality: Modality) -> dict[str, str]:
    """What the directions of :data:`WAYS` are called."""
    return dict(zip(WAYS, (f"text → {modality}", f"{modality} → text"), strict=True))


@dataclass(frozen=True)
class Form:
    """How the clips of a prepared corpus are kept. resolution: Hz of waveforms, or most pixels of a picture's shorter side;
    seconds: what is kept of a longer recording.

    Only clips of one form can be compared by their samples, and of those only recordings that neither corpus cut, or that both
    cut alike. To a model it makes no difference: forms that differ in seconds alone are equal.
    """

    modality: Modality
    resolution: int
    seconds: float = field(default=math.inf, compare=False)

    def __str__(self) -> str:
        return f"{self.resolution} Hz" if self.modality == "audio" else f"images of {self.resolution} pixels"

    @property
    def sample_rate(self) -> int | None:
        """Hz; None of pictures."""
        return self.resolution if self.modality == "audio" else None

    @property
    def setting(self) -> str:
        """What prepares a corpus so."""
        return f"data.{'sample_rate' if self.modality == 'audio' else 'image_size'} {self.resolution}"
