"""What a knowledge base is made from: the run's own training split and other prepared corpora, checked before training.

Other corpora are out-of-domain (other recordings), or enriched (the run's recordings with more captions). A clip's id means
the same recording wherever it stands: a pair that may not retrieve its own clip may not retrieve it from any source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from ask_ray.config import KnowledgeSettings, SettingsError
from ask_ray.data.corpus import Corpus
from ask_ray.data.held_out import HeldOut
from ask_ray.data.schema import SPLITS
from ask_ray.knowledge.snapshot import TRAIN
from ask_ray.storage import Folder, masked

#: Clips that two corpora share of which the samples are compared.
COMPARED = 64


@dataclass(frozen=True)
class Source:
    """A part of a knowledge base. name: of its entries; corpus: place of the prepared corpus; split: which of its clips."""

    name: str
    corpus: str
    split: str

    @property
    def in_domain(self) -> bool:
        """Whether it is the run's own training split."""
        return self.name == TRAIN


@dataclass(frozen=True)
class Extent:
    """How much the sources hold together. clips: different recordings; own: those of them that the run trains on."""

    clips: int
    own: int


def sources_of(wanted: Sequence[str], corpus: str) -> tuple[Source, ...]:
    """The sources that `knowledge.sources` names, in its order, each with a name of its own.

    Args:
        wanted: `train`, or places of prepared corpora.
        corpus: place of the run's corpus.

    Raises:
        SettingsError: if two of them are the same corpus, or one is the run's.
    """
    made: list[Source] = []
    for one in wanted:
        place = Folder.at(corpus if one == TRAIN else one).uri
        if one != TRAIN and place == Folder.at(corpus).uri:
            raise SettingsError(f"knowledge.sources: {masked(place)} is the run's own corpus: write {TRAIN}")
        if place in [source.corpus for source in made]:
            raise SettingsError(f"knowledge.sources: {masked(place)} is named twice: name each corpus once")
        name = TRAIN if one == TRAIN else _name(place, {TRAIN, *(source.name for source in made)})
        made.append(Source(name, place, "train"))
    return tuple(made)


def entries_of(knowledge: KnowledgeSettings, corpus: str) -> int:
    """N, how many entries the sources make at most.

    Args:
        corpus: place of the run's corpus.

    Raises:
        SettingsError: as :func:`sources_of`, or if a source holds no finished corpus.
    """
    every = sources_of(knowledge.sources, corpus)
    return sum(Corpus.open(source.corpus).entries(source.split, knowledge.captions_per_clip) for source in every)


def _name(place: str, taken: set[str]) -> str:
    """The folder's name in letters that names of metrics allow, and none that is taken."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", Folder(place).name)
    names: Iterator[str] = (plain if number == 1 else f"{plain}-{number}" for number in count(1))
    return next(name for name in names if name not in taken)


def check_sources(sources: Sequence[Source], corpus: Corpus) -> Extent:
    """Refuse, before training, sources that could not be encoded or would spoil what is measured.

    Reads the ids, source ids and digests of all clips if there are sources beside the run's own training split, and the samples
    of some of those that several corpora share.

    Args:
        corpus: the run's.

    Raises:
        SettingsError: naming `knowledge.sources` and the source: a place without a prepared corpus, another form, no
            training clips, a missing modality, recordings cut at other lengths, so that they could not be recognised, clips that
            the run holds out (by id, source id or digest), or an id that stands for different recordings.
    """
    others = [(source, _opened(source, corpus)) for source in sources if not source.in_domain]
    if not others:
        return Extent(corpus.clips("train"), corpus.clips("train"))
    known = [(corpus, _places(corpus, "train"))]
    held_out = HeldOut.of([corpus])
    for source, opened in others:
        for other, _ in known:
            _refuse_other_cut(source, opened, other)
        _refuse_leak(source, opened, corpus, held_out)
        places = _places(opened, source.split)
        for other, there in known:
            _refuse_clash(source, opened, places, other, there)
        known.append((opened, places))
    own, *rest = ({*places} for _, places in known)
    held = set().union(*rest, own if any(source.in_domain for source in sources) else ())
    return Extent(len(held), len(held & own))


def _places(corpus: Corpus, split: str) -> dict[str, int]:
    """The place of each clip in the order of the corpus."""
    return {clip: place for place, clip in enumerate(corpus.ids(split))}


def _opened(source: Source, corpus: Corpus) -> Corpus:
    """A source's corpus, if it can be encoded with the run's model."""
    try:
        opened = Corpus.open(source.corpus)
    except (SettingsError, OSError) as error:
        raise SettingsError(f"knowledge.sources: {error}") from error
    if opened.form != corpus.form:
        raise SettingsError(
            f"knowledge.sources: {opened.folder} has {opened.form}, the run's corpus {corpus.form}: prepare it with "
            f"--{corpus.form.setting}"
        )
    if opened.clips(source.split) == 0:
        raise SettingsError(f"knowledge.sources: {opened.folder} has no clips in its {source.split} split to be read")
    lacking = [column for column in (corpus.kept.samples, "captions") if column not in opened.columns(source.split)]
    if lacking:
        raise SettingsError(
            f"knowledge.sources: {opened.folder} lacks {' and '.join(lacking)}: an entry is a recording with a caption, so give "
            "a corpus with both"
        )
    return opened


def _refuse_other_cut(source: Source, opened: Corpus, other: Corpus) -> None:
    """Only where both hold such recordings could one of them be the same."""
    if opened.cut_otherwise([source.split], other.form) and other.cut_otherwise(SPLITS, opened.form):
        raise SettingsError(
            f"knowledge.sources: {opened.folder} keeps {opened.form.seconds:g} s of a recording and {other.folder} "
            f"{other.form.seconds:g} s, and both hold longer ones, which could not be recognised as the same: prepare it with "
            f"--data.keep_seconds {other.form.seconds:g}"
        )


def _refuse_leak(source: Source, opened: Corpus, corpus: Corpus, held_out: HeldOut) -> None:
    clips = zip(*opened.identities(source.split), strict=True)
    found = [(clip[0], leak) for clip in clips if (leak := held_out.find(*clip))]
    if found:
        reasons = Counter(leak.reason for _, leak in found)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        clip, leak = found[0]
        raise SettingsError(
            f"knowledge.sources: {masked(source.corpus)} holds {len(found)} clips that the run is evaluated on ({counts}), such "
            f"as {clip!r}, which is {leak.where}. They must not be in the knowledge base: prepare it with "
            f"--data.held_out '[{corpus.folder}]', which leaves them out and lists them"
        )


def _refuse_clash(source: Source, opened: Corpus, places: dict[str, int], other: Corpus, there: dict[str, int]) -> None:
    """Compare samples of clips with the same id, evenly spread over those that two corpora share."""
    shared = [clip for clip in places if clip in there]
    if not shared:
        return
    spread = np.linspace(0, len(shared) - 1, min(COMPARED, len(shared))).round().astype(int)
    chosen = [shared[place] for place in spread]
    ours = opened.signals(source.split, [places[clip] for clip in chosen])
    theirs = other.signals("train", [there[clip] for clip in chosen])
    for clip in chosen:
        if not np.array_equal(ours[places[clip]], theirs[there[clip]]):
            raise SettingsError(
                f"knowledge.sources: clip {clip!r} of {masked(source.corpus)} is another recording than the one of that id in "
                f"{other.folder}: an id must mean the same samples everywhere, so rename the clips of one and prepare it anew"
            )
