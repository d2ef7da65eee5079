"""Retrieval on a split of a prepared corpus: encode each clip and each caption once, rank both ways."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ask_ray.config import AskSettings, Settings
from ask_ray.data import rarity
from ask_ray.data.batches import longest
from ask_ray.data.corpus import Corpus
from ask_ray.data.rarity import Frequencies
from ask_ray.data.schema import id_number
from ask_ray.knowledge.encoding import batches_of_captions, batches_of_clips
from ask_ray.knowledge.replica import Knowledge
from ask_ray.method import injection, interaction, transport
from ask_ray.method.interaction import Packed
from ask_ray.method.transport import Potentials
from ask_ray.models.dual_encoder import DualEncoder, Encoding
from ask_ray.storage import StorageError
from ask_ray.training import metrics
from ask_ray.training.ask import read_knowledge
from ask_ray.training.gather import gather_objects, world_size
from ask_ray.training.metrics import Ranked

#: Of the bootstrap, which every evaluation draws alike.
RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class EncodedSplit:
    """A split's embeddings, in the order of the corpus.

    ids: N clip ids; captions: M texts; audio: (N, d), text: (M, d) float32; owner: (M,) int64, the clip of each caption;
    tokenwise: (N, M) float32, how clips and captions meet token by token, mapped from a file; None where only embeddings meet.
    """

    ids: list[str]
    captions: list[str]
    audio: Tensor
    text: Tensor
    owner: Tensor
    tokenwise: Tensor | None = None

    def size(self) -> dict[str, int]:
        """`n` clips and `m` captions, which every table states."""
        return {"n": len(self.ids), "m": len(self.captions)}


def encode_split(
    model: DualEncoder, corpus: Corpus, split: str, settings: Settings, device: torch.device, rank: int = 0
) -> EncodedSplit:
    """Encode a split with the model in evaluation mode; with several ranks each encodes its part and all get the whole."""
    training = model.training
    model.eval()
    limit = longest(settings.data.max_seconds, corpus.sample_rate)
    size = settings.knowledge.pool.batch_size
    parts = []
    for unit, group in enumerate(corpus.groups(split)):
        if unit % world_size() == rank:
            rows = corpus.read(group)
            captions = [caption for of_clip in rows.captions for caption in of_clip]
            with torch.inference_mode():
                audio = encoded_rows(model.audio_encoding(*one) for one in batches_of_clips(rows, limit, size, device))
                text = encoded_rows(model.text_encoding(*one) for one in batches_of_captions(model, captions, size, device))
            parts.append((unit, rows.ids, captions, audio, text, [len(of_clip) for of_clip in rows.captions]))
    model.train(training)
    return _joined([part for of_rank in gather_objects(parts) for part in of_rank], device)


def _joined(parts: list[tuple[Any, ...]], device: torch.device) -> EncodedSplit:
    parts.sort(key=lambda part: part[0])
    counts = [count for part in parts for count in part[5]]
    audio, text = (EncodedRows.joined([part[side] for part in parts]) for side in (3, 4))
    return EncodedSplit(
        ids=[one for part in parts for one in part[1]],
        captions=[one for part in parts for one in part[2]],
        audio=audio.vectors.to(device),
        text=text.vectors.to(device),
        owner=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device),
        tokenwise=_tokenwise(audio.tokens, text.tokens, device),
    )


@dataclass(frozen=True)
class EncodedRows:
    """Clips or captions on the CPU: vectors (n, d) float32; tokens: None where only embeddings meet."""

    vectors: Tensor
    tokens: Packed | None

    @classmethod
    def joined(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """The rows of all parts, in their order."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return cls(torch.cat([part.vectors for part in parts]), Packed.joined(tokens) if tokens else None)


def encoded_rows(encodings: Iterable[Encoding]) -> EncodedRows:
    """The rows of all batches, in their order; at least one batch."""
    return EncodedRows.joined(
        [EncodedRows(one.vectors.cpu(), None if one.tokens is None else Packed.of(one.tokens)) for one in encodings]
    )


def _tokenwise(audio: Packed | None, text: Packed | None, device: torch.device) -> Tensor | None:
    """(N, M) float32, written to a temporary file that goes with the tensor: all rankings of a split read these scores.

    Raises:
        StorageError: if they cannot be written there.
    """
    if audio is None or text is None:
        return None
    try:
        with tempfile.TemporaryFile() as file:
            with torch.inference_mode():
                for rows in interaction.score_rows(audio, text, device):
                    file.write(rows.numpy().tobytes())
            file.flush()
            return torch.from_numpy(np.memmap(file, np.float32, "c", shape=(len(audio), len(text))))
    except OSError as error:
        raise StorageError(
            f"the scores of {len(audio)} clips with {len(text)} captions take {4 * len(audio) * len(text):,} bytes, which "
            f"{tempfile.tempdir or 'the folder for temporary files'} does not take: {error}; make room there, or set TMPDIR to a "
            "folder with more"
        ) from error


