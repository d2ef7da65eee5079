"""Looking at a finished run: its figures on prepared corpora and labelled sounds, and search in its knowledge base. Needs no
Ray session."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ask_ray import tables
from ask_ray.config import Settings, SettingsError
from ask_ray.data import audio, esc50, pictures
from ask_ray.data.batches import crop, longest, pad
from ask_ray.data.corpus import Corpus
from ask_ray.data.files import is_there
from ask_ray.data.folders import PICTURES, RECORDINGS
from ask_ray.data.rarity import Frequencies
from ask_ray.data.schema import Rejection, usable_pixels, usable_waveform
from ask_ray.knowledge import snapshot
from ask_ray.knowledge.encoding import batches_of_captions
from ask_ray.knowledge.snapshot import Snapshot
from ask_ray.knowledge.sources import sources_of
from ask_ray.modality import THINGS, WAYS, Modality
from ask_ray.models import dual_encoder
from ask_ray.models.dual_encoder import DualEncoder, Encoding
from ask_ray.storage import Folder, StorageError, expanded, local_path
from ask_ray.tables import Report
from ask_ray.training import checkpoint, classification, evaluation, seen
from ask_ray.training.checkpoint import Place
from ask_ray.training.evaluation import EncodedSplit
from ask_ray.training.seen import Seen
from ask_ray.training.trainer import RunPlace

#: Clips or pictures that a search ranks token by token: those that the embeddings rank first.
SHORTLIST = 100

#: A query that ends like this is meant as a file.
FILE_ENDINGS = (*RECORDINGS.endings, *PICTURES.endings)


@dataclass(frozen=True)
class OpenedRun:
    """A run's newest checkpoint: the model in evaluation mode, the settings it was trained with, where it stood."""

    place: RunPlace
    model: DualEncoder
    settings: Settings
    stood: Place

    @property
    def modality(self) -> Modality:
        """What the captions that it was trained on describe."""
        return self.settings.data.modality

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
            raise SettingsError(
                f"{self.place.folder}: the run keeps no knowledge base to search (ask.enabled was false); name another with --run"
            )
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
        :func:`ask_ray.training.evaluation.told` gives them; the same as `transductive`, and `rare`, if asked for; on another
        corpus than the run's own, and of a run that forks one on another corpus, `seen`, the ids of its clips that the weights
        were trained on or found in a knowledge base, `cut_otherwise`, the corpora of these that hold recordings which could not
        be compared by their samples, and `unchecked`, why others could not be opened.
    """
    console = console or Console()
    files = tables.places(write)
    opened = OpenedRun.at(run)
    on = _corpus_of(opened, corpus, split)
    # What cannot be read for these is told before the long work.
    with console.status(f"Looking for {THINGS[opened.modality]} that the run has seen"):
        met = _met(opened, on, split)
        trained = Frequencies.of(Corpus.open(opened.stood.corpus).captions("train")) if rare else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"Encoding {on.clips(split)} {THINGS[opened.modality]}"):
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
    if trained is not None:
        found["rare"] = {"training_clips": trained.clips, "buckets": evaluation.by_rarity(encoded, ways, trained)}
    title = f"{opened.place.name} on {split} of {on.folder.name}"
    if met is not None:
        found["seen"], found["unchecked"] = met.clips, met.unchecked
        found["cut_otherwise"] = [str(corpus.folder) for corpus in met.cut_otherwise]
        if met.clips:
            title += f", of which it has SEEN {len(met.clips)} {THINGS[opened.modality]}"
        if met.cut_otherwise or met.unchecked:
            title += " and MAY HAVE SEEN more" if met.clips else f", of which it MAY HAVE SEEN {THINGS[opened.modality]}"
    _give(_retrieval_report(found, title, opened.modality), files, console)
    if met is not None:
        _tell_met(met, on, split, console)
    return found


class Met(NamedTuple):
    """Of a split that is evaluated on, `clips`: the ids of those that the run's weights have seen; `cut_otherwise`: corpora with
    recordings that could not be compared by their samples; `unchecked`: why others could not be opened."""

    clips: list[str]
    cut_otherwise: list[Corpus]
    unchecked: list[str]


def _met(opened: OpenedRun, on: Corpus, split: str) -> Met | None:
    """What of a split the run's weights have seen; None if they have seen no other corpus than it."""
    known = _seen(opened, on)
    return None if known is None else Met(known.clips(on, split), known.cut_otherwise(on, split), list(known.gone))


