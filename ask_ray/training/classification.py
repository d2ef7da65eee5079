"""Zero-shot classification of sounds: a clip is of the class whose prompts, texts such as "the sound of rain", are nearest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ask_ray.config import Settings, SettingsError
from ask_ray.data import audio
from ask_ray.data.batches import crop, pad
from ask_ray.data.esc50 import Labelled
from ask_ray.data.schema import Rejection, UnusableClip, usable_waveform
from ask_ray.method import interaction
from ask_ray.method.interaction import Packed
from ask_ray.models.dual_encoder import DualEncoder, Encoding, unit
from ask_ray.training import metrics
from ask_ray.training.metrics import Ranked

#: The prompts of a class, unless others are given; `{}` is the class's name.
TEMPLATES = ("the sound of {}", "a recording of {}", "{} can be heard")


@dataclass(frozen=True)
class Heard:
    """Clips that were decoded.

    categories: of each; audio: (n, d) float32 unit rows; aside: those that could not be used; tokens: None where only embeddings
    meet.
    """

    categories: list[str]
    audio: Tensor
    aside: list[Rejection]
    tokens: Packed | None = None


def check_templates(templates: Sequence[str]) -> None:
    """Raise ``SettingsError`` for a template that has no place for the class's name."""
    for template in templates:
        if "{}" not in template:
            raise SettingsError(f"--template: {template!r} has no {{}} where the class's name goes")


def hear(model: DualEncoder, clips: Sequence[Labelled], settings: Settings, device: torch.device) -> Heard:
    """Decode and encode clips, a batch at a time; as in training, they are cropped to `data.max_seconds`."""
    data = settings.data
    categories, parts, aside = [], [torch.empty(0, settings.model.dim, device=device)], []
    tokens: list[Packed] = []
    size = settings.knowledge.pool.batch_size
    for start in range(0, len(clips), size):
        waveforms = []
        for clip in clips[start : start + size]:
            try:
                samples = audio.load(clip.path, data.sample_rate, data.max_seconds).samples
                waveform = usable_waveform(samples, data.sample_rate, data.min_seconds)
            except UnusableClip as error:
                aside.append(Rejection(clip.path.name, str(clip.path), error.reason, error.detail))
                continue
            waveforms.append(crop(waveform, round(data.max_seconds * data.sample_rate)))
            categories.append(clip.category)
        if waveforms:
            with torch.inference_mode():
                encoding = model.audio_encoding(*(x.to(device) for x in pad(waveforms)))
            parts.append(encoding.vectors)
            if encoding.tokens is not None:
                tokens.append(Packed.of(encoding.tokens))
    return Heard(categories, torch.cat(parts), aside, Packed.joined(tokens) if tokens else None)


def class_vectors(model: DualEncoder, names: Sequence[str], templates: Sequence[str], device: torch.device) -> Tensor:
    """(C, d) float32 unit rows: each class's mean over its prompts' unit vectors. Underscores in a name are spaces."""
    return unit(torch.stack([one.vectors for one in _prompts(model, names, templates, device)]).mean(dim=0))


def class_tokenwise(
    model: DualEncoder, heard: Heard, names: Sequence[str], templates: Sequence[str], device: torch.device
) -> Tensor | None:
    """(n, C) float32: how clips meet classes token by token, the mean over a class's prompts; None where only embeddings meet."""
    if heard.tokens is None:
        return None
    by_template = []
    for prompts in _prompts(model, names, templates, device):
        assert prompts.tokens is not None
        by_template.append(torch.cat([*interaction.score_rows(heard.tokens, Packed.of(prompts.tokens), device)]))
    return torch.stack(by_template).mean(dim=0).to(device)


def classified(heard: Heard, names: Sequence[str], vectors: Tensor, tokenwise: Tensor | None = None) -> dict[str, Any]:
    """Accuracy with its interval, of all clips and class by class.

    A clip that is as near to another class as to its own counts as wrong.

    Args:
        vectors: of :func:`class_vectors`.
        tokenwise: of :func:`class_tokenwise`.

    Returns:
        `n` clips; `accuracy`, `top5` and their `intervals` by bootstrap over clips; `classes`: of each in order `category`,
        `clips`, `accuracy` and `intervals` (None without clips), and `taken_for`, the other class that it was most taken for.
    """
    own = np.array([names.index(category) for category in heard.categories], np.int64)
    ranked = metrics.rank_of_right(heard.audio, vectors, torch.from_numpy(own).to(vectors.device), tokenwise=tokenwise)
    scores = heard.audio @ vectors.T
    scores = scores if tokenwise is None else interaction.combined(scores, tokenwise)
    taken = scores.argmax(dim=1).cpu().numpy()
    classes = []
    for number, name in enumerate(names):
        mine = own == number
        wrong = Counter(names[other] for other in taken[mine] if other != number)
        mistaken = min(wrong, key=lambda other: (-wrong[other], other)) if wrong else None
        classes.append({"category": name, **_accuracy(ranked.of(mine)), "taken_for": mistaken})
    return {"n": len(own), **_accuracy(ranked), "classes": classes}


def _accuracy(ranked: Ranked) -> dict[str, Any]:
    if not len(ranked):
        return {"clips": 0, "accuracy": None, "top5": None, "intervals": None}
    figures, intervals = ranked.figures(), ranked.intervals()
    names = {"accuracy": "r1", "top5": "r5"}
    return {
        "clips": len(ranked),
        **{name: figures[key] for name, key in names.items()},
        "intervals": {name: intervals[key] for name, key in names.items()},
    }


def _prompts(model: DualEncoder, names: Sequence[str], templates: Sequence[str], device: torch.device) -> Iterator[Encoding]:
    """Of each template, the prompts of all classes."""
    plain = [name.replace("_", " ") for name in names]
    for template in templates:
        with torch.inference_mode():
            tokens = model.tokenise([template.replace("{}", name) for name in plain])
            made = model.text_encoding(*(x.to(device) for x in tokens))
        yield made
