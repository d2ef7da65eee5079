"""Re-encoding a knowledge source with a Ray Data actor pool.

The unit of work is a row group of the prepared corpus: an actor reads it and encodes it in batches of fixed make-up.
Waveforms never cross the object store, rows can be counted per unit, and the embeddings are the same bits whichever
actor encodes which unit, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

from ask_ray.config import ModelSettings, PoolSettings
from ask_ray.data.batches import crop, pad
from ask_ray.data.corpus import ClipRows, Corpus, Group
from ask_ray.data.schema import id_number
from ask_ray.knowledge.snapshot import Embeddings, Entries
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder


class EncodingError(RuntimeError):
    """A refresh whose rows cannot be trusted: some are missing, double, or not finite."""


@dataclass(frozen=True)
class EncodingPlan:
    """What is encoded, with what.

    corpus: place of the prepared corpus; split: which of its clips; captions_per_clip: entries made of each;
    max_seconds: longer clips are cropped; seconds and names as in the settings.
    """

    corpus: str
    split: str
    captions_per_clip: int
    max_seconds: float
    model: ModelSettings
    pool: PoolSettings


def encode_rows(model: DualEncoder, rows: ClipRows, plan: EncodingPlan, rate: int, device: torch.device) -> dict[str, Any]:
    """Encode the clips of a row group and their first captions, as columns of one row an entry.

    Returns:
        id, number, caption, which: the entry; audio, text: (n, d) float32.
    """
    limit = round(plan.max_seconds * rate)
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
    model: DualEncoder, rows: ClipRows, captions: list[str], limit: int, size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Encode every clip of a row group, cropped to `limit` samples, and some captions, in batches of `size`.

    Returns:
        (clips, d) and (captions, d) float32.
    """
    waveforms = [crop(rows.waveform(row), limit) for row in range(len(rows))]
    with torch.inference_mode():
        audio = [
            model.encode_audio(*(x.to(device) for x in pad(waveforms[start : start + size])))
            for start in range(0, len(waveforms), size)
        ]
        text = [
            model.encode_text(*(x.to(device) for x in model.tokenise(captions[start : start + size])))
            for start in range(0, len(captions), size)
        ]
    return torch.cat(audio).cpu().numpy(), torch.cat(text).cpu().numpy()


class Encoder:
    """An actor of the pool: the model in evaluation mode, its weights fetched once."""

    def __init__(self, plan: EncodingPlan, weights: list[ray.ObjectRef]) -> None:
        torch.set_num_threads(max(1, int(plan.pool.cpus)))
        self.device = torch.device("cuda" if plan.pool.gpus else "cpu")
        self.corpus = Corpus.open(plan.corpus)
        self.groups = self.corpus.groups(plan.split)
        self.plan = plan
        self.model = registry.build(plan.model, self.corpus.sample_rate)
        self.model.load_state_dict(ray.get(weights[0]))
        self.model.to(self.device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Encode one row group; every row of the answer carries the group's number and its clips and rows."""
        unit = int(batch["unit"][0])
        rows = self.corpus.read(self.groups[unit])
        columns = encode_rows(self.model, rows, self.plan, self.corpus.sample_rate, self.device)
        count = len(columns["id"])
        return {"unit": np.full(count, unit), "clips": np.full(count, len(rows)), "rows": np.full(count, count), **columns}


def encode(
    plan: EncodingPlan, weights: ray.ObjectRef, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Entries, Embeddings]:
    """Encode a whole source with an actor pool.

    Args:
        weights: reference to a state dict of the model that `plan.model` describes.
        progress: called with the clips done and all clips.

    Returns:
        the entries in the order of the corpus, and their embeddings.

    Raises:
        EncodingError: if rows are missing, double or not finite.
    """
    corpus = Corpus.open(plan.corpus)
    groups = corpus.groups(plan.split)
    found: dict[int, dict[str, np.ndarray]] = {}
    total, done = sum(group.clips for group in groups), 0
    for batch in _dataset(plan, weights, groups).iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for unit in np.unique(batch["unit"]):
            if int(unit) in found:
                raise EncodingError(f"row group {unit} of {plan.corpus} came twice")
            found[int(unit)] = {str(name): column[batch["unit"] == unit] for name, column in batch.items()}
            done += groups[int(unit)].clips
            progress(done, total)
    _check(found, groups, plan)
    columns = {name: np.concatenate([found[unit][name] for unit in sorted(found)]) for name in next(iter(found.values()))}
    entries = Entries(
        list(columns["id"]), columns["number"], list(columns["caption"]), columns["which"], [plan.corpus] * len(columns["id"])
    )
    return entries, Embeddings(_rows(columns["audio"]), _rows(columns["text"]))


def _rows(column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.stack(list(column)), dtype=np.float32)


def _dataset(plan: EncodingPlan, weights: ray.ObjectRef, groups: list[Group]) -> ray.data.Dataset:
    pool = plan.pool
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Explicit, so that the pool never waits for CPUs that Ray Data believes to belong to others.
    context.execution_options.resource_limits = ExecutionResources(
        cpu=pool.max_actors * pool.cpus, gpu=pool.max_actors * pool.gpus if pool.gpus else None
    )
    options: dict[str, Any] = {"label_selector": pool.node_labels} if pool.node_labels else {}
    units = ray.data.from_items([{"unit": unit} for unit in range(len(groups))], override_num_blocks=len(groups))
    return units.map_batches(
        Encoder,
        fn_constructor_args=(plan, [weights]),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        **options,
    )


def _check(found: dict[int, dict[str, np.ndarray]], groups: list[Group], plan: EncodingPlan) -> None:
    """Every clip of every unit is there with all its captions, each once, and every number is finite."""
    for unit, group in enumerate(groups):
        if unit not in found:
            raise EncodingError(f"row group {unit} of {plan.corpus} is missing: {len(found)} of {len(groups)} came back")
        rows = found[unit]
        clips = len(np.unique(rows["number"]))
        if clips != group.clips or int(rows["clips"][0]) != group.clips:
            raise EncodingError(f"row group {unit} of {plan.corpus}: {clips} of {group.clips} clips came back")
        different, made = len({*zip(rows["number"], rows["which"], strict=True)}), int(rows["rows"][0])
        if not different == len(rows["number"]) == made:
            raise EncodingError(
                f"row group {unit} of {plan.corpus}: {len(rows['number'])} rows came back, {different} of them different, "
                f"where {made} were made"
            )
        for name in ("audio", "text"):
            if not np.isfinite(_rows(rows[name])).all():
                raise EncodingError(f"row group {unit} of {plan.corpus}: {name} embeddings are not finite")