def _tell_met(met: Met, on: Corpus, split: str, console: Console) -> None:
    things = THINGS[on.form.modality]
    if met.clips:
        such, where = escape(repr(met.clips[0])), escape(f"'[{on.folder}]'")
        console.print(
            f"[red]The figures are too high[/]: {len(met.clips)} of the {on.clips(split)} {things}, such as {such}, were trained "
            "on or stand in the knowledge base (same id, source id or samples). Prepare what is trained on with --data.held_out "
            f"{where}",
            soft_wrap=True,
        )
    if met.cut_otherwise:
        _tell_cut_otherwise(met.cut_otherwise, on, console)
    for problem in met.unchecked:
        console.print(
            f"[red]The figures may be too high[/]: whether {things} of {escape(str(on.folder))} were trained on could not be "
            f"checked: {escape(problem)}",
            soft_wrap=True,
        )


def _seen(opened: OpenedRun, on: Corpus) -> Seen | None:
    """What the run's weights have seen beside the corpus to evaluate on; None if that is no other than its own."""
    before = seen.before_run(opened.settings, opened.stood.corpus)
    if on.folder != Folder.at(opened.stood.corpus):
        own = seen.by_run(opened.settings, opened.stood.corpus)
        return Seen(own.corpora + before.corpora, own.gone + before.gone)
    return before if before.corpora or before.gone else None


def _tell_cut_otherwise(otherwise: Sequence[Corpus], on: Corpus, console: Console) -> None:
    told = " and ".join(f"{corpus.folder} {corpus.form.seconds:g} s" for corpus in otherwise)
    console.print(
        f"[red]The figures may be too high[/]: {escape(str(on.folder))} keeps {on.form.seconds:g} s of a recording and "
        f"{escape(told)}, and all hold longer ones, which cannot be compared by their sound: that one was trained on or stands "
        "in the knowledge base, only its id or source id tells. Prepare what is evaluated on with "
        f"--data.keep_seconds {otherwise[0].form.seconds:g}",
        soft_wrap=True,
    )


def _corpus_of(opened: OpenedRun, corpus: str | None, split: str) -> Corpus:
    """The corpus to evaluate on.

    Raises:
        SettingsError: if it has another form than the run's own, or no clips in the split.
    """
    on = Corpus.open(corpus or opened.stood.corpus)
    trained = opened.settings.data.form
    if on.form != trained:
        raise SettingsError(
            f"--corpus: {on.folder} has {on.form}, the run's own corpus {trained}: prepare it with --{trained.setting}"
        )
    if on.clips(split) == 0:
        raise SettingsError(f"--split: {on.folder} has no {split} clips")
    return on


def _transductive(encoded: EncodedSplit, epsilon: float) -> dict[str, Any]:
    ways, plan = evaluation.ranked_by_plan(encoded, epsilon)
    return {"epsilon": epsilon, "sweeps": plan.sweeps, "marginal_error": plan.error, **evaluation.told(encoded, ways)}


