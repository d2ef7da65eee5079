"""FAISS: choosing, building, keeping and searching an index by inner product, with ids that a query may not retrieve."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

#: Training points per inverted list: FAISS warns below 39 and gains nothing above 256.
POINTS_PER_LIST = 64
#: Bytes that an index sets aside on a GPU to search in. By default FAISS takes 1.5 GiB each, and while a version is swapped in
#: there are four indexes.
SEARCH_ROOM = 256 * 2**20


class Neighbours(NamedTuple):
    """What a search found: `similarity` (Q, K) float32, -inf where missing; `entry` (Q, K) int64, -1 where missing."""

    similarity: np.ndarray
    entry: np.ndarray


def build(vectors: np.ndarray, exact_below: int, probes: int, seed: int) -> faiss.Index:
    """An inner-product index over (N, d) float32 rows: exact below `exact_below` rows, inverted lists with 16-bit floats above.

    The number of lists is a power of two near 4 sqrt(N): FAISS's own guideline.
    """
    count, dim = vectors.shape
    if count < exact_below:
        index: Any = faiss.IndexFlatIP(dim)
    else:
        lists = min(2 ** round(np.log2(4 * np.sqrt(count))), max(1, count // 39))
        index = faiss.index_factory(dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed + 1
        index.cp.spherical = True
        index.nprobe = min(probes, lists)
        index.train(_sample(vectors, lists * POINTS_PER_LIST, seed))
    index.add(vectors)
    return index


def prototypes(audio: np.ndarray, text: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Paired prototypes by spherical k-means on the concatenated rows (method: ASK §4.2).

    Args:
        audio, text: (N, d) float32 rows of unit length; row n of both is one pair.
        count: Nc; at most N are made.

    Returns:
        (Nc, d) float32 means of each cluster's audio and text rows, normalised. A cluster that k-means left empty has
        no mean and is left out.
    """
    count = min(count, len(audio))
    if count == 0:
        return np.zeros((0, audio.shape[1]), np.float32), np.zeros((0, audio.shape[1]), np.float32)
    pairs = np.asarray(np.concatenate([audio, text], axis=1) / np.sqrt(2), np.float32)
    means = faiss.Kmeans(pairs.shape[1], count, niter=20, spherical=True, seed=seed + 1, min_points_per_centroid=1)
    means.train(_sample(pairs, count * 256, seed))
    cluster = means.index.search(pairs, 1)[1][:, 0]
    filled = np.unique(cluster)
    return _means(audio, cluster, filled), _means(text, cluster, filled)


def _means(rows: np.ndarray, cluster: np.ndarray, filled: np.ndarray) -> np.ndarray:
    order = np.argsort(cluster, kind="stable")
    starts = np.searchsorted(cluster[order], filled)
    sums = np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12), np.float32)


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(rows) <= most:
        return np.ascontiguousarray(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), most, replace=False)
    return np.ascontiguousarray(rows[np.sort(chosen)])


def save(index: faiss.Index, path: Path) -> None:
    """Write an index to a local file."""
    faiss.write_index(index, str(path))


