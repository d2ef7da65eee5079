"""Prepare a corpus once: decode, one form, validate, keep evaluation clips out of training, write Parquet and a data card.

    python jobs/prepare.py                                                        the built-in soundscapes
    python jobs/prepare.py --corpus audiocaps --path /data/AudioCaps --out prepared
    python jobs/prepare.py --corpus coco --path /data/COCO --out prepared
    python jobs/prepare.py --corpus wavcaps --path /data/WavCaps --out s3://bucket/prepared --data.held_out '[/prepared/clotho-…]'

--corpus NAME (audiocaps, clotho, wavcaps, folder, parquet; of pictures coco, flickr30k), --path PLACE and --out PLACE are short
for --data.corpus NAME, --data.NAME.path PLACE and --data.prepared PLACE.

Training prepares what it needs by itself; this job does only that part, and shows what was set aside and why.
"""

from __future__ import annotations

from ask_ray.command import corpus_in_full, with_settings
from ask_ray.config import Settings


def prepare(settings: Settings) -> None:
    """Prepare, and tell what came of it."""
    from ask_ray import experiment

    experiment.prepare_only(settings)


if __name__ == "__main__":
    with_settings(__doc__ or "", prepare, corpus_in_full)
