"""Settings of runs that take seconds, for tests of whole runs."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from ask_ray.config import Settings, load


def settings_of(home: Path, **changes: dict[str, object]) -> Settings:
    """Settings of a run that takes seconds: narrow towers, few short clips."""
    tree: dict[str, dict[str, object]] = {
        "run": {"storage": str(home / "runs")},
        "data": {
            "prepared": str(home / "prepared"),
            "shard_clips": 64,
            "soundscapes": {"train": 128, "validation": 32, "test": 48, "seconds": 1.5, "captions": 2},
        },
        "model": {"dim": 32, "width": 0.25},
        "ask": {"prototypes": 16},
        "knowledge": {
            "drift_probe": 64,
            "refresh": {"interval": 1, "mode": "sync", "poll_steps": 1, "warmup_epochs": 1},
            "corrections": {"write_back": True, "drift_map": True},
        },
        "training": {"epochs": 3, "batch_size": 16, "workers": 1, "evaluate_every": 2},
        "tracking": {"enabled": False},
    }
    for section, values in changes.items():
        tree[section] = merged(tree.get(section, {}), values)
    return load(tree)


def merged(old: dict[str, object], new: dict[str, object]) -> dict[str, object]:
    """`new` laid over `old`, section by section."""
    made = dict(old)
    for key, value in new.items():
        held = made.get(key)
        made[key] = merged(held, value) if isinstance(value, dict) and isinstance(held, dict) else value
    return made


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"), width=120)  # noqa: PTH123
