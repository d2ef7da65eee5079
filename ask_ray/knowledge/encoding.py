"""Re-encoding the knowledge sources with a Ray Data actor pool.

The unit of work is a row group of a source's prepared corpus: an actor reads it and encodes it in batches of fixed make-up.
Waveforms never cross the object store, rows can be counted per unit, and the embeddings are the same bits whichever
actor encodes which unit, in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from torch import Tensor

from ask_ray.config import ModelSettings, PoolSettings
from ask_ray.data.batches import crop, longest, pad
from ask_ray.data.corpus import ClipRows, Corpus, Group
from ask_ray.data.schema import id_number
from ask_ray.knowledge.snapshot import Embeddings, Entries
from ask_ray.knowledge.sources import Source
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder


class EncodingError(RuntimeError):
    """A refresh whose rows cannot be trusted: some are missing, double, or not finite."""


@dataclass(frozen=True)
class EncodingPlan:
    """What is encoded, with what.

    sources: in the order of their entries, all of one form; captions_per_clip: most entries made of each clip;
    max_seconds: longer clips are cropped; model, pool: as in the settings.
    """

    sources: tuple[Source, ...]
    captions_per_clip: int
    max_seconds: float
    model: ModelSettings
    pool: PoolSettings


@dataclass(frozen=True)
class Unit:
    """What is encoded at once: a row group of a source. corpus: the source's, opened."""

    source: Source
    corpus: Corpus
    group: Group

    def __str__(self) -> str:
        return f"row group {self.group.number} of {self.corpus.folder}/clips/{self.group.file}"

    def read(self) -> ClipRows:
        """Its clips."""
        return self.corpus.read(self.group)


def units(plan: EncodingPlan) -> list[Unit]:
    """All that a plan encodes, in the order of the entries: by source, then as in the corpus.

    Raises:
        SettingsError: if a source holds no finished corpus.
    """
    opened = [(source, Corpus.open(source.corpus)) for source in plan.sources]
    return [Unit(source, corpus, group) for source, corpus in opened for group in corpus.groups(source.split)]


def probe_units(plan: EncodingPlan, clips: int) -> list[Unit]:
    """The fewest units, evenly spread over those of all sources, that hold `clips` clips; all of them if no fewer do.

    :meth:`ask_ray.knowledge.snapshot.Locator.find` tells which entries their rows are.
    """
    every = units(plan)
    least = math.ceil(clips / max(unit.group.clips for unit in every))
    for count in range(least, len(every)):
        spread = [every[place] for place in np.linspace(0, len(every) - 1, count).round().astype(int)]
        if sum(unit.group.clips for unit in spread) >= clips:
            return spread
    return every


def encode_rows(model: DualEncoder, rows: ClipRows, plan: EncodingPlan, rate: int | None, device: torch.device) -> dict[str, Any]:
    """Encode the clips of a row group and their first captions, as columns of one row an entry.

    Args:
        rate: Hz of waveforms, None of pictures.

    Returns:
        id, number, caption, which: the entry; audio, text: (n, d) float32.
    """
    limit = longest(plan.max_seconds, rate)
    pairs = [(row, which) for row in range(len(rows)) for which in range(min(plan.captions_per_clip, len(rows.captions[row])))]
    captions = [rows.captions[row][which] for row, which in pairs]
    audio, text = encode_batches(model, rows, captions, limit, plan.pool.batch_size, device)
    clips = np.array([row for row, _ in pairs], dtype=np.int64)
    return {
        "id": [rows.ids[row] for row in clips],
        "number": np.array([id_number(rows.ids[row]) for row in clips], dtype=np.int64),
        "caption": captions,
        "which": np.array([which for _, which in pairs], dtype=np.int64),
        "audio": audio[clips],
        "text": text,
    }


