"""Looking at a finished run: its figures on any prepared corpus, and search in its knowledge base. Needs no Ray session."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ask_ray.config import Settings, SettingsError
from ask_ray.data import audio
from ask_ray.data.batches import crop, pad
from ask_ray.data.corpus import Corpus
from ask_ray.data.schema import usable_waveform
from ask_ray.knowledge import snapshot
from ask_ray.knowledge.snapshot import Snapshot
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.report import retrieval_table
from ask_ray.storage import Folder
from ask_ray.training import checkpoint, evaluation
from ask_ray.training.checkpoint import Place
from ask_ray.training.trainer import RunPlace

#: A query that ends like this is meant as a file.
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class OpenedRun:
    """A run's newest checkpoint: the model in evaluation mode, the settings it was trained with, where it stood."""

    place: RunPlace
    model: DualEncoder
    settings: Settings
    stood: Place

    @classmethod
    def at(cls, run: str) -> OpenedRun:
        """Open a run by its folder.

        Raises:
            CheckpointError: if it holds no whole checkpoint.
        """
        folder = Folder.at(run)
        with checkpoint.newest(folder) as local:
            model, settings, stood = checkpoint.open_model(local)
        return cls(RunPlace(folder.parent, folder.name), model, settings, stood)

    def knowledge(self) -> Snapshot:
        """The newest version of the run's knowledge base.

        Raises:
            SettingsError: if the run kept none.
        """
        versions = snapshot.versions(self.place.knowledge)
        if not versions:
            raise SettingsError(f"{self.place.folder}: the run keeps no knowledge base to search (ask.enabled was false)")
        return snapshot.open_snapshot(self.place.knowledge, versions[-1], self.place.name, self.settings.model.dim)


def evaluate(run: str, corpus: str | None, split: str, json_file: str | None, console: Console | None = None) -> None:
    """What `jobs/evaluate.py` promises: a table of retrieval both ways, and the figures as JSON if asked for."""
    console = console or Console()
    opened = OpenedRun.at(run)
    on = Corpus.open(corpus or opened.stood.corpus)
    trained = Corpus.open(opened.stood.corpus).sample_rate
    if on.sample_rate != trained:
        raise SettingsError(
            f"--corpus: {on.folder} has {on.sample_rate} Hz, the run was trained at {trained} Hz: prepare it with "
            f"--data.sample_rate {trained}"
        )
    if on.clips(split) == 0:
        raise SettingsError(f"--split: {on.folder} has no {split} clips")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"Encoding {on.clips(split)} clips"):
        encoded = evaluation.encode_split(opened.model.to(device), on, split, opened.settings, device)
        figures = evaluation.both_ways(encoded)
    console.print(retrieval_table(f"{opened.place.name} on {split} of {on.folder.name}", {"": figures}))
    if json_file is not None:
        report = {"run": str(opened.place.folder), "corpus": str(on.folder), "split": split, "final": figures}
        Path(json_file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def search(query: str, run: str | None, storage: str, top: int, console: Console | None = None) -> list[tuple[float, str, str]]:
    """What `jobs/search.py` promises: a text finds clips, an audio file captions.

    Returns:
        (cosine similarity, clip id, caption) by falling similarity.
    """
    console = console or Console()
    path = Path(query).expanduser()
    by_audio = path.is_file()
    if not by_audio and path.suffix.lower() in AUDIO_ENDINGS:
        raise SettingsError(f"query: {path} is not there; give the path of an audio file, or a text")
    with console.status("Opening the run"), torch.inference_mode():
        opened = OpenedRun.at(run or _newest_run(storage))
        known = opened.knowledge()
        vector = _heard(path, opened) if by_audio else opened.model.encode_text(*opened.model.tokenise([query]))
    index = known.text_index if by_audio else known.audio_index
    found = _ranked(index.search(vector.numpy(), min(len(known.entries), top * known.entries.most_per_clip)), known, top)
    table = Table(title=f"{'Captions' if by_audio else 'Clips'} nearest to {query!r} in v{known.version} of {opened.place.name}")
    for heading in ("rank", "score", "clip", "caption"):
        table.add_column(heading, justify="right" if heading in ("rank", "score") else "left", overflow="fold")
    for rank, (score, clip, caption) in enumerate(found, 1):
        table.add_row(str(rank), f"{score:.3f}", clip, caption)
    console.print(table)
    return found


def _ranked(found: tuple[np.ndarray, np.ndarray], known: Snapshot, top: int) -> list[tuple[float, str, str]]:
    """Each clip once, by its best entry."""
    best: dict[str, tuple[float, str, str]] = {}
    for score, entry in zip(found[0][0], found[1][0], strict=True):
        if entry >= 0:
            clip, caption = known.entries.ids[entry].as_py(), known.entries.captions[entry].as_py()
            best.setdefault(clip, (float(score), clip, caption))
    return list(best.values())[:top]


def _heard(path: Path, opened: OpenedRun) -> torch.Tensor:
    """(1, d): an audio file as the model hears it.

    Raises:
        UnusableClip: if it cannot be decoded or holds nothing to hear.
    """
    data = opened.settings.data
    waveform = usable_waveform(audio.load(path, data.sample_rate).samples, data.sample_rate, data.min_seconds)
    return opened.model.encode_audio(*pad([crop(waveform, round(data.max_seconds * data.sample_rate))]))


def _newest_run(storage: str) -> str:
    """The run whose result was written last.

    Raises:
        SettingsError: if there is none.
    """
    home = Folder.at(storage)
    finished = [name for name in home.names() if (home / name).exists("result.json")]
    if not finished:
        raise SettingsError(f"--storage: no finished run is in {home}: train one with jobs/train.py, or give --run")
    return (home / max(finished, key=lambda name: (home / name).changed("result.json"))).uri
