"""Live figures of a run for Prometheus, through the metrics endpoint of every Ray node (``ray_ask_ray_…``)."""

from __future__ import annotations

from ray.util.metrics import Gauge

#: Name, description, and the key of an epoch's or a swap's figures.
FIGURES = {
    "knowledge_version": "version of the knowledge base in use",
    "lag_steps": "steps between the weights that encoded the version in use and the training step",
    "rdm_audio": "representation drift mismatch of the audio entries in nats",
    "rdm_text": "representation drift mismatch of the text entries in nats",
    "refresh_seconds": "seconds from the request of the version in use to its swap",
    "swap_ms": "milliseconds that the last swap took",
    "loss": "training loss, mean of the last epoch",
    "clips_per_second": "clips trained on per second",
    "epoch": "whole epochs done",
    "step": "optimiser steps done",
}


class Gauges:
    """Sets gauges labelled with the run's name. Figures that are no gauge are passed over."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges = {name: Gauge(f"ask_ray_{name}", told, tag_keys=("run",)) for name, told in FIGURES.items()}

    def set(self, **figures: float) -> None:
        """Set what is given."""
        for name, value in figures.items():
            if name in self._gauges:
                self._gauges[name].set(float(value), tags=self._tags)
