"""Correcting stored entries between refreshes from what the steps encode anyway (method: ASK §5, open question 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ask_ray.config import CorrectionSettings
from ask_ray.knowledge.overlay import Overlay
from ask_ray.method.drift import drift_map
from ask_ray.training.gather import tell_all
from ask_ray.training.step import Pairs

#: What a window holds of every pair: stored and fresh rows of both modalities, and the step that the stored ones were fitted to.
SIDES = ("stored_audio", "fresh_audio", "stored_text", "fresh_text", "since")


class Corrections:
    """Write-back and drift maps of the version in use, the same on every rank.

    A map is fitted to the pairs of a window of steps, from the rows that were stored before the window to the fresh ones. It
    leads from the mean step that the stored ones were fitted to, its start, to the middle of the window. It moves all entries
    that are nearer to its start: not those that the window overwrote, and after a swap not those that the version took over from
    the one before, where they are much fresher than its own.
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
            since = torch.from_numpy(overlay.since[entry.numpy()])
            old = since <= self._began
            rows = overlay.audio[entry[old]], audio[old], overlay.text[entry[old]], text[old], since[old]
            self._window.append(tuple(row.clone() for row in rows))
        if self._settings.write_back:
            overlay.write(entry, audio, text, step)
            overlay.catch_up(max(len(entry), self._share(overlay.waiting, step)))
        if self._settings.drift_map and step - self._began >= self._length:
            self._map(overlay, step)
            self.begin(step)

    def _share(self, waiting: int, step: int) -> int:
        """How much of what waits to be taken over a step takes at least, so that the next map finds nothing left of it."""
        if not self._settings.drift_map:
            return 0
        return math.ceil(waiting / max(1, self._began + self._length - step + 1))

    def _map(self, overlay: Overlay, step: int) -> None:
        stored_audio, fresh_audio, stored_text, fresh_text, since = (torch.cat(of) for of in zip(*self._window, strict=True))
        if len(stored_audio) == 0:
            return
        ridge, middle = self._settings.ridge, (self._began + step) // 2
        half = math.ceil((float(since.double().mean()) + middle) / 2)
        maps = drift_map(stored_audio, fresh_audio, ridge), drift_map(stored_text, fresh_text, ridge)
        audio_map, text_map = tell_all(maps)
        overlay.apply(audio_map, text_map, step=middle, after=min(self._began + 1, half))

    def state(self) -> dict[str, Tensor]:
        """The open window, for a checkpoint."""
        held = (
            {name: torch.cat(of) for name, of in zip(SIDES, zip(*self._window, strict=True), strict=True)} if self._window else {}
        )
        return {"began": torch.tensor(self._began), **held}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the window that :meth:`state` told of. One of which something is missing, as an earlier state of the code told
        it, is given up for the new one that :meth:`begin` started."""
        held = state.keys() & set(SIDES)
        if held and len(held) < len(SIDES):
            return
        self.begin(int(state["began"]))
        if held:
            self._window = [tuple(state[name] for name in SIDES)]
