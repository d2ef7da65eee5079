"""Looking at a finished run: its figures on prepared corpora and labelled sounds, and search in its knowledge base. Needs no
Ray session."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ask_ray import tables
from ask_ray.config import Settings, SettingsError
from ask_ray.data import audio, esc50
from ask_ray.data.batches import crop, pad
from ask_ray.data.corpus import Corpus
from ask_ray.data.rarity import Frequencies
from ask_ray.data.schema import Rejection, usable_waveform
from ask_ray.knowledge import snapshot
from ask_ray.knowledge.encoding import batches_of_captions
from ask_ray.knowledge.snapshot import Snapshot
from ask_ray.knowledge.sources import sources_of
from ask_ray.models import dual_encoder
from ask_ray.models.dual_encoder import DualEncoder, Encoding
from ask_ray.storage import Folder
from ask_ray.tables import Report
from ask_ray.training import checkpoint, classification, evaluation
from ask_ray.training.checkpoint import Place
from ask_ray.training.evaluation import EncodedSplit
from ask_ray.training.trainer import RunPlace

#: Clips that a search ranks token by token: those that the embeddings rank first.
SHORTLIST = 100

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


def evaluate(
    run: str,
    corpus: str | None,
    split: str,
    write: Sequence[str] = (),
    transductive: bool = False,
    rare: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """What `jobs/evaluate.py` promises: tables of retrieval both ways with 95 % intervals, and files of them if asked for.

    Returns:
        what a JSON file holds: `run`, `corpus`, `split`, `interaction`, `bootstrap`; `final`: `t2a` and `a2t` as
        :func:`ask_ray.training.evaluation.told` gives them; the same as `transductive`, and `rare`, if asked for.
    """
    console = console or Console()
    files = tables.places(write)
    opened = OpenedRun.at(run)
    on = _corpus_of(opened, corpus, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"Encoding {on.clips(split)} clips"):
        encoded = evaluation.encode_split(opened.model.to(device), on, split, opened.settings, device)
        ways = evaluation.ranked(encoded)
    found: dict[str, Any] = {
        "run": str(opened.place.folder),
        "corpus": str(on.folder),
        "split": split,
        "interaction": opened.settings.model.interaction,
        "bootstrap": {"resamples": evaluation.RESAMPLES, "seed": evaluation.SEED, "level": 0.95},
        "final": evaluation.told(encoded, ways),
    }
    if transductive:
        with console.status("Sinkhorn over the whole split"):
            found["transductive"] = _transductive(encoded, opened.settings.ask.epsilon)
    if rare:
        trained = Frequencies.of(Corpus.open(opened.stood.corpus).captions("train"))
        found["rare"] = {"training_clips": trained.clips, "buckets": evaluation.by_rarity(encoded, ways, trained)}
    _give(_retrieval_report(found, f"{opened.place.name} on {split} of {on.folder.name}"), files, console)
    return found


def _corpus_of(opened: OpenedRun, corpus: str | None, split: str) -> Corpus:
    """The corpus to evaluate on.

    Raises:
        SettingsError: if it has another sample rate than the run's own, or no clips in the split.
    """
    on = Corpus.open(corpus or opened.stood.corpus)
    trained = Corpus.open(opened.stood.corpus).sample_rate
    if on.sample_rate != trained:
        raise SettingsError(
            f"--corpus: {on.folder} has {on.sample_rate} Hz, the run was trained at {trained} Hz: prepare it with "
            f"--data.sample_rate {trained}"
        )
    if on.clips(split) == 0:
        raise SettingsError(f"--split: {on.folder} has no {split} clips")
    return on


def _transductive(encoded: EncodedSplit, epsilon: float) -> dict[str, Any]:
    ways, plan = evaluation.ranked_by_plan(encoded, epsilon)
    return {"epsilon": epsilon, "sweeps": plan.sweeps, "marginal_error": plan.error, **evaluation.told(encoded, ways)}


def _retrieval_report(found: dict[str, Any], title: str) -> Report:
    how_ranked = found["interaction"]
    sheets = [tables.retrieval(f"{title}: {how_ranked}", {"": found["final"]})]
    records = [tables.record(found["final"][way], ranking=how_ranked, direction=way, bucket="all") for way in tables.WAYS]
    if plan := found.get("transductive"):
        how = f"ε {plan['epsilon']:g}, {plan['sweeps']} sweeps, marginals within {plan['marginal_error']:.1g}"
        sheets.append(tables.retrieval(f"{title}: {tables.TRANSDUCTIVE}, {how}", {"": plan}))
        records += [tables.record(plan[way], ranking=tables.TRANSDUCTIVE, direction=way, bucket="all") for way in tables.WAYS]
    if rare := found.get("rare"):
        by = f"clips by how many of the {rare['training_clips']} training clips have their rarest word"
        sheets.append(tables.rare(f"{title}: {how_ranked}, {by}", rare["buckets"]))
        records += [
            tables.record(of[way], ranking=how_ranked, direction=way, bucket=of["bucket"])
            for of in rare["buckets"]
            for way in tables.WAYS
        ]
    return Report(found, sheets, records)


def _give(report: Report, files: Sequence[Path], console: Console) -> None:
    """Print a report's tables, then write its files."""
    for sheet in report.sheets:
        console.print(sheet.rich())
    for file in files:
        report.write(file)


