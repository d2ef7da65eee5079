"""Correcting stored entries between refreshes from what the steps encode anyway (method: ASK §5, open question 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ask_ray.config import CorrectionSettings
from ask_ray.knowledge.overlay import Overlay
from ask_ray.method.drift import drift_map
from ask_ray.training.gather import tell_all
from ask_ray.training.step import Pairs

#: What a window holds of every pair: stored and fresh rows of both modalities.
SIDES = ("stored_audio", "fresh_audio", "stored_text", "fresh_text")


class Corrections:
    """Write-back and drift maps of the version in use, the same on every rank.

    A map is fitted to the pairs of a window of steps, from the rows that were stored before the window to the fresh ones. It
    moves all entries that the window did not overwrite, and stands for the middle of the window.
    """

    def __init__(self, settings: CorrectionSettings, steps_per_epoch: int) -> None:
        self._settings = settings
        self._length = max(1, round(settings.map_interval * steps_per_epoch))
        self._began = 0
        self._window: list[tuple[Tensor, ...]] = []

    def begin(self, step: int) -> None:
        """Start a new window: at the start, and when another version comes into use."""
        self._began, self._window = step, []

    def after_step(self, overlay: Overlay, pairs: Pairs, step: int) -> None:
        """Correct `overlay` by the pairs that the global batch shares with it. `step` counts the step just taken."""
        entry, audio, text = pairs.entry.cpu(), pairs.audio.cpu(), pairs.text.cpu()
        if self._settings.drift_map:
            old = torch.from_numpy(overlay.since[entry.numpy()]) <= self._began
            rows = overlay.audio[entry[old]], audio[old], overlay.text[entry[old]], text[old]
            self._window.append(tuple(row.clone() for row in rows))
        if self._settings.write_back:
            overlay.write(entry, audio, text, step)
            overlay.catch_up(len(entry))  # what the last swap left: at the pace at which it was written
        if self._settings.drift_map and step - self._began >= self._length:
            self._map(overlay, step)
            self.begin(step)

    def _map(self, overlay: Overlay, step: int) -> None:
        stored_audio, fresh_audio, stored_text, fresh_text = (torch.cat(of) for of in zip(*self._window, strict=True))
        if len(stored_audio) == 0:
            return
        ridge = self._settings.ridge
        maps = drift_map(stored_audio, fresh_audio, ridge), drift_map(stored_text, fresh_text, ridge)
        audio_map, text_map = tell_all(maps)
        overlay.apply(audio_map, text_map, step=(self._began + step) // 2, after=self._began + 1)

    def state(self) -> dict[str, Tensor]:
        """The open window, for a checkpoint."""
        held = (
            {name: torch.cat(of) for name, of in zip(SIDES, zip(*self._window, strict=True), strict=True)} if self._window else {}
        )
        return {"began": torch.tensor(self._began), **held}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the window that :meth:`state` told of."""
        self.begin(int(state["began"]))
        if SIDES[0] in state:
            self._window = [tuple(state[name] for name in SIDES)]
