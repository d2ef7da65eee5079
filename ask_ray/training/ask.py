"""One step of ASK: from two batches of embeddings and what the knowledge base answers to the loss.

This is where the formulas of :mod:`ask_ray.method` meet: read and inject (§4.2), weigh by reliability (§4.3), realign by
optimal transport (§4.5), and add out-of-batch negatives. Every part has its switch; with all of them off, what is left
is plain NT-Xent (Eq. 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ask_ray.config import AskSettings
from ask_ray.knowledge.replica import Neighbourhood, Reading
from ask_ray.method import drift, influence, injection, interaction, negatives, objective, reliability, transport
from ask_ray.method.interaction import Tokens
from ask_ray.training.gather import gather, gather_tokens, rank, world_size

#: Out-of-batch similarities of audio and of text queries, (global B, M) each, or None.
Extra = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Step:
    """A step's loss, over the global batch, and what is told of it.

    loss: scalar with gradient; audio_to_text, text_to_audio: means of both directions before Ψ; consistency: (global B,)
    c_i, or None without knowledge; audio, text: (global B, d) detached embeddings before injection.
    """

    loss: Tensor
    audio_to_text: Tensor
    text_to_audio: Tensor
    consistency: Tensor | None
    audio: Tensor
    text: Tensor


@dataclass(frozen=True)
class Reads:
    """The knowledge of a local batch.

    audio, text: (B, d), ū_i and v̄_i; consistency: (B,), c_i.
    """

    audio: Tensor
    text: Tensor
    consistency: Tensor


def read_knowledge(u: Tensor, v: Tensor, readings: dict[str, Reading], ask: AskSettings) -> Reads:
    """Weigh and average the neighbours of a batch over all granularities (ASK §4.2, §4.3).

    Args:
        u, v: (B, d) audio and text embeddings; gradient passes through the neighbours' weights.
        readings: what the knowledge base answered.
    """
    parts = [_read_one(u, v, reading, ask) for reading in readings.values()]
    audio, audio_by_text, text, text_by_audio = (injection.combine(*part) for part in zip(*parts, strict=True))
    return Reads(audio, text, reliability.consistency(audio, audio_by_text, text, text_by_audio))


def _read_one(u: Tensor, v: Tensor, reading: Reading, ask: AskSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g(û, N^a), g(û, N^t), g(v̂, N^t), g(v̂, N^a) of one granularity."""
    by_audio = _weights(u, v, reading.audio, reading.text, reading.by_audio, ask)
    by_text = _weights(v, u, reading.text, reading.audio, reading.by_text, ask)
    return (
        injection.read(reading.audio[reading.by_audio.rows], by_audio),
        injection.read(reading.audio[reading.by_text.rows], by_text),
        injection.read(reading.text[reading.by_text.rows], by_text),
        injection.read(reading.text[reading.by_audio.rows], by_audio),
    )


def _weights(own: Tensor, other: Tensor, table: Tensor, cross: Tensor, found: Neighbourhood, ask: AskSettings) -> Tensor:
    """α of a neighbourhood; the neighbour-level variant of §4.3 also asks the pair's other modality."""
    similarity = _similarities(own, table, found).masked_fill(~found.valid, -torch.inf)
    if ask.reliability in ("neighbour", "both"):
        return injection.agreement_weights(similarity, _similarities(other, cross, found), ask.tau_knowledge)
    return injection.neighbour_weights(similarity, ask.tau_knowledge)


def _similarities(own: Tensor, table: Tensor, found: Neighbourhood) -> Tensor:
    return torch.einsum("bd,bkd->bk", own, table[found.rows])


@dataclass
class Queue:
    """A cross-batch memory (XBM): the newest pairs of earlier steps, detached, as negatives.

    audio, text: (M, d); ids: (M,) int64 clip numbers.
    """

    size: int
    audio: Tensor | None = None
    text: Tensor | None = None
    ids: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """What it holds, by the names that :meth:`push` takes; empty if nothing."""
        held = {"audio": self.audio, "text": self.text, "ids": self.ids}
        return {name: value for name, value in held.items() if value is not None}

    def push(self, audio: Tensor, text: Tensor, ids: Tensor) -> None:
        """Add a step's global batch; the oldest pairs leave."""
        held = (self.audio, self.text, self.ids)
        self.audio, self.text, self.ids = (
            (new if old is None else torch.cat([old, new]))[-self.size :]
            for old, new in zip(held, (audio, text, ids), strict=True)
        )


