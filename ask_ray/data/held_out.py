"""What a corpus is evaluated on, and how a clip is recognised as part of it: by id, by source id, by the samples' digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ask_ray.config import SettingsError
from ask_ray.data.corpus import Corpus
from ask_ray.data.schema import BY_DIGEST, BY_ID, BY_SOURCE, HELD_OUT
from ask_ray.modality import Form


class Found(NamedTuple):
    """reason: one of :data:`~ask_ray.data.schema.LEAKS`; where: which clip of which evaluation split it is."""

    reason: str
    where: str


@dataclass(frozen=True)
class HeldOut:
    """Clips of evaluation splits. Each mapping leads to where the clip stands."""

    ids: Mapping[str, str] = field(default_factory=dict)
    source_ids: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, corpora: Iterable[Corpus]) -> HeldOut:
        """The validation and test clips of prepared corpora."""
        made = cls()
        for corpus in corpora:
            for split in HELD_OUT:
                of = corpus.identities(split)
                where = [f"{split} clip {clip!r} of {corpus.folder}" for clip in of.ids]
                found = cls(_first(of.ids, where), _first(of.source_ids, where), _first(of.digests, where))
                made = made.joined(found)
        return made

    @classmethod
    def named(cls, places: Sequence[str], form: Form) -> HeldOut:
        """The same of the corpora that `data.held_out` names.

        Raises:
            SettingsError: as :func:`opened`.
        """
        return cls.of(opened(places, form))

    def joined(self, other: HeldOut) -> HeldOut:
        """Both; where a clip stands in both, the first is told."""
        return HeldOut({**other.ids, **self.ids}, {**other.source_ids, **self.source_ids}, {**other.digests, **self.digests})

    def key(self) -> str:
        """Text that changes whenever a clip joins or leaves."""
        state = hashlib.blake2b(digest_size=16)
        for held in (self.ids, self.source_ids, self.digests):
            state.update(repr(sorted(held)).encode())
        return state.hexdigest()

    def meets(self, digests: Iterable[str]) -> bool:
        """Whether samples with one of these digests are held out."""
        return not self.digests.keys().isdisjoint(digests)

    def find(self, clip: str | None = None, source_id: str | None = None, digest: str | None = None) -> Found | None:
        """Whether a clip is held out, by the first of what is known of it that says so."""
        for reason, name, held in (
            (BY_ID, clip, self.ids), (BY_SOURCE, source_id, self.source_ids), (BY_DIGEST, digest, self.digests)
        ):  # fmt: skip
            if name is not None and name in held:
                return Found(reason, held[name])
        return None


def opened(places: Sequence[str], form: Form) -> list[Corpus]:
    """The corpora that `data.held_out` names.

    Args:
        form: of the corpus that is to be kept free of what they hold out.

    Raises:
        SettingsError: if one is not there, or is kept in another form, or holds out recordings of which this corpus would keep
            more or less, so that digests could not be compared.
    """
    found = []
    for place in places:
        try:
            corpus = Corpus.open(place)
        except SettingsError as error:
            raise SettingsError(f"data.held_out: {error}") from error
        if corpus.form != form:
            raise SettingsError(
                f"data.held_out: {corpus.folder} has {corpus.form}, but this corpus is to have {form} ({form.setting}): "
                "prepare both alike, so that their samples can be compared"
            )
        if corpus.cut_otherwise(HELD_OUT, form):
            raise SettingsError(
                f"data.held_out: {corpus.folder} keeps {corpus.form.seconds:g} s of a recording, but this corpus is to keep "
                f"{form.seconds:g} s (data.keep_seconds), and longer ones are evaluated on: prepare both alike, so that "
                "their samples can be compared"
            )
        found.append(corpus)
    return found


def _first(names: Sequence[str | None], where: Sequence[str]) -> dict[str, str]:
    """Where each name stands first."""
    made: dict[str, str] = {}
    for name, place in zip(names, where, strict=True):
        if name is not None:
            made.setdefault(name, place)
    return made