def _retrieval_report(found: dict[str, Any], title: str, modality: Modality) -> Report:
    how_ranked = found["interaction"]
    sheets = [tables.retrieval(f"{title}: {how_ranked}", {"": found["final"]}, modality)]
    records = [tables.record(found["final"][way], ranking=how_ranked, direction=way, bucket="all") for way in WAYS]
    if plan := found.get("transductive"):
        how = f"ε {plan['epsilon']:g}, {plan['sweeps']} sweeps, marginals within {plan['marginal_error']:.1g}"
        sheets.append(tables.retrieval(f"{title}: {tables.TRANSDUCTIVE}, {how}", {"": plan}, modality))
        records += [tables.record(plan[way], ranking=tables.TRANSDUCTIVE, direction=way, bucket="all") for way in WAYS]
    if rare := found.get("rare"):
        things = THINGS[modality]
        by = f"{things} by how many of the {rare['training_clips']} training {things} have their rarest word"
        sheets.append(tables.rare(f"{title}: {how_ranked}, {by}", rare["buckets"], modality))
        records += [
            tables.record(of[way], ranking=how_ranked, direction=way, bucket=of["bucket"])
            for of in rare["buckets"]
            for way in WAYS
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
    if opened.modality != "audio":
        raise SettingsError(f"run: {opened.place.folder} was trained on {THINGS[opened.modality]}, and cannot classify sounds")
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
        "path": str(local_path(path)),
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
    """What `jobs/search.py` promises: a text finds clips or pictures, a file of one captions.

    Where tokens interact, the embeddings find :data:`SHORTLIST` clips, or `top` if that is more, whose own tokens then rank them.

    Returns:
        (score, clip id, caption) by falling score: the cosine similarity, or :func:`ask_ray.models.dual_encoder.scores`.

    Raises:
        SettingsError: if no result is asked for, a file is not there, or a clip to be ranked is no longer in its corpus.
    """
    console = console or Console()
    if top < 1:
        raise SettingsError(f"--top: {top} results cannot be found; give 1 or more")
    path = _path(query)
    by_file = is_there(path)
    if not by_file and path.suffix.lower() in FILE_ENDINGS:
        raise SettingsError(f"query: {path} is not there; give the path of an audio file or a picture, or a text")
    with console.status("Opening the run"), torch.inference_mode():
        opened = OpenedRun.at(run or _newest_run(storage))
        known = opened.knowledge()
        asked = _perceived(path, opened) if by_file else opened.model.text_encoding(*opened.model.tokenise([query]))
    index = known.text_index if by_file else known.audio_index
    clips = top if asked.tokens is None else max(top, SHORTLIST)
    scores, entries = index.search(asked.vectors.numpy(), min(len(known.entries), clips * known.entries.most_per_clip))
    found = [(float(score), int(entry)) for score, entry in zip(scores[0], entries[0], strict=True) if entry >= 0]
    if asked.tokens is not None:
        with console.status("Ranking token by token"), torch.inference_mode():
            found = reranked(asked, by_file, _of_clips(found, known, clips), known, opened)
    ranked = _ranked(found, known, top)
    things = THINGS[opened.modality]
    of = f"{'Captions' if by_file else things.capitalize()} nearest to {query!r} in v{known.version} of {opened.place.name}"
    console.print(_ranking(ranked, of, things))
    return ranked


def _ranking(ranked: list[tuple[float, str, str]], title: str, things: str) -> Table:
    """What was found, as a table. All of it is text: brackets in a caption, a name or a query are no markup."""
    table = Table(title=Text(title))
    for heading in ("rank", "score", things[:-1], "caption"):
        table.add_column(heading, justify="right" if heading in ("rank", "score") else "left", overflow="fold")
    for rank, (score, clip, caption) in enumerate(ranked, 1):
        table.add_row(str(rank), f"{score:.3f}", Text(clip), Text(caption))
    return table


def _path(query: str) -> Path:
    """A query as a path; a text may begin with `~` and name nobody's home."""
    try:
        return expanded(query)
    except StorageError:
        return Path(query)


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


def reranked(asked: Encoding, by_file: bool, entries: list[int], known: Snapshot, opened: OpenedRun) -> list[tuple[float, int]]:
    """Entries with the score of what they hold, encoded now, by falling score. `by_file`: the query is heard or seen, else
    read."""
    size, device = opened.settings.knowledge.pool.batch_size, torch.device("cpu")
    if by_file:
        captions = [known.entries.captions[entry].as_py() for entry in entries]
        of_texts = batches_of_captions(opened.model, captions, size, device)
        scores = torch.cat([dual_encoder.scores(asked, opened.model.text_encoding(*one))[0] for one in of_texts])
        return _falling(zip(scores.tolist(), entries, strict=True))
    own: dict[int, float] = {}
    signals = list(_signals(entries, known, opened).items())
    for start in range(0, len(signals), size):
        some = signals[start : start + size]
        batch = _padded([signal for _, signal in some], opened)
        perceived = dual_encoder.scores(opened.model.audio_encoding(*batch), asked)[:, 0]
        own |= dict(zip((number for number, _ in some), perceived.tolist(), strict=True))
    return _falling((own[known.entries.numbers[entry]], entry) for entry in entries)


def _falling(scored: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    return sorted(scored, key=lambda one: -one[0])


def _signals(entries: list[int], known: Snapshot, opened: OpenedRun) -> dict[int, np.ndarray]:
    """:meth:`ask_ray.data.corpus.ClipRows.signal` of the entries' clips, by the clips' numbers.

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
            things = THINGS[opened.modality]
            raise SettingsError(
                f"{corpus.folder} lacks {things} that the knowledge base holds; prepare it as it was, or train anew"
            )
        found |= {places[place]: signal for place, signal in corpus.signals(source.split, places).items()}
    return found


def _padded(signals: Sequence[np.ndarray], opened: OpenedRun) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model takes, cropped as in training."""
    data = opened.settings.data
    limit = longest(data.max_seconds, data.form.sample_rate)
    return pad([crop(signal, limit) for signal in signals])


def _perceived(path: Path, opened: OpenedRun) -> Encoding:
    """An audio file as the model hears it, or a picture as it sees it, a batch of one.

    Raises:
        UnusableClip: if it cannot be decoded or holds nothing to hear or see.
    """
    data = opened.settings.data
    if opened.modality == "audio":
        samples = audio.load(path, data.sample_rate, data.max_seconds).samples  # no more of it is heard
        signal = usable_waveform(samples, data.sample_rate, data.min_seconds)
    else:
        signal = usable_pixels(pictures.load(path, data.image_size).pixels)
    return opened.model.audio_encoding(*_padded([signal], opened))


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
