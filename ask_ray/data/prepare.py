"""Preparing a corpus once, with Ray Data: decode, mono, resample, validate, write Parquet.

A shard is the unit: one task writes its Parquet file under a temporary name and renames it, so a file that is there is
whole, an interrupted run is taken up where it stopped, and the files do not depend on how many tasks ran. The corpus's
``manifest.json`` is written last: without it there is no corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ask_ray.config import DataSettings, SettingsError, UserError
from ask_ray.data.corpora import Shard, Source, source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.schema import CLIPS, REJECTED, ROW_GROUP, SPLITS, Clip, Rejection
from ask_ray.storage import Folder, digest_bytes, masked

Progress = Callable[[int, int], None]


class PreparingFailed(UserError, RuntimeError):
    """Preparing that broke off. The message holds the cause and how to go on."""


def prepare(data: DataSettings, progress: Progress = lambda done, total: None) -> Corpus:
    """The prepared corpus that the settings ask for, made if it is not there yet. Needs a Ray session.

    Args:
        data: what to prepare and where to keep it.
        progress: called with the clips done and all clips.

    Raises:
        SettingsError: if the source is missing or malformed, nothing in it can be used, or too much cannot.
        StorageError: if `data.prepared` cannot be read or, where the corpus is not there yet, written.
        PreparingFailed: if a task fails; what is finished is kept.
    """
    source = source_of(data)
    home = Folder.at(data.prepared)
    folder = home / f"{data.corpus}-{_fingerprint(data, source)}"
    home.check_readable("data.prepared")
    if not folder.exists("manifest.json"):
        home.check_writable("data.prepared")
        shards = source.shards()
        _refuse_empty(data, shards, source)
        try:
            written = list(_run(data, source, folder, shards, progress))
        except ray.exceptions.RayError as error:
            raise PreparingFailed(
                f"data.prepared: preparing {folder} stopped: {_innermost(error)}. Finished files are kept: once the cause is "
                "mended, the same command goes on from there"
            ) from error
        _write_manifest(data, folder, source, written)
    return Corpus.open(folder.uri)


def _innermost(error: BaseException) -> str:
    """The cause of a task's failure in a line."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def _fingerprint(data: DataSettings, source: Source) -> str:
    """Twelve hexadecimal digits that change with whatever changes the prepared files."""
    used = {"sample_rate", "min_seconds", "shard_clips", "corpus", data.corpus}
    values = data.model_dump(mode="json", include=used)
    return hashlib.blake2b((json.dumps(values, sort_keys=True) + source.key()).encode(), digest_size=6).hexdigest()


def _refuse_empty(data: DataSettings, shards: list[Shard], source: Source) -> None:
    if not any(shard.split == "train" for shard in shards):
        problems = Counter(rejection.reason for rejection in source.early_rejections())
        raise SettingsError(f"data.{data.corpus}: no clip is left for the training split ({dict(problems) or 'none given'})")


def _run(data: DataSettings, source: Source, folder: Folder, shards: list[Shard], progress: Progress) -> Iterator[dict[str, Any]]:
    """Write every shard with Ray Data; yields what each file holds."""
    total = sum(shard.last - shard.first for shard in shards)
    done = 0
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = ray.data.from_items([{"shard": place} for place in range(len(shards))], override_num_blocks=len(shards))
    known = ray.put((source, shards))
    written = items.map(
        lambda row: write_shard(*_shard(known, int(row["shard"])), folder),
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=min(data.prepare_tasks, len(shards))),
    )
    for row in written.iter_rows():
        done += row["clips"] + row["rejected"]
        progress(done, total)
        yield row


def _shard(known: ray.ObjectRef, place: int) -> tuple[Source, Shard]:
    source, shards = ray.get(known)
    return source, shards[place]