def classify(
    run: str, path: str, templates: Sequence[str] = (), write: Sequence[str] = (), console: Console | None = None
) -> dict[str, Any]:
    """What `jobs/classify.py` promises: zero-shot accuracy on sounds in ESC-50's layout, in all and class by class.

    Returns:
        what a JSON file holds: `run`, `path`, `templates`, what :func:`ask_ray.training.classification.classified` gives, and
        `aside`, the clips that could not be used and why.

    Raises:
        SettingsError: for another layout, a template without a place for the class, or recordings that are all unusable.
    """
    console = console or Console()
    files, templates = tables.places(write), list(templates or classification.TEMPLATES)
    classification.check_templates(templates)
    listed = esc50.read(path, "--path")
    opened = OpenedRun.at(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, names = opened.model.to(device), listed.categories()
    with console.status(f"Encoding {len(listed.clips)} clips"):
        heard = classification.hear(model, listed.clips, opened.settings, device)
    aside = [*listed.aside, *heard.aside]
    _tell_aside(aside, console)
    if not heard.categories:
        raise SettingsError(f"--path: no recording of {path} can be used; the first: {aside[0].source}: {aside[0].reason}")
    vectors = classification.class_vectors(model, names, templates, device)
    tokenwise = classification.class_tokenwise(model, heard, names, templates, device)
    found: dict[str, Any] = {
        "run": str(opened.place.folder),
        "path": str(Path(path).expanduser().resolve()),
        "templates": templates,
        **classification.classified(heard, names, vectors, tokenwise),
        "aside": [vars(one) for one in aside],
    }
    title = f"{opened.place.name} on {Path(path).name}, zero-shot: {len(names)} classes, {len(aside)} set aside"
    _give(Report(found, [tables.classes(title, found)], tables.class_records(found)), files, console)
    return found


def _tell_aside(aside: Sequence[Rejection], console: Console) -> None:
    for one in aside:
        console.print(Text(f"set aside  {one.source}: {one.reason}" + (f" ({one.detail})" if one.detail else "")))


def search(query: str, run: str | None, storage: str, top: int, console: Console | None = None) -> list[tuple[float, str, str]]:
    """What `jobs/search.py` promises: a text finds clips, an audio file captions.

    Where tokens interact, the embeddings find :data:`SHORTLIST` clips, or `top` if that is more, whose own tokens then rank them.

    Returns:
        (score, clip id, caption) by falling score: the cosine similarity, or :func:`ask_ray.models.dual_encoder.scores`.

    Raises:
        SettingsError: if a recording is not there, or a clip to be ranked is no longer in its corpus.
    """
    console = console or Console()
    path = Path(query).expanduser()
    by_audio = path.is_file()
    if not by_audio and path.suffix.lower() in AUDIO_ENDINGS:
        raise SettingsError(f"query: {path} is not there; give the path of an audio file, or a text")
    with console.status("Opening the run"), torch.inference_mode():
        opened = OpenedRun.at(run or _newest_run(storage))
        known = opened.knowledge()
        asked = _heard(path, opened) if by_audio else opened.model.text_encoding(*opened.model.tokenise([query]))
    index = known.text_index if by_audio else known.audio_index
    clips = top if asked.tokens is None else max(top, SHORTLIST)
    scores, entries = index.search(asked.vectors.numpy(), min(len(known.entries), clips * known.entries.most_per_clip))
    found = [(float(score), int(entry)) for score, entry in zip(scores[0], entries[0], strict=True) if entry >= 0]
    if asked.tokens is not None:
        with console.status("Ranking token by token"), torch.inference_mode():
            found = reranked(asked, by_audio, _of_clips(found, known, clips), known, opened)
    ranked = _ranked(found, known, top)
    table = Table(title=f"{'Captions' if by_audio else 'Clips'} nearest to {query!r} in v{known.version} of {opened.place.name}")
    for heading in ("rank", "score", "clip", "caption"):
        table.add_column(heading, justify="right" if heading in ("rank", "score") else "left", overflow="fold")
    for rank, (score, clip, caption) in enumerate(ranked, 1):
        table.add_row(str(rank), f"{score:.3f}", clip, caption)
    console.print(table)
    return ranked


def _ranked(found: list[tuple[float, int]], known: Snapshot, top: int) -> list[tuple[float, str, str]]:
    """Each clip once, by its best entry."""
    best: dict[str, tuple[float, str, str]] = {}
    for score, entry in found:
        clip, caption = known.entries.ids[entry].as_py(), known.entries.captions[entry].as_py()
        best.setdefault(clip, (score, clip, caption))
    return list(best.values())[:top]


def _of_clips(found: list[tuple[float, int]], known: Snapshot, clips: int) -> list[int]:
    """The entries of the first `clips` clips among those that were found."""
    first = [*dict.fromkeys(known.entries.numbers[entry] for _, entry in found)][:clips]
    return [entry for _, entry in found if known.entries.numbers[entry] in first]


def reranked(asked: Encoding, by_audio: bool, entries: list[int], known: Snapshot, opened: OpenedRun) -> list[tuple[float, int]]:
    """Entries with the score of what they hold, encoded now, by falling score. `by_audio`: the query is heard, else read."""
    size, device = opened.settings.knowledge.pool.batch_size, torch.device("cpu")
    if by_audio:
        captions = [known.entries.captions[entry].as_py() for entry in entries]
        of_texts = batches_of_captions(opened.model, captions, size, device)
        scores = torch.cat([dual_encoder.scores(asked, opened.model.text_encoding(*one))[0] for one in of_texts])
        return _falling(zip(scores.tolist(), entries, strict=True))
    data = opened.settings.data
    own: dict[int, float] = {}
    waveforms = list(_recordings(entries, known, opened).items())
    for start in range(0, len(waveforms), size):
        some = waveforms[start : start + size]
        batch = pad([crop(waveform, round(data.max_seconds * data.sample_rate)) for _, waveform in some])
        heard = dual_encoder.scores(opened.model.audio_encoding(*batch), asked)[:, 0]
        own |= dict(zip((number for number, _ in some), heard.tolist(), strict=True))
    return _falling((own[known.entries.numbers[entry]], entry) for entry in entries)


def _falling(scored: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    return sorted(scored, key=lambda one: -one[0])


def _recordings(entries: list[int], known: Snapshot, opened: OpenedRun) -> dict[int, np.ndarray]:
    """The samples of the entries' clips, (samples,) int16 each, by the clips' numbers.

    Raises:
        SettingsError: if a corpus is gone, or lacks one of them.
    """
    wanted: dict[str, dict[str, int]] = {}
    for entry in entries:
        name = known.entries.sources[known.entries.source[entry]]
        wanted.setdefault(name, {})[known.entries.ids[entry].as_py()] = int(known.entries.numbers[entry])
    found: dict[int, np.ndarray] = {}
    for source in sources_of(opened.settings.knowledge.sources, opened.stood.corpus):
        numbers, corpus = wanted.get(source.name, {}), Corpus.open(source.corpus)
        places = {place: numbers[clip] for place, clip in enumerate(corpus.ids(source.split)) if clip in numbers}
        if len(places) < len(numbers):
            raise SettingsError(f"{corpus.folder} lacks clips that the knowledge base holds; prepare it as it was, or train anew")
        found |= {places[place]: waveform for place, waveform in corpus.waveforms(source.split, places).items()}
    return found


def _heard(path: Path, opened: OpenedRun) -> Encoding:
    """An audio file as the model hears it, a batch of one.

    Raises:
        UnusableClip: if it cannot be decoded or holds nothing to hear.
    """
    data = opened.settings.data
    waveform = usable_waveform(audio.load(path, data.sample_rate).samples, data.sample_rate, data.min_seconds)
    return opened.model.audio_encoding(*pad([crop(waveform, round(data.max_seconds * data.sample_rate))]))


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
