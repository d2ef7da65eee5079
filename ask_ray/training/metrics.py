"""Retrieval metrics by the field's protocol for several captions a clip.

Text to audio: every caption is a query over N clips. Audio to text: N queries over all M captions; R@k and the mean and
median ranks go by a clip's best-ranked caption, AP@10 averages over all of them. A tie counts against the system: a rank is
one more than the number of wrong candidates that do not score lower. So NaN, which compares with nothing, ranks last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ask_ray.method import interaction

#: The figures of a direction, in the order of the field's tables.
FIGURES = ("r1", "r5", "r10", "map10", "median_rank", "mean_rank")
CUTOFFS = (1, 5, 10)

#: Scores that are held at once, unless told otherwise: 8 MiB of float32, whatever the numbers of clips and captions.
CELLS = 1 << 21

#: Bounds of an interval that leaves out 5 %.
BOUNDS = (0.025, 0.975)


@dataclass(frozen=True)
class Ranked:
    """One direction, query by query.

    rank: (Q,) int64 from 1, of the best-ranked right candidate; precision: (Q,) float64, AP@10 over all right candidates;
    clip: (Q,) int64, the clip that each query is, or is a caption of.
    """

    rank: np.ndarray
    precision: np.ndarray
    clip: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)

    def of(self, queries: np.ndarray) -> Ranked:
        """Some of the queries: (Q,) bool, or their places."""
        return Ranked(self.rank[queries], self.precision[queries], self.clip[queries])

    def figures(self) -> dict[str, float]:
        """:data:`FIGURES` by name: recalls and mAP@10 as shares in [0, 1], the median and mean rank from 1."""
        recalls = [float((self.rank <= cutoff).mean()) for cutoff in CUTOFFS]
        others = (self.precision.mean(), np.median(self.rank), self.rank.mean())
        return dict(zip(FIGURES, (*recalls, *map(float, others)), strict=True))

    def intervals(self, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % intervals of :meth:`figures` by the percentile bootstrap over clips.

        Each resample draws as many clips as there are, with replacement, each with all of its queries: captions of one clip
        succeed and fail together. Queries with the same rank and precision are the same to every figure, and are counted as one
        kind.
        """
        (rank, precision), kind = np.unique(np.stack([self.rank, self.precision]), axis=1, return_inverse=True)
        clip = np.unique(self.clip, return_inverse=True)[1]
        by_kind, clips = np.lexsort((clip, kind)), int(clip.max()) + 1
        first = np.searchsorted(kind[by_kind], np.arange(len(rank)))
        rng, each = np.random.default_rng(seed), max(1, CELLS // len(self))
        parts = []
        for start in range(0, resamples, each):
            drawn = rng.multinomial(clips, np.full(clips, 1 / clips), size=min(each, resamples - start))
            parts.append(_figures_of_draws(np.add.reduceat(drawn[:, clip[by_kind]], first, axis=1), rank, precision))
        low, high = np.quantile(np.concatenate(parts), BOUNDS, axis=0)
        return {name: (float(low[n]), float(high[n])) for n, name in enumerate(FIGURES)}


def text_to_audio(
    audio: Tensor,
    text: Tensor,
    owner: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tokenwise: Tensor | None = None,
) -> Ranked:
    """Rank all clips for every caption.

    Args:
        audio: (N, d) unit embeddings of the clips.
        text: (M, d) unit embeddings of all captions.
        owner: (M,) int64, the clip that each caption describes.
        bias: (N,), added to every clip's scores; unset: none, so the cosine ranks.
        chunk: queries scored at once; unset: as :data:`CELLS` allows. Memory depends on it, ranks do not.
        tokenwise: (N, M) scores of :func:`ask_ray.method.interaction.token_scores`, on any device; then what ranks is
            :func:`ask_ray.method.interaction.combined`.
    """
    found = rank_of_right(text, audio, owner, bias, chunk, None if tokenwise is None else tokenwise.T)
    return replace(found, clip=owner.cpu().numpy())


def rank_of_right(
    queries: Tensor,
    candidates: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tokenwise: Tensor | None = None,
) -> Ranked:
    """Rank candidates (C, d) for queries (Q, d) that have one right candidate each: right (Q,) int64; tokenwise: (Q, C). Others
    as for :func:`text_to_audio`. Each query counts as a clip."""
    rank = np.empty(len(queries), np.int64)  # made at once: small results kept between large ones would tear the heap
    for mine, scores in _scores(queries, candidates, bias, chunk, tokenwise):
        # The right candidate itself is counted for the one that every rank begins with.
        rank[mine] = _not_lower(scores, scores.gather(1, right[mine, None])).cpu()
    return Ranked(rank, np.where(rank <= 10, 1 / rank, 0.0), np.arange(len(rank)))


def audio_to_text(
    audio: Tensor,
    text: Tensor,
    owner: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    tokenwise: Tensor | None = None,
) -> Ranked:
    """Rank all captions for every clip; arguments as for :func:`text_to_audio`, bias: (M,).

    Raises:
        ValueError: if a clip has no caption.
    """
    counts = torch.bincount(owner, minlength=len(audio))
    if int(counts.min()) == 0:
        raise ValueError(f"clip {int(counts.argmin())} has no caption to be found")
    by_clip, first = owner.argsort(stable=True), counts.cumsum(0) - counts
    most = torch.arange(int(counts.max()), device=owner.device)
    best, precision = np.empty(len(audio), np.int64), np.empty(len(audio), np.float64)
    for mine, scores in _scores(audio, text, bias, chunk, tokenwise):
        there = most < counts[mine, None]
        columns = by_clip[torch.where(there, first[mine, None] + most, first[mine, None])]
        ranks = _ranks_of_right(scores, scores.gather(1, columns), there)
        best[mine] = ranks[:, 0].cpu()
        precision[mine] = _average_precision(ranks, counts[mine]).cpu()
    return Ranked(best, precision, np.arange(len(best)))


def _scores(
    queries: Tensor, candidates: Tensor, bias: Tensor | None, chunk: int | None, tokenwise: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Some queries at a time, and their (q, C) scores."""
    size = chunk or max(1, CELLS // len(candidates))
    for start in range(0, len(queries), size):
        mine = slice(start, start + size)
        scores = queries[mine] @ candidates.T
        if tokenwise is not None:
            scores = interaction.combined(scores, tokenwise[mine].to(scores.device))
        yield mine, scores if bias is None else scores + bias


def _not_lower(scores: Tensor, than: Tensor) -> Tensor:
    """(q,): how many of each row's scores (q, C) are not lower than (q, 1)."""
    return scores.shape[1] - (scores < than).sum(dim=1, dtype=torch.int32)  # more than twice as fast as int64


def _ranks_of_right(scores: Tensor, right: Tensor, there: Tensor) -> Tensor:
    """(q, at most 10) ranks of each query's best right candidates among all, best first: wrong ones that tie stand before.

    Args:
        scores: (q, C).
        right: (q, K) the right candidates' scores, where there (q, K) is true; other places are padding.
    """
    best = right.nan_to_num(nan=-torch.inf).masked_fill(~there, -torch.inf).sort(dim=1, descending=True).values[:, :10]
    ranks = []
    for place, score in enumerate(best.split(1, dim=1)):
        right_before = (there & ~(right < score)).sum(dim=1)
        ranks.append(_not_lower(scores, score) - right_before + place + 1)
    return torch.stack(ranks, dim=1)


def _average_precision(ranks: Tensor, counts: Tensor) -> Tensor:
    """(q,) float64 AP@10 from the ranks of :func:`_ranks_of_right` and how many right candidates (q,) there are."""
    hits = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    found = (ranks <= 10) & (hits <= counts[:, None])
    return torch.where(found, hits / ranks.double(), 0.0).sum(dim=1) / counts.clamp(max=10)


def _figures_of_draws(drawn: np.ndarray, rank: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """(resamples, 6): :data:`FIGURES` of resamples.

    Args:
        drawn: (resamples, kinds), how often each kind of query is in a resample.
        rank: (kinds,) ascending.
        precision: (kinds,).
    """
    values = np.stack([*(rank <= cutoff for cutoff in CUTOFFS), precision, rank], axis=1)
    upto = drawn.cumsum(axis=1)
    queries = upto[:, -1:]
    *recalls, map10, mean = (drawn @ values / queries).T
    middle = [rank[(upto < place).sum(axis=1)] for place in ((queries + 1) // 2, queries // 2 + 1)]
    return np.stack([*recalls, map10, np.mean(middle, axis=0), mean], axis=1)
