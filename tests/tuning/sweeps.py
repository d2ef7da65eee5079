"""What tests of whole sweeps share: settings of runs that take seconds, and the job as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]

#: Runs of plain NT-Xent whose time is the start of their processes.
QUICK: dict[str, Any] = {
    "data": {"soundscapes": {"train": 64, "validation": 20, "test": 20, "seconds": 1.0, "captions": 2}, "shard_clips": 64},
    "model": {"width": 0.25, "dim": 16},
    "ask": {"enabled": False, "prototypes": 8},
    "knowledge": {"drift_probe": 0, "refresh": {"mode": "sync", "warmup_epochs": 1, "interval": 1}},
    "training": {"epochs": 3, "evaluate_every": 1, "batch_size": 16, "max_failures": 0},
}


def write_space(home: Path, space: dict[str, Any], sweep: dict[str, Any], settings: dict[str, Any] | None = None) -> Path:
    """A space file of `QUICK` runs, kept below `home`."""
    own = {"run": {"storage": str(home / "runs")}, "data": {**QUICK["data"], "prepared": str(home / "prepared")}}
    file = home / "space.yaml"
    file.write_text(yaml.safe_dump({"sweep": sweep, "settings": {**QUICK, **own, **(settings or {})}, "space": space}))
    return file


#: Runs a job as on a machine of two cores: a session that it starts has no more, so that what is not given back is missed.
ON_TWO_CORES = (
    "import os, runpy, sys; os.cpu_count = lambda: 2; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def start(file: Path, name: str, *more: str, cwd: Path = ROOT, on_two_cores: bool = False) -> subprocess.Popen:
    """`jobs/tune.py`, in a process group of its own and a Ray session of its own."""
    python = [sys.executable, *(["-c", ON_TWO_CORES] if on_two_cores else [])]
    command = [*python, str(ROOT / "jobs/tune.py"), "--space", str(file), "--sweep.name", name, *more]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True, cwd=cwd
    )