def encode_batches(
    model: DualEncoder, rows: ClipRows, captions: list[str], limit: int | None, size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Encode every clip of a row group, cropped to `limit` samples, and some captions, in batches of `size`.

    Returns:
        (clips, d) and (captions, d) float32.
    """
    with torch.inference_mode():
        audio = [model.encode_audio(*batch) for batch in batches_of_clips(rows, limit, size, device)]
        text = [model.encode_text(*batch) for batch in batches_of_captions(model, captions, size, device)]
    return torch.cat(audio).cpu().numpy(), torch.cat(text).cpu().numpy()


def batches_of_clips(rows: ClipRows, limit: int | None, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Waveforms and lengths, or pictures and sizes, of `size` clips at a time, cropped to `limit` samples."""
    signals = [crop(rows.signal(row), limit) for row in range(len(rows))]
    for start in range(0, len(signals), size):
        inputs, sizes = pad(signals[start : start + size])
        yield inputs.to(device), sizes.to(device)


def batches_of_captions(
    model: DualEncoder, captions: list[str], size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and masks of `size` captions at a time."""
    for start in range(0, len(captions), size):
        ids, mask = model.tokenise(captions[start : start + size])
        yield ids.to(device), mask.to(device)


class Encoder:
    """An actor of the pool: the model in evaluation mode, its weights fetched once."""

    def __init__(self, plan: EncodingPlan, weights: list[ray.ObjectRef]) -> None:
        torch.set_num_threads(max(1, int(plan.pool.cpus)))
        self.device = torch.device("cuda" if plan.pool.gpus else "cpu")
        self.plan, self.units = plan, units(plan)
        self.rate = self.units[0].corpus.sample_rate
        self.model = registry.build(plan.model, self.rate, read=False)
        self.model.load_state_dict(ray.get(weights[0]))
        self.model.to(self.device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Encode one unit; every row of the answer carries the unit's place in the plan and its clips and rows."""
        unit = int(batch["unit"][0])
        rows = self.units[unit].read()
        columns = encode_rows(self.model, rows, self.plan, self.rate, self.device)
        count = len(columns["id"])
        return {"unit": np.full(count, unit), "clips": np.full(count, len(rows)), "rows": np.full(count, count), **columns}


def encode(
    plan: EncodingPlan, weights: ray.ObjectRef, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Entries, Embeddings]:
    """Encode all sources with an actor pool.

    Args:
        weights: reference to a state dict of the model that `plan.model` describes.
        progress: called with the clips done and all clips.

    Returns:
        the entries in the order of the sources and of their corpora, and their embeddings.

    Raises:
        EncodingError: if rows are missing, double or not finite.
    """
    every = units(plan)
    found: dict[int, dict[str, np.ndarray]] = {}
    total, done = sum(unit.group.clips for unit in every), 0
    for batch in _dataset(plan, weights, len(every)).iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for place in np.unique(batch["unit"]).tolist():
            if place in found:
                raise EncodingError(f"{every[place]} came twice")
            found[place] = {str(name): column[batch["unit"] == place] for name, column in batch.items()}
            done += every[place].group.clips
            progress(done, total)
    _check(found, every)
    parts = [found[place] for place in range(len(every))]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    sources = [unit.source.name for unit, part in zip(every, parts, strict=True) for _ in part["id"]]
    entries = Entries.of_lists(list(columns["id"]), columns["number"], list(columns["caption"]), columns["which"], sources)
    return entries, Embeddings(_rows(columns["audio"]), _rows(columns["text"]))


def _rows(column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.stack(list(column)), dtype=np.float32)


def _dataset(plan: EncodingPlan, weights: ray.ObjectRef, count: int) -> ray.data.Dataset:
    pool = plan.pool
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Explicit, so that the pool never waits for CPUs that Ray Data believes to belong to others.
    context.execution_options.resource_limits = ExecutionResources(
        cpu=pool.max_actors * pool.cpus, gpu=pool.max_actors * pool.gpus if pool.gpus else None
    )
    options: dict[str, Any] = {"label_selector": pool.node_labels} if pool.node_labels else {}
    places = ray.data.from_items([{"unit": place} for place in range(count)], override_num_blocks=count)
    return places.map_batches(
        Encoder,
        fn_constructor_args=(plan, [weights]),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        **options,
    )


def _check(found: dict[int, dict[str, np.ndarray]], every: list[Unit]) -> None:
    """Every clip of every unit is there with all its captions, each once, and every number is finite."""
    for place, unit in enumerate(every):
        if place not in found:
            raise EncodingError(f"{unit} is missing: {len(found)} of {len(every)} row groups came back")
        rows = found[place]
        clips = len(np.unique(rows["number"]))
        if clips != unit.group.clips or int(rows["clips"][0]) != unit.group.clips:
            raise EncodingError(f"{unit}: {clips} of {unit.group.clips} clips came back")
        different, made = len({*zip(rows["number"], rows["which"], strict=True)}), int(rows["rows"][0])
        if not different == len(rows["number"]) == made:
            raise EncodingError(
                f"{unit}: {len(rows['number'])} rows came back, {different} of them different, where {made} were made"
            )
        for name in ("audio", "text"):
            if not np.isfinite(_rows(rows[name])).all():
                raise EncodingError(f"{unit}: {name} embeddings are not finite")
