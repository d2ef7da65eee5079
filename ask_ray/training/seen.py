"""What the weights of a run have seen, and which clips that are to be evaluated on are among it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ask_ray.config import Settings, UserError
from ask_ray.data.corpus import Corpus
from ask_ray.data.held_out import HeldOut
from ask_ray.knowledge.snapshot import TRAIN
from ask_ray.knowledge.sources import sources_of
from ask_ray.storage import Folder
from ask_ray.training import checkpoint


@dataclass(frozen=True)
class Seen:
    """corpora: what was trained on or stood in the knowledge base, prepared corpora and which split of each; gone: why others
    could not be opened."""

    corpora: tuple[tuple[Corpus, str], ...] = ()
    gone: tuple[str, ...] = ()

    def clips(self, on: Corpus, split: str) -> list[str]:
        """The ids of a split's clips that are among it, by id, source id or digest."""
        if not self.corpora:
            return []
        of = on.identities(split)
        found: set[str] = set()
        for corpus, its_split in self.corpora:
            read = HeldOut(*(dict.fromkeys(filter(None, names), its_split) for names in corpus.identities(its_split)))
            found |= {clip for clip, *more in zip(*of, strict=True) if read.find(clip, *more)}
        return sorted(found)

    def cut_otherwise(self, on: Corpus, split: str) -> list[Corpus]:
        """The corpora that share no digest with a split though they may share a recording: both hold some that are cut at
        another length here than there."""
        return [
            corpus
            for corpus, its_split in self.corpora
            if corpus.cut_otherwise([its_split], on.form) and on.cut_otherwise([split], corpus.form)
        ]


def by_run(settings: Settings, corpus: str) -> Seen:
    """What a run reads. `corpus`: place of the prepared corpus that it trains on."""
    found, gone = [], []
    knowledge = settings.knowledge.sources if settings.ask.enabled else ()
    for source in sources_of(list(dict.fromkeys([TRAIN, *knowledge])), corpus):
        try:
            opened = Corpus.open(source.corpus)
            opened.columns(source.split)  # its clips may be gone though its manifest is there
            found.append((opened, source.split))
        except UserError as error:
            gone.append(str(error))
    return Seen(tuple(found), tuple(gone))


def before_run(settings: Settings, corpus: str) -> Seen:
    """What the weights that a run begins with have seen: what the run that it forks read, the run that this one forked, and so
    on. Without what the run trains on itself, whose splits are kept apart."""
    every = list(_by_forked(settings))
    own, others = Folder.at(corpus).uri, {}
    for read, split in (one for of in every for one in of.corpora):
        if read.folder.uri != own:
            others[read.folder.uri, split] = read, split
    return Seen(tuple(others.values()), tuple(dict.fromkeys(told for of in every for told in of.gone)))


def _by_forked(settings: Settings) -> Iterator[Seen]:
    """What the runs behind a run read, the nearest first. One that is gone ends them: what was behind it is not known."""
    met = set()
    while (fork := settings.run.fork) is not None and fork not in met:
        met.add(fork)
        try:
            settings, place = checkpoint.read_settings(Folder.at(fork))
        except UserError as error:
            yield Seen(gone=(f"run.fork: {error}",))
            return
        yield by_run(settings, place.corpus)
