"""Retrieval metrics by the field's protocol for several captions a clip.

Text to audio: every caption is a query over N clips. Audio to text: N queries over all captions; R@k and the median rank
go by a clip's best-ranked caption, AP@10 averages over all of them. A tie counts against the system: a rank is one more
than the number of wrong candidates that do not score lower. So NaN, which compares with nothing, ranks last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """One direction's figures: recalls and mAP@10 as shares in [0, 1], the median rank from 1, and the clips N."""

    r1: float
    r5: float
    r10: float
    map10: float
    median_rank: float
    n: int


def text_to_audio(audio: Tensor, text: Tensor, owner: Tensor, chunk: int = 1024) -> Retrieval:
    """Rank all clips for every caption.

    Args:
        audio: (N, d) unit embeddings of the clips.
        text: (M, d) unit embeddings of all captions.
        owner: (M,) int64, the clip that each caption describes.
        chunk: queries scored at once, which bounds memory.
    """
    ranks = [_rank(scores, scores.gather(1, owner[start : start + chunk, None])) for start, scores in _scores(text, audio, chunk)]
    rank = torch.cat(ranks).double()
    return _summary(rank, torch.where(rank <= 10, 1 / rank, 0.0), len(audio))


def audio_to_text(audio: Tensor, text: Tensor, owner: Tensor, chunk: int = 1024) -> Retrieval:
    """Rank all captions for every clip; arguments as for :func:`text_to_audio`."""
    best, precision = [], []
    for start, scores in _scores(audio, text, chunk):
        for row, line in enumerate(scores):
            right = owner == start + row
            ranks = _ranks_of_right(line, right)
            best.append(ranks[0])
            hits = torch.arange(1, len(ranks) + 1, device=ranks.device)
            precision.append(torch.where(ranks <= 10, hits / ranks, 0.0).sum() / min(len(ranks), 10))
    return _summary(torch.stack(best).double(), torch.stack(precision).double(), len(audio))


def _scores(queries: Tensor, candidates: Tensor, chunk: int) -> list[tuple[int, Tensor]]:
    return [(start, queries[start : start + chunk] @ candidates.T) for start in range(0, len(queries), chunk)]


def _rank(scores: Tensor, right: Tensor) -> Tensor:
    """(Q,) ranks of one right candidate each; the candidate itself is the one that is not counted as a tie."""
    return (~(scores < right)).sum(dim=1)


def _ranks_of_right(line: Tensor, right: Tensor) -> Tensor:
    """Ranks of a query's right candidates among all, best first: wrong ones that tie stand before."""
    scores = line[right].sort(descending=True).values
    wrong_before = (~(line[~right][None, :] < scores[:, None])).sum(dim=1)
    return wrong_before + torch.arange(1, len(scores) + 1, device=line.device)


def _summary(rank: Tensor, precision: Tensor, n: int) -> Retrieval:
    r1, r5, r10 = (float((rank <= cutoff).double().mean()) for cutoff in CUTOFFS)
    return Retrieval(r1, r5, r10, map10=float(precision.mean()), median_rank=float(rank.quantile(0.5)), n=n)
