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

from ask_ray.config import KnowledgeSettings, SettingsError
from ask_ray.data import held_out as holding
from ask_ray.data.corpus import Corpus, Identities
from ask_ray.data.held_out import HeldOut
from ask_ray.data.schema import HELD_OUT, SPLITS
from ask_ray.knowledge.snapshot import TRAIN
from ask_ray.storage import Folder, masked


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


def check_sources(sources: Sequence[Source], corpus: Corpus, held_out: Sequence[str] = ()) -> Extent:
    """Refuse, before training, sources that could not be encoded or would spoil what is measured.

    Reads the ids, source ids and digests of all clips if there are sources beside the run's own training split.

    Args:
        corpus: the run's.
        held_out: places of other prepared corpora whose evaluation splits the run keeps out of training (`data.held_out`).

    Raises:
        SettingsError: naming `knowledge.sources` and the source: a place without a prepared corpus, another form, no
            training clips, a missing modality, recordings cut at other lengths, so that they could not be recognised, clips that
            are evaluated on here or there (by id, source id or digest), or an id that stands for different recordings; as
            :func:`ask_ray.data.held_out.opened`.
    """
    others = [(source, _opened(source, corpus)) for source in sources if not source.in_domain]
    if not others:
        return Extent(corpus.clips("train"), corpus.clips("train"))
    known = [(corpus, _digests(corpus.identities("train")))]
    elsewhere = holding.opened(held_out, corpus.form)
    evaluated = [corpus, *elsewhere]
    everywhere = HeldOut.of(evaluated)
    for source, opened in others:
        for other, _ in known:
            _refuse_other_cut(source, opened, other, SPLITS)
        for other in elsewhere:
            _refuse_other_cut(source, opened, other, HELD_OUT)
        clips = opened.identities(source.split)
        _refuse_leak(source, clips, evaluated, everywhere)
        digests = _digests(clips)
        for other, there in known:
            _refuse_clash(source, digests, other, there)
        known.append((opened, digests))
    own, *rest = ({*digests} for _, digests in known)
    held = set().union(*rest, own if any(source.in_domain for source in sources) else ())
    return Extent(len(held), len(held & own))


def _digests(clips: Identities) -> dict[str, str]:
    """The digest of each clip's samples, by its id."""
    return dict(zip(clips.ids, clips.digests, strict=True))


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


def _refuse_other_cut(source: Source, opened: Corpus, other: Corpus, splits: Sequence[str]) -> None:
    """Only where both hold such recordings could one of them be the same. `splits`: those of the other corpus that matter."""
    if opened.cut_otherwise([source.split], other.form) and other.cut_otherwise(splits, opened.form):
        raise SettingsError(
            f"knowledge.sources: {opened.folder} keeps {opened.form.seconds:g} s of a recording and {other.folder} "
            f"{other.form.seconds:g} s, and both hold longer ones, which could not be recognised as the same: prepare it with "
            f"--data.keep_seconds {other.form.seconds:g}"
        )


def _refuse_leak(source: Source, clips: Identities, evaluated: Sequence[Corpus], held_out: HeldOut) -> None:
    found = [(clip[0], leak) for clip in zip(*clips, strict=True) if (leak := held_out.find(*clip))]
    if found:
        reasons = Counter(leak.reason for _, leak in found)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        clip, leak = found[0]
        names = ", ".join(str(corpus.folder) for corpus in evaluated if corpus.folder.uri != source.corpus)
        raise SettingsError(
            f"knowledge.sources: {masked(source.corpus)} holds {len(found)} clips that are evaluated on ({counts}), such "
            f"as {clip!r}, which is {leak.where}. They must not be in the knowledge base: prepare it with "
            f"--data.held_out '[{names}]', which leaves them out and lists them"
        )


def _refuse_clash(source: Source, digests: dict[str, str], other: Corpus, there: dict[str, str]) -> None:
    """Compare the samples of all clips that two corpora share, by their digests."""
    shared = [clip for clip in digests if clip in there]
    found = [clip for clip in shared if digests[clip] != there[clip]]
    if found:
        raise SettingsError(
            f"knowledge.sources: clip {found[0]!r} of {masked(source.corpus)} is another recording than the one of that id in "
            f"{other.folder} ({len(found)} of {len(shared)} shared ids clash): an id must mean the same samples everywhere, so "
            "rename the clips of one and prepare it anew"
        )