def step(
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    ids: Tensor,
    readings: dict[str, Reading],
    queue: Queue | None,
    ask: AskSettings,
    tokens: tuple[Tokens, Tokens] | None = None,
) -> Step:
    """The loss of a global batch, the same on every rank.

    Args:
        u, v: (B, d) float32 unit embeddings of the local batch, with gradient.
        scale: scalar 1 / τ.
        ids: (global B,) int64 clip numbers.
        readings: the knowledge base's answers to the local batch; empty before it is in use. Transport needs none.
        queue: the cross-batch memory, if it is in use.
        tokens: of the local batch's clips and captions, with gradient, if they interact.
    """
    audio, text, consistency = u, v, None
    extra: Extra = (None, None)
    if readings:
        reads = read_knowledge(u, v, readings, ask)
        audio, text = injection.inject(u, reads.audio, ask.rho), injection.inject(v, reads.text, ask.rho)
        consistency = gather(reads.consistency.detach())
        extra = _knowledge_negatives(u, v, ids.chunk(world_size())[rank()], readings, ask)
    audio, text = gather(audio), gather(text)
    if queue is not None and queue.ids is not None:
        extra = _queue_negatives(audio, text, ids, queue)
    similarity = objective.similarity(audio, text)
    if tokens is not None:
        similarity = interaction.combined(similarity, _tokenwise(*tokens))
    loss = _objective(similarity, scale, consistency, extra, ask)
    means = loss.audio_to_text.detach().mean(), loss.text_to_audio.detach().mean()
    return Step(loss.loss, *means, consistency, gather(u.detach()), gather(v.detach()))


def _tokenwise(frames: Tokens, words: Tokens) -> Tensor:
    """(global B, global B): how clips and captions meet token by token. Each rank computes its own clips' rows."""
    return gather(interaction.token_scores(frames, gather_tokens(words)))


def _knowledge_negatives(u: Tensor, v: Tensor, own: Tensor, readings: dict[str, Reading], ask: AskSettings) -> Extra:
    """Similarities of each pair's own embeddings to its neighbours' other-modality rows, gathered: (global B, K) each. `own`:
    (B,) int64 clip numbers of the local batch.

    Own, not injected: injection mixes those very neighbours in, and the two terms would pull against each other. A pair's own
    clip may be its neighbour (`ask.exclude` none), but never its negative.
    """
    if ask.negatives != "knowledge":
        return None, None
    fine = readings["fine"]
    others = [found.valid & (fine.numbers[found.rows] != own[:, None]) for found in (fine.by_audio, fine.by_text)]
    by_audio = negatives.knowledge_negatives(u, fine.text[fine.by_audio.rows], others[0])
    by_text = negatives.knowledge_negatives(v, fine.audio[fine.by_text.rows], others[1])
    return gather(by_audio), gather(by_text)


def _queue_negatives(audio: Tensor, text: Tensor, ids: Tensor, queue: Queue) -> Extra:
    assert queue.audio is not None
    assert queue.text is not None
    assert queue.ids is not None
    return (
        negatives.queue_negatives(audio, queue.text, ids, queue.ids),
        negatives.queue_negatives(text, queue.audio, ids, queue.ids),
    )


def _objective(
    similarity: Tensor, scale: Tensor, consistency: Tensor | None, extra: Extra, ask: AskSettings
) -> objective.ContrastiveLoss:
    targets_audio = targets_text = potential = None
    if ask.enabled and ask.beta > 0:
        plan = transport.transport_plan(similarity, ask.epsilon)
        if ask.transport == "targets":
            targets_audio = transport.soft_targets(plan, ask.beta)
            targets_text = targets_audio.mT
        else:
            similarity = transport.realigned_logits(similarity, plan, ask.beta)
    if consistency is not None and ask.reliability in ("pair", "both"):
        potential = reliability.potential(consistency, ask.tau_reliability)
    return objective.contrastive_loss(similarity, scale, targets_audio, targets_text, potential, *extra)


def batch_drift(fresh: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """The drift reading that costs nothing (ASK §3.3): the batch's fresh rows against the same pairs' stored rows.

    Args:
        fresh, stored: (n, d) embeddings of the same pairs.

    Returns:
        RDM, a scalar; NaN if fewer than two pairs are stored.
    """
    if len(fresh) < 2:
        return torch.tensor(torch.nan, device=fresh.device)
    return drift.rdm(fresh, fresh, stored, temperature)


def watched(readings: dict[str, Reading], ids: Tensor) -> tuple[dict[str, Reading], list[Tensor]]:
    """Readings through whose out-of-batch rows gradient flows, and the (U, d) leaves that receive it.

    Args:
        ids: (global B,) int64 clip numbers of the batch: entries of its own clips are no out-of-batch knowledge.
    """
    made, leaves = {}, []
    for name, reading in readings.items():
        outside = ~torch.isin(reading.numbers, ids)[:, None]
        tables = [table.detach().clone().requires_grad_() for table in (reading.audio, reading.text)]
        through = [torch.where(outside, table, table.detach()) for table in tables]
        made[name] = replace(reading, audio=through[0], text=through[1])
        leaves += tables
    return made, leaves


def measured_influence(loss: Tensor, leaves: list[Tensor]) -> Tensor:
    """Out-of-Batch Influence (ASK §4.2) of :func:`watched` rows on a global loss, summed over ranks. Call on every rank."""
    return gather(influence.out_of_batch_influence(loss, *leaves)[None]).sum() / world_size()