def ranked(encoded: EncodedSplit, of_clips: Tensor | None = None, of_captions: Tensor | None = None) -> dict[str, Ranked]:
    """`t2a` and `a2t`, query by query, by the model's scores plus what a clip (N,) or a caption (M,) is given."""
    arguments = (encoded.audio, encoded.text, encoded.owner)
    return {
        "t2a": metrics.text_to_audio(*arguments, bias=of_clips, tokenwise=encoded.tokenwise),
        "a2t": metrics.audio_to_text(*arguments, bias=of_captions, tokenwise=encoded.tokenwise),
    }


def ranked_by_plan(encoded: EncodedSplit, epsilon: float) -> tuple[dict[str, Ranked], Potentials]:
    """Ranked by the entropic transport plan between all clips and all captions of the split, of uniform shares.

    Transductive: how a query ranks depends on the other queries, so these figures are not comparable with those by cosine
    (m-LTM, arXiv 2405.10084). Along a query, the plan S / ε + f + g ranks as S plus ε times the candidates' potential.
    """
    found = transport.potentials(encoded.audio, encoded.text, epsilon, tokenwise=encoded.tokenwise)
    return ranked(encoded, *((epsilon * side).float() for side in (found.rows, found.columns))), found


def told(
    encoded: EncodedSplit, ways: dict[str, Ranked], resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, dict[str, Any]]:
    """As :func:`both_ways`, of rankings that are made, with the number of `queries` and the 95 % `intervals` of the figures."""
    return {
        way: {**one.figures(), **encoded.size(), "queries": len(one), "intervals": one.intervals(resamples, seed)}
        for way, one in ways.items()
    }


def by_rarity(encoded: EncodedSplit, ways: dict[str, Ranked], frequencies: Frequencies) -> list[dict[str, Any]]:
    """:func:`told` of the clips of each bucket of :mod:`ask_ray.data.rarity` that has any, rarest first.

    A bucket's clips, and their captions, are the queries; the candidates are those of the whole split, so R@1 tells what is
    found among all. Each with the `bucket`'s name, its `clips`, `t2a` and `a2t`.
    """
    owner = encoded.owner.cpu().numpy()
    captions: list[list[str]] = [[] for _ in encoded.ids]
    for clip, caption in zip(owner, encoded.captions, strict=True):
        captions[clip].append(caption)
    held = np.array([rarity.bucket(frequencies.clip(of_clip)) for of_clip in captions])
    rows = []
    for number, name in enumerate(rarity.BUCKETS):
        clips = held == number
        if clips.any():
            some = {"t2a": ways["t2a"].of(clips[owner]), "a2t": ways["a2t"].of(clips)}
            rows.append({"bucket": name, "clips": int(clips.sum()), **told(encoded, some)})
    return rows


def both_ways(encoded: EncodedSplit) -> dict[str, dict[str, float]]:
    """`t2a` and `a2t` figures of a split, each with the numbers of clips `n` and of captions `m`."""
    return {way: {**one.figures(), **encoded.size()} for way, one in ranked(encoded).items()}


def flat_figures(ways: dict[str, dict[str, float]]) -> dict[str, float]:
    """What :func:`both_ways` gives as an event's keys: `t2a_r1`, …, `a2t_m`, and `mean_r1`, the mean of both R@1."""
    named = {f"{way}_{name}": value for way, of in ways.items() for name, value in of.items()}
    return named | {"mean_r1": (named["t2a_r1"] + named["a2t_r1"]) / 2}


def injected(encoded: EncodedSplit, knowledge: Knowledge, ask: AskSettings) -> EncodedSplit:
    """The split with knowledge mixed into every clip and every caption, as in training.

    A clip has no caption of its own at query time and the reverse, so neighbours are weighed by their own modality alone. What
    is asked about together is no batch: of `ask.exclude` batch, a query's own clip is left. How tokens meet stays as it is.
    """
    alone = ask.model_copy(update={"reliability": "off", "exclude": "none" if ask.exclude == "none" else "self"})
    owner = encoded.owner.cpu()
    numbers = torch.tensor([id_number(one) for one in encoded.ids], dtype=torch.int64)
    audio = [_inject(rows, ids, knowledge, alone)[0] for rows, ids in _chunked(encoded.audio, numbers)]
    text = [_inject(rows, ids, knowledge, alone)[1] for rows, ids in _chunked(encoded.text, numbers[owner])]
    return replace(encoded, audio=torch.cat(audio), text=torch.cat(text))


def _chunked(rows: Tensor, ids: Tensor, size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(rows.split(size), ids.split(size), strict=True)


def _inject(rows: Tensor, ids: Tensor, knowledge: Knowledge, ask: AskSettings) -> tuple[Tensor, Tensor]:
    """The rows injected as audio and as text."""
    reads = read_knowledge(rows, rows, knowledge.read(rows, rows, ids, ids, ask), ask)
    return injection.inject(rows, reads.audio, ask.rho), injection.inject(rows, reads.text, ask.rho)