def open_mapped(path: Path) -> faiss.Index:
    """Open an index from a local file, memory-mapped."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)


def on_gpu(index: faiss.Index, device: int) -> faiss.Index:
    """An index from :func:`open_mapped` on GPU `device` if FAISS sees it, else as it is.

    Raises:
        RuntimeError: FAISS's, where the GPU has no room for it.
    """
    if faiss.get_num_gpus() > device:
        room = faiss.StandardGpuResources()  # one for each index: two threads must not search with the same
        room.setTempMemory(SEARCH_ROOM)
        return faiss.index_cpu_to_gpu(room, device, index)
    return index


def open_mutable(path: Path) -> faiss.Index:
    """Open an index from a local file in memory of its own, on the CPU, for :func:`update` and :func:`remap`."""
    index = faiss.read_index(str(path))
    if isinstance(index, faiss.IndexIVF):
        index.make_direct_map()  # from an entry to its place in the lists, for updates
    return index


def update(index: Any, entries: np.ndarray, rows: np.ndarray) -> None:
    """Overwrite rows of an index from :func:`open_mutable`; with inverted lists they move to the list they now belong to.

    Args:
        entries: (n,) int64; of an entry that comes twice, the last row is kept. n may be 0.
        rows: (n, d) float32.

    Raises:
        ValueError: an entry that the index does not have, or rows that are not finite. Nothing has changed then.
    """
    if not len(entries):
        return
    if entries.min() < 0 or entries.max() >= index.ntotal:
        raise ValueError(f"entries must be in [0, {index.ntotal}), got {entries.min()} to {entries.max()}")
    _check_finite(rows)
    if isinstance(index, faiss.IndexIVF):
        index.update_vectors(entries, rows)  # type: ignore[call-arg]  # FAISS wraps the C++ signature
    else:
        _vectors(index)[entries] = rows


def remap(index: Any, matrix: np.ndarray, rows: np.ndarray) -> None:
    """Make an index from :func:`open_mutable` hold all of `rows`, which a linear map made of those it held.

    Inverted lists keep their entries, and their centroids go the way of the rows: neither k-means nor a search of the list of
    each entry is needed, and a map near a rotation hardly changes which centroid is nearest.

    Args:
        matrix: (d, d) float32, the map, applied as ``rows @ matrix``.
        rows: (N, d) float32, the mapped rows, normalised.

    Raises:
        ValueError: a shape that does not fit, or a matrix or rows that are not finite. Nothing has changed then.
    """
    if rows.shape != (index.ntotal, index.d) or matrix.shape != (index.d, index.d):
        raise ValueError(f"rows {rows.shape} and matrix {matrix.shape} do not fit an index of {index.ntotal} rows of {index.d}")
    _check_finite(matrix)
    _check_finite(rows)
    if not isinstance(index, faiss.IndexIVF):
        _vectors(index)[:] = rows
        return
    centroids = _vectors(faiss.downcast_index(index.quantizer))
    centroids[:] = centroids @ matrix
    faiss.normalize_L2(centroids)
    rows, lists = np.ascontiguousarray(rows), faiss.vector_to_array(index.direct_map.array) >> 32  # (list << 32) | offset
    index.reset()
    index.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(lists))


def _vectors(index: Any) -> np.ndarray:
    """(N, d) float32: the memory of a flat index."""
    return faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)


def _check_finite(rows: np.ndarray) -> None:
    """FAISS ends the process when a row for inverted lists is NaN."""
    if not np.isfinite(rows).all():
        raise ValueError("rows must be finite; look for the step at which training diverged")


def retrieve(
    index: faiss.Index, queries: np.ndarray, k: int, numbers: np.ndarray, excluded: np.ndarray, most_per_clip: int
) -> Neighbours:
    """The `k` nearest entries of each query, without those of excluded clips.

    Searching for as many more as could be excluded and dropping them afterwards is exact, works for every kind of index
    on every device, and lets each query have exclusions of its own.

    Args:
        queries: (Q, d) float32.
        numbers: (N,) int64, the clip number of each entry.
        excluded: (Q, E) int64 clip numbers that each query may not retrieve; E may be 0.
        most_per_clip: the most entries that one clip has.

    Returns:
        neighbours by falling similarity.
    """
    asked = min(k + excluded.shape[1] * most_per_clip, index.ntotal)
    similarity, entry = index.search(np.ascontiguousarray(queries, np.float32), asked)
    return _keep(Neighbours(similarity, entry), _barred(numbers[np.maximum(entry, 0)], excluded) | (entry < 0), k)


def _barred(found: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """(Q, A) bool: whether a found clip number is among its query's excluded ones."""
    if excluded.shape[1] == 0:
        return np.zeros(found.shape, bool)
    if (excluded == excluded[:1]).all():
        return np.isin(found, excluded[0])
    return (found[:, :, None] == excluded[:, None, :]).any(axis=2)


def _keep(found: Neighbours, barred: np.ndarray, k: int) -> Neighbours:
    first = np.argsort(barred, axis=1, kind="stable")[:, :k]
    gone = np.take_along_axis(barred, first, 1)
    similarity = np.where(gone, -np.inf, np.take_along_axis(found.similarity, first, 1))
    entry = np.where(gone, -1, np.take_along_axis(found.entry, first, 1))
    short = ((0, 0), (0, k - first.shape[1]))
    return Neighbours(
        np.pad(similarity, short, constant_values=-np.inf).astype(np.float32), np.pad(entry, short, constant_values=-1)
    )
