"""Sweep settings with Ray Tune: every trial is a whole run, and the answer is which settings, by how much, how sure.

python jobs/tune.py --space tune_spaces/smoke.yaml                                     minutes on a laptop
python jobs/tune.py --space tune_spaces/ask.yaml --sweep.trials 40 --sweep.name NAME   ρ, β, K, Nc and T together; the same
                                                                                       again goes on if it broke off
ray job submit --working-dir . -- python jobs/tune.py --space tune_spaces/ask.yaml --run.storage s3://BUCKET/runs \\
  --data.prepared s3://BUCKET/prepared --tracking.uri http://MLFLOW:5000

Settings that all trials share are given as to jobs/train.py, and win over those of the space file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ask_ray.command import with_space
from ask_ray.config import Settings, SweepSettings

if TYPE_CHECKING:
    from ask_ray.tuning.space import SpaceFile


def tune(settings: Settings, sweep: SweepSettings, file: SpaceFile) -> None:
    """The whole sweep."""
    from ask_ray.tuning import sweep as sweeps  # after the settings are parsed: --help need not wait for Ray and PyTorch

    sweeps.sweep(settings, sweep, file)


if __name__ == "__main__":
    with_space(__doc__ or "", tune)
