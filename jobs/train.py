"""Train a dual encoder with ASK on Ray, evaluate it, record it, draw its pictures.

python jobs/train.py                                        a laptop, the built-in corpus
python jobs/train.py --data.corpus folder --data.folder.path /my/recordings
python jobs/train.py --config paper --ask.rho 0.5           a preset, then what differs
ray job submit --working-dir . -- python jobs/train.py      a cluster
"""

from __future__ import annotations

from ask_ray.command import with_settings
from ask_ray.config import Settings


def train(settings: Settings) -> None:
    """The whole run."""
    from ask_ray import experiment  # after the settings are parsed: --help need not wait for Ray and PyTorch

    experiment.run(settings)


if __name__ == "__main__":
    with_settings(__doc__ or "", train)
