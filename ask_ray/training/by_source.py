"""What a batch's neighbours are worth, told apart by the source they come from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ask_ray.knowledge.replica import Reading
from ask_ray.method.tensors import check_shape


def source_totals(reading: Reading, sources: int, potential: Tensor) -> Tensor:
    """What :func:`by_source` needs of a batch: sums over its pairs, so that those of several ranks may be added.

    Args:
        reading: single entries that the batch retrieved (the fine reading).
        sources: S, how many sources the knowledge base has.
        potential: (B,) Ψ of the batch's pairs; of their consistency over the global batch.

    Returns:
        (S, 3) float32, detached, a row a source: its neighbours (of both modalities), the sum over pairs of its share in
        their neighbourhoods, and that sum weighted by Ψ.

    Raises:
        ValueError: if `potential` is not of the batch's pairs.
    """
    found = (reading.by_audio, reading.by_text)
    check_shape("potential", potential, (len(found[0].rows),))
    source = torch.cat([reading.sources[near.rows] for near in found], dim=1)
    valid = torch.cat([near.valid for near in found], dim=1)
    each = torch.arange(sources, device=source.device)
    counts = ((source[:, :, None] == each) & valid[:, :, None]).sum(dim=1).float()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.stack([counts.sum(dim=0), shares.sum(dim=0), (potential.detach().float()[:, None] * shares).sum(dim=0)], dim=1)


def by_source(totals: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Metrics of each source, as scalars where `totals` lies; nothing waits for the device.

    Args:
        totals: (S, 3), :func:`source_totals`, added up over ranks.
        names: of the S sources, in the order of :attr:`ask_ray.knowledge.snapshot.Entries.sources`.

    Returns:
        share_NAME: the source's share of all neighbours, NaN if there are none; reliability_NAME: mean Ψ of the pairs, each
        weighted by the source's share in its neighbourhoods, NaN if the source has no neighbour. 1 is the mean of all pairs.
    """
    neighbours, weights, weighted = totals.unbind(dim=1)
    share, reliability = neighbours / neighbours.sum(), weighted / weights
    made = {f"share_{name}": value for name, value in zip(names, share.unbind(), strict=True)}
    return made | {f"reliability_{name}": value for name, value in zip(names, reliability.unbind(), strict=True)}
