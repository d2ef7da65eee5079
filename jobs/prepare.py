"""Prepare a corpus once: decode, mono, resample, validate, write Parquet.

    python jobs/prepare.py                                      the built-in soundscapes
    python jobs/prepare.py --data.corpus folder --data.folder.path /my/recordings

Training prepares what it needs by itself; this job does only that part, and shows what was set aside and why.
"""

from __future__ import annotations

from ask_ray.command import with_settings
from ask_ray.config import Settings


def prepare(settings: Settings) -> None:
    """Prepare, and tell what came of it."""
    from ask_ray import experiment

    experiment.prepare_only(settings)


if __name__ == "__main__":
    with_settings(__doc__ or "", prepare)
