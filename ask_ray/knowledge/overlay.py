"""A version with corrections: rows that follow the encoders between refreshes (method: ASK §3.3, and its open question 3).

Two corrections, alone or together: fresh rows overwrite their entries (write-back), and a linear map moves all others
(:mod:`ask_ray.method.drift`). Rows and indexes change together. Every rank applies the same corrections to an overlay of its
own, in the same order, and all stay the same to the bit: nothing here is random. On machines of one kind, only the number of
threads may change the last bits of a matrix product, and with them the inverted list of an entry between two. So ranks use
equally many.

What was overwritten while a newer version was made, that version takes over a few entries a step: to move thousands between
inverted lists takes seconds, and a swap must not.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor

from ask_ray.knowledge import index as indexes
from ask_ray.knowledge.snapshot import Embeddings
from ask_ray.method.drift import apply_map
from ask_ray.method.tensors import check_shape

#: Rows mapped at a time: it bounds the memory that a map takes beside the rows.
BLOCK = 65536

#: What of a checkpoint is still to be taken of an older version.
WAITING = "waiting."

#: What `written` says of an entry that was never overwritten.
NEVER = -1


@dataclass(frozen=True)
class Waiting:
    """Rows of an older version that are fresher than a newer one's, which has still to take them; the freshest first.

    entries: (n,) int64, whose rows they are. places: (n,) int64, where those lie in the other four.
    audio, text: (M, d) float32; since, written: (M,) int64, as of an :class:`Overlay`. They may be an older overlay's own, which
    nobody changes any more: nothing is copied before it is taken.
    """

    entries: np.ndarray
    places: np.ndarray
    audio: Tensor
    text: Tensor
    since: np.ndarray
    written: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)

    def of(self, wanted: slice) -> Waiting:
        """Some of them."""
        return Waiting(self.entries[wanted], self.places[wanted], self.audio, self.text, self.since, self.written)

    def fresher_than(self, step: int) -> int:
        """How many were overwritten after a step: these are the first."""
        return int(np.count_nonzero(self.written[self.places] > step))

    def state(self) -> dict[str, np.ndarray]:
        """As copies, without anything else of the older version."""
        rows = {"audio": self.audio[self.places].numpy(), "text": self.text[self.places].numpy()}
        return {"entries": self.entries.copy(), **rows, "since": self.since[self.places], "written": self.written[self.places]}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Waiting:
        """What :meth:`state` told of."""
        rows = torch.from_numpy(state["audio"]), torch.from_numpy(state["text"])
        return cls(state["entries"], np.arange(len(state["entries"])), *rows, state["since"], state["written"])


class Overlay:
    """What a replica holds of a version while its entries are corrected. On the CPU; one thread at a time may use it.

    audio, text: (N, d) float32 rows; prototypes_audio, prototypes_text: (Nc, d) float32. All change in place.
    audio_index, text_index: FAISS indexes of the rows, which change with them.
    encoder_step: step of the weights that encoded the version.
    since: (N,) int64, the step of the weights that an entry's rows were last fitted to; at first `encoder_step`.
    written: (N,) int64, the step at which fresh rows last overwrote an entry's, -1 for never.
    """

    def __init__(
        self, rows: Embeddings, prototypes: Embeddings, mutable: tuple[faiss.Index, faiss.Index], encoder_step: int
    ) -> None:
        """Take over an opened version.

        Args:
            rows, prototypes: written to where they are writeable, as arrays mapped copy-on-write are, so that only what
                changes takes memory; copied otherwise.
            mutable: the audio and the text index, from :func:`ask_ray.knowledge.index.open_mutable`.
        """
        self.audio, self.text = _tensor(rows.audio), _tensor(rows.text)
        self.prototypes_audio, self.prototypes_text = _tensor(prototypes.audio), _tensor(prototypes.text)
        self.audio_index, self.text_index = mutable
        self.encoder_step = encoder_step
        self.since = np.full(len(self.audio), encoder_step, np.int64)
        self.written = np.full(len(self.audio), NEVER, np.int64)
        self._waiting: Waiting | None = None

    def write(self, entries: Tensor, audio: Tensor, text: Tensor, step: int) -> None:
        """Overwrite entries with rows just encoded.

        Args:
            entries: (n,) int64; of an entry that comes twice, the last rows are kept. n may be 0.
            audio, text: (n, d) unit rows of any floating-point dtype and device; no gradient is kept.
            step: step of the weights that encoded them.

        Raises:
            ValueError: shapes that do not fit, an entry that is not there, or rows that are not finite. Nothing has changed
                then.
        """
        for name, rows in (("audio", audio), ("text", text)):
            check_shape(name, rows, (len(entries), self.audio.shape[1]))
            if not rows.isfinite().all():
                raise ValueError(f"{name} rows must be finite; look for the step at which training diverged")
        every = entries.cpu().numpy()
        unique, place = np.unique(every[::-1], return_index=True)
        last = torch.from_numpy(len(every) - 1 - place)
        self._put(unique, *(rows.detach().cpu().float()[last] for rows in (audio, text)))
        self.since[unique] = step
        self.written[unique] = step

    def apply(self, audio_map: Tensor, text_map: Tensor, step: int, after: int) -> None:
        """Move entries and prototypes by linear maps from stored to fresh rows, and normalise them.

        Entries fitted at step `after` or later stay: they are fresher than what the maps start from. What is still to be taken of
        an older version is taken before, and moved with the others.

        Args:
            audio_map, text_map: (d, d), from :func:`ask_ray.method.drift.drift_map`. Fitted on one rank and sent to all:
                a fit may differ in its last bits from machine to machine.
            step: step of the weights that the maps lead to; what is moved counts as fitted to them.

        Raises:
            ValueError: a map that is not (d, d) or not finite. Nothing has changed then.
        """
        maps = [matrix.detach().cpu().float() for matrix in (audio_map, text_map)]
        for name, matrix in zip(("audio_map", "text_map"), maps, strict=True):
            check_shape(name, matrix, (self.audio.shape[1],) * 2)
            if not matrix.isfinite().all():
                raise ValueError(f"{name} must be finite; look for the step at which training diverged")
        self.catch_up()
        stale = np.flatnonzero(self.since < after)
        self.since[stale] = step
        tables = (self.audio, self.prototypes_audio, self.audio_index), (self.text, self.prototypes_text, self.text_index)
        for (rows, prototypes, index), matrix in zip(tables, maps, strict=True):
            for block in torch.from_numpy(stale).split(BLOCK):
                rows[block] = apply_map(rows[block], matrix)
            prototypes.copy_(apply_map(prototypes, matrix))
            indexes.remap(index, matrix.numpy(), rows.numpy())

    def carry_over(self, older: Overlay) -> int:
        """Begin to take from an older version's overlay the entries overwritten since this version's encoding: they are fresher.

        Nothing is moved yet, so that a swap takes no longer for them: :meth:`catch_up` moves them, some with each step.

        Args:
            older: of the same entries in the same order. Nobody may change it from now on.

        Returns:
            how many entries there are to take.

        Raises:
            ValueError: versions of different sizes.
        """
        if len(older.since) != len(self.since):
            raise ValueError(f"{len(older.since)} and {len(self.since)} entries: versions of one run have the same")
        if older._waiting is not None:
            older.catch_up(older._waiting.fresher_than(self.encoder_step))  # few: it has been in use for longer
        fresher = np.flatnonzero(older.written > self.encoder_step)
        fresher = fresher[np.argsort(-older.written[fresher], kind="stable")]
        if len(fresher):
            self._waiting = Waiting(fresher, fresher, older.audio, older.text, older.since, older.written)
        return len(fresher)

    def catch_up(self, count: int | None = None) -> None:
        """Take up to `count` of the entries that :meth:`carry_over` found, or all; those overwritten here since then stay."""
        if self._waiting is None:
            return
        count = len(self._waiting) if count is None else count
        now, later = self._waiting.of(slice(count)), self._waiting.of(slice(count, None))
        self._waiting = later if len(later) else None  # an empty one would hold the older version's memory
        wanted = self.written[now.entries] == NEVER
        here, there = now.entries[wanted], now.places[wanted]
        self._put(here, now.audio[there], now.text[there])
        self.since[here] = now.since[there]
        self.written[here] = now.written[there]

    @property
    def waiting(self) -> int:
        """How many entries are still to be taken by :meth:`catch_up`."""
        return 0 if self._waiting is None else len(self._waiting)

    def share(self) -> float:
        """The share of entries corrected in any way since the version was opened, in [0, 1]."""
        return float(np.mean((self.written != NEVER) | (self.since > self.encoder_step)))

    def age(self, step: int) -> float:
        """Mean age of the entries at a step, in steps since their rows were last fitted to the encoders."""
        return float(np.mean(step - self.since))

    def age_without(self, step: int) -> float:
        """What :meth:`age` would be without corrections."""
        return float(step - self.encoder_step)

    def state(self) -> dict[str, np.ndarray]:
        """Everything as copies, for a checkpoint: arrays by the attributes' names, indexes as FAISS's bytes (uint8)."""
        rows = {name: getattr(self, name).numpy().copy() for name in ("audio", "text", "prototypes_audio", "prototypes_text")}
        steps = {"since": self.since.copy(), "written": self.written.copy(), "encoder_step": np.array([self.encoder_step])}
        built = {name: faiss.serialize_index(getattr(self, name)) for name in ("audio_index", "text_index")}
        waiting = {f"{WAITING}{name}": value for name, value in self._waiting.state().items()} if self._waiting else {}
        return {**rows, **steps, **built, **waiting}

    @classmethod
    def of(cls, state: dict[str, np.ndarray]) -> Overlay:
        """The overlay that :meth:`state` told of; it goes on to the bit as that one would. Uses the arrays as they are."""
        made = cls(
            Embeddings(state["audio"], state["text"]),
            Embeddings(state["prototypes_audio"], state["prototypes_text"]),
            (faiss.deserialize_index(state["audio_index"]), faiss.deserialize_index(state["text_index"])),
            int(state["encoder_step"][0]),
        )
        made.since, made.written = (np.require(state[name], np.int64, ["C", "W"]) for name in ("since", "written"))
        waiting = {name.removeprefix(WAITING): value for name, value in state.items() if name.startswith(WAITING)}
        made._waiting = Waiting.from_state(waiting) if waiting else None
        return made

    def _put(self, entries: np.ndarray, audio: Tensor, text: Tensor) -> None:
        """Overwrite entries, each named once, in rows and indexes. An entry that is not there is refused by the first index."""
        for index, table, rows in ((self.audio_index, self.audio, audio), (self.text_index, self.text, text)):
            indexes.update(index, entries, rows.numpy())
            table[torch.from_numpy(entries)] = rows


def _tensor(rows: np.ndarray) -> Tensor:
    """The rows as a tensor: the same memory, or a copy of what cannot be written to."""
    return torch.from_numpy(np.require(rows, np.float32, ["C", "W"]))