def write_shard(source: Source, shard: Shard, folder: Folder) -> dict[str, Any]:
    """Prepare one shard, unless its file is there already.

    Returns:
        what the file holds: name, split, clips, seconds, rejected, digest.
    """
    name, summary = f"{shard.name}.parquet", f"{shard.name}.json"
    if not (folder / "clips").exists(name) or not (folder / "shards").exists(summary):
        clips, rejected = _collect(source.clips(shard))
        content = _parquet([clip.row() for clip in clips], CLIPS, ROW_GROUP)
        (folder / "rejected").write(name, _parquet([vars(rejection) for rejection in rejected], REJECTED, 4096))
        (folder / "clips").write(name, content)
        (folder / "shards").write_json(
            summary,
            {
                "name": name,
                "split": shard.split,
                "clips": len(clips),
                "seconds": float(sum(len(clip.waveform) / clip.rate for clip in clips)),
                "samples": int(sum(len(clip.waveform) for clip in clips)),
                "captions": int(sum(len(clip.captions) for clip in clips)),
                "most_captions": max((len(clip.captions) for clip in clips), default=0),
                "rejected": len(rejected),
                "reasons": [rejection.reason for rejection in rejected],
                "digest": digest_bytes(content),
            },
        )
    return dict((folder / "shards").read_json(summary))


def _collect(found: Iterator[Clip | Rejection]) -> tuple[list[Clip], list[Rejection]]:
    clips: list[Clip] = []
    rejected: list[Rejection] = []
    for item in found:
        if isinstance(item, Clip):
            clips.append(item)
        else:
            rejected.append(item)
    return clips, rejected


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema, row_group: int) -> bytes:
    columns = {name: [row[name] for row in rows] for name in schema.names}
    if "waveform" in columns:
        columns["waveform"] = _waveforms(columns["waveform"])
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    sink = pa.BufferOutputStream()
    # Noise-like samples do not compress: the time is better spent elsewhere.
    pq.write_table(table, sink, row_group_size=row_group, compression="none", use_dictionary=False)
    return bytes(sink.getvalue())


def _waveforms(waveforms: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(one) for one in waveforms)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise SettingsError(f"data.shard_clips: {len(waveforms)} clips of this length are too much for a file; lower it")
    return pa.ListArray.from_arrays(offsets.astype(np.int32), np.concatenate([np.zeros(0, np.int16), *waveforms]))


def _write_manifest(data: DataSettings, folder: Folder, source: Source, written: list[dict[str, Any]]) -> None:
    """Publish the corpus, unless too little of it is usable."""
    early = source.early_rejections()
    if early:
        (folder / "rejected").write("planning.parquet", _parquet([vars(one) for one in early], REJECTED, 4096))
    reasons = Counter(rejection.reason for rejection in early)
    for row in written:
        reasons.update(row.pop("reasons"))
    rejected = sum(reasons.values())
    told = f"{rejected} of {source.recordings()} recordings were set aside ({dict(reasons)}); see {folder / 'rejected'}"
    if not any(row["clips"] for row in written if row["split"] == "train"):
        raise SettingsError(f"data.{data.corpus}: nothing is left to train on: {told}")
    if rejected > data.max_rejected * source.recordings():
        raise SettingsError(f"data.max_rejected is {data.max_rejected}: {told}; repair them or raise data.max_rejected")
    folder.write_json(
        "manifest.json",
        {
            "format": 1,
            "corpus": data.corpus,
            "sample_rate": data.sample_rate,
            "splits": {split: _summary([row for row in written if row["split"] == split]) for split in SPLITS},
            "rejected": dict(sorted(reasons.items())),
            "settings": {**data.model_dump(mode="json"), "prepared": masked(data.prepared)},
        },
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rows = sorted((row for row in rows if row["clips"]), key=lambda row: row["name"])
    return {
        "clips": sum(row["clips"] for row in rows),
        "captions": sum(row["captions"] for row in rows),
        "most_captions": max((row["most_captions"] for row in rows), default=0),
        "samples": sum(row["samples"] for row in rows),
        "hours": sum(row["seconds"] for row in rows) / 3600,
        "files": [{key: row[key] for key in ("name", "clips", "digest")} for row in rows],
    }
