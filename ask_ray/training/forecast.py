"""What a run will take, told and checked before it takes it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ask_ray.config import Settings, SettingsError
from ask_ray.data.batches import steps_of
from ask_ray.data.corpus import Corpus
from ask_ray.knowledge.sources import entries_of
from ask_ray.models.dual_encoder import TOKEN_WIDTH

#: Bytes that training keeps for a parameter: the weight, its gradient and AdamW's two moments, in float32.
PER_PARAMETER = 16


@dataclass(frozen=True)
class Forecast:
    """What a run on a corpus will take; sizes are those of data that stay, and activations come on top.

    clips: to train on; steps_per_epoch, steps: of the optimiser; entries: N of the knowledge base, at most, 0 without one;
    parameters: of both towers, trainable and frozen; token_bytes: of the tokens of the larger split that is evaluated on;
    worker_bytes: of memory for each worker, these among them; node_bytes: for all workers of a node together, which map one copy
    of the knowledge base.
    """

    clips: int
    steps_per_epoch: int
    steps: int
    entries: int
    parameters: int
    token_bytes: int
    worker_bytes: int
    node_bytes: int


def forecast(settings: Settings, corpus: Corpus, parameters: int, frames: int = 0) -> Forecast:
    """The forecast of a run with :func:`ask_ray.cluster.fitted` settings and :class:`ask_ray.training.trainer.Towers`."""
    training, clips = settings.training, corpus.clips("train")
    per_epoch = steps_of(clips, training.workers or 1, training.batch_size)
    entries = entries_of(settings.knowledge, corpus.folder.uri) if settings.ask.enabled else 0
    cached = min(settings.data.cache_mib << 20, round(clips * corpus.mean_bytes("train")))
    tokens = max(_token_bytes(settings, corpus, split, frames) for split in ("validation", "test")) if frames else 0
    own, shared = PER_PARAMETER * parameters + cached + tokens, _knowledge_bytes(settings, entries)
    corrections = settings.knowledge.corrections
    if corrections.write_back or corrections.drift_map:  # then each worker changes a copy of its own
        rows_of_the_last = 2 * entries * settings.model.dim * 4 if corrections.write_back else 0  # while it is taken over
        own, shared = own + shared + rows_of_the_last, 0
    return Forecast(clips, per_epoch, training.epochs * per_epoch, entries, parameters, tokens, own, shared)


def _token_bytes(settings: Settings, corpus: Corpus, split: str, frames: int) -> int:
    """Of a split's tokens, at most: all clips as long as they may be, all captions as many as the most that a clip has."""
    tokens = corpus.clips(split) * frames + corpus.entries(split, sys.maxsize) * settings.model.max_words
    return tokens * (2 * min(settings.model.dim, TOKEN_WIDTH) + 4)


def _knowledge_bytes(settings: Settings, entries: int) -> int:
    """Of rows and indexes of both modalities; inverted lists keep 16-bit floats. Two versions are held around a swap."""
    exact = entries < settings.knowledge.exact_below
    return 2 * 2 * entries * settings.model.dim * (4 + (4 if exact else 2))


def gpu_room(settings: Settings) -> int:
    """Bytes that a worker may take of the GPU of this machine; 0 where that tells nothing of the GPUs that train."""
    training = settings.training
    if training.device != "cuda" or not torch.cuda.is_available():
        return 0
    return round(torch.cuda.get_device_properties(0).total_memory * min(1.0, training.gpus_per_worker or 1.0))


def told_of_gpu(parameters: int, room: int) -> str:
    """What stays on a worker's GPU beside `room` bytes, in red if it is more."""
    needed = PER_PARAMETER * parameters
    told = f"{needed / 2**30:.2f} GiB of parameters with optimiser a worker, {room / 2**30:.2f} on a GPU of this machine"
    return f"{told}; and activations" if needed <= room else f"[red]{told}: lower model.width, or use larger GPUs[/]"


def check_memory(made: Forecast, workers: int, nodes: Sequence[float]) -> None:
    """Refuse a run whose data cannot be held.

    Args:
        nodes: bytes of memory of each node that workers may run on, as Ray counts it.

    Raises:
        SettingsError: with the sum.
    """
    room = sum(max(0, int((node - made.node_bytes) // made.worker_bytes)) for node in nodes)
    if room < workers:
        raise SettingsError(
            f"training.workers: each of {workers} workers keeps {made.worker_bytes / 2**30:.1f} GiB ({made.parameters:,} "
            f"parameters with optimiser, cached clips, {made.token_bytes / 2**30:.1f} GiB of tokens), their nodes "
            f"{made.node_bytes / 2**30:.1f} GiB of {made.entries:,} knowledge entries; the nodes that train "
            f"hold {sum(nodes) / 2**30:.1f} GiB, room for {room} workers: lower training.workers, model.dim, data.cache_mib or "
            "the knowledge sources, or add nodes"
        )
