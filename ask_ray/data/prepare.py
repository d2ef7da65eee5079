"""Preparing a corpus once, with Ray Data: decode, bring to one form, validate, write Parquet.

A shard is the unit: its Parquet file is written a row group at a time, under a temporary name, and renamed, so a file that is
there is whole, an interrupted run is taken up where it stopped, and the files do not depend on how many tasks ran. Training
shards with samples of an evaluation split are found when all are written, and written again without them. The corpus's
``manifest.json`` is written last: without it there is no corpus.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ask_ray import cluster, lease
from ask_ray.config import DataSettings, SettingsError, UserError
from ask_ray.data import card
from ask_ray.data.corpora import Shard, Source, source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.folders import MEDIA, Tree
from ask_ray.data.held_out import HeldOut
from ask_ray.data.schema import (
    FORMAT,
    HELD_OUT,
    KEPT,
    LEAKS,
    MISSING,
    REJECTED,
    ROW_GROUP,
    SPLITS,
    UNBLAMED,
    Clip,
    Picture,
    Rejection,
)
from ask_ray.modality import THINGS, Modality
from ask_ray.storage import Folder, digest_bytes, masked

Progress = Callable[[int, int], None]

#: About the most shards that a task of Ray Data is dealt.
SHARDS = 32


class PreparingFailed(UserError, RuntimeError):
    """Preparing that broke off. The message holds the cause and how to go on."""


def prepare(data: DataSettings, progress: Progress = lambda done, total: None) -> Corpus:
    """The prepared corpus that the settings ask for, made if it is not there yet. Needs a Ray session.

    Args:
        data: what to prepare and where to keep it.
        progress: called with the clips done and all clips.

    Raises:
        SettingsError: if the source is missing or malformed, nothing in it can be used, or too much cannot, also of a corpus that
            was prepared under a laxer `data.max_rejected`; if no node can run a task. What shows without decoding is refused
            before anything is decoded. Also if another driver is preparing the same corpus there.
        StorageError: if `data.prepared` cannot be read or, where the corpus is not there yet, written; if a recording of a bank
            can no longer be read.
        PreparingFailed: if a task fails; what is finished is kept.
    """
    held_out = HeldOut.named(data.held_out, data.form)
    source = source_of(data, held_out)
    home = Folder.at(data.prepared)
    folder = home / f"{data.corpus}-{_fingerprint(data, source, held_out)}"
    home.check_readable("data.prepared")
    if folder.exists("manifest.json"):
        corpus = Corpus.open(folder.uri)
        _check_share(data, source, folder, corpus.rejected())
        return corpus
    home.check_writable("data.prepared")
    cluster.check_whole_cpu("data.prepared: preparing")
    shards = source.shards()
    _check_plan(data, source, folder, shards)
    with lease.held(folder, "data.prepared"):
        if not folder.exists("manifest.json"):  # another driver may have been at it until now
            _make(data, source, folder, shards, held_out, progress)
    return Corpus.open(folder.uri)


def _make(data: DataSettings, source: Source, folder: Folder, shards: list[Shard], held_out: HeldOut, progress: Progress) -> None:
    try:
        written = _write_all(data, source, folder, shards, held_out, progress)
    except ray.exceptions.RayError as error:
        raise PreparingFailed(
            f"data.prepared: preparing {folder} stopped: {_innermost(error)}. Finished files are kept: once the cause is "
            "mended, the same command goes on from there"
        ) from error
    _write_manifest(data, folder, source, written)


def _innermost(error: BaseException) -> str:
    """The cause of a task's failure in a line."""
    if raised := cluster.raised_by(error):
        return raised
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def _fingerprint(data: DataSettings, source: Source, held_out: HeldOut) -> str:
    """Twelve hexadecimal digits that change with whatever changes the prepared files."""
    values = json.dumps(_used(data), sort_keys=True)
    return hashlib.blake2b(f"{FORMAT} {values} {source.key()} {held_out.key()}".encode(), digest_size=6).hexdigest()


def _used(data: DataSettings) -> dict[str, Any]:
    """The settings that change the prepared files, but for what is held out."""
    return data.model_dump(mode="json", include={*KEPT[data.modality].settings, "shard_clips", "corpus", data.corpus})


def _check_plan(data: DataSettings, source: Source, folder: Folder, shards: list[Shard]) -> None:
    """Refuse what is too little before anything is decoded. What planning sets aside is written first, so that it can be read."""
    early = source.early_rejections()
    if early:
        (folder / "rejected").write("planning.parquet", _parquet(early))
    reasons = Counter(rejection.reason for rejection in early)
    if not any(shard.split == "train" for shard in shards):
        told = f"{dict(reasons)}{_looked_for(source)}; see {folder / 'rejected'}" if early else "none given"
        raise SettingsError(f"data.{data.corpus}: no clip is left for the training split: {told}")
    _check_share(data, source, folder, reasons)


def _check_share(data: DataSettings, source: Source, folder: Folder, reasons: Mapping[str, int]) -> None:
    """Refuse a corpus of which more cannot be used than `data.max_rejected` allows."""
    if sum(_blamed(reasons).values()) > data.max_rejected * source.recordings():
        told = _set_aside(source, folder, reasons)
        raise SettingsError(f"data.max_rejected is {data.max_rejected}: {told}; repair them or raise data.max_rejected")


def _blamed(reasons: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(reasons.items()) if reason not in UNBLAMED}


def _set_aside(source: Source, folder: Folder, reasons: Mapping[str, int]) -> str:
    blamed = _blamed(reasons)
    counts = f"{sum(blamed.values())} of {source.recordings()} {THINGS[source.modality]} were set aside ({blamed})"
    return f"{counts}{_looked_for(source)}; see {folder / 'rejected'}"


def _looked_for(source: Source) -> str:
    """Of missing files one as an example, and how many files there are; empty if none is missing."""
    missing = next((one for one in source.early_rejections() if one.reason == MISSING), None)
    if missing is None:
        return ""
    where, media = source.origin()["folder"], MEDIA[source.modality]
    held = Tree(where, where, media=media).held
    return f"; for example {missing.id!r}: {missing.detail}; below {where} are {held} {media.name}s"


def _write_all(
    data: DataSettings, source: Source, folder: Folder, shards: list[Shard], held_out: HeldOut, progress: Progress
) -> list[dict[str, Any]]:
    """Write all shards, then again those of the training split that have samples of an evaluation split; what each file holds."""
    written: dict[str, dict[str, Any]] = {}
    done, total = 0, _clips(shards)
    for row in _run(data, source, folder, shards, held_out):
        written[row["name"]] = row
        done += row["clips"] + row["rejected"]
        progress(done, total)
    known = _known(folder, list(written.values()), source.modality)
    leaking = [shard for shard in shards if shard.split == "train" and known.meets(written[f"{shard.name}.parquet"]["digests"])]
    total += _clips(leaking)
    for row in _run(data, source, folder, leaking, held_out.joined(known)):
        written[row["name"]] = row
        done += row["clips"] + row["rejected"]
        progress(done, total)
    return list(written.values())


def _clips(shards: list[Shard]) -> int:
    """How many are planned."""
    return sum(shard.last - shard.first for shard in shards)


def _known(folder: Folder, written: list[dict[str, Any]], modality: Modality) -> HeldOut:
    """The digests of the evaluation splits' clips."""
    manifest = {"splits": {split: _summary([row for row in written if row["split"] == split], modality) for split in HELD_OUT}}
    corpus = Corpus(folder, manifest)
    pairs = {split: corpus.identities(split) for split in HELD_OUT}
    return HeldOut(digests={
        digest: f"{split} clip {clip!r}" for split, of in pairs.items() for clip, digest in zip(of.ids, of.digests, strict=True)
    })  # fmt: skip


def _run(data: DataSettings, source: Source, folder: Folder, shards: list[Shard], held_out: HeldOut) -> Iterator[dict[str, Any]]:
    """Write shards with Ray Data; yields what each file holds, when it is there."""
    if not shards:
        return
    finished = set((folder / "summaries").names())
    left = [1 if f"{shard.name}.json" in finished else shard.last - shard.first for shard in shards]  # one: it is looked at
    tasks = max(1, min(data.prepare_tasks, int(ray.cluster_resources().get("CPU", 1))))
    parts = _dealt(left, tasks)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.op_resource_reservation_enabled = False  # with it, two tasks on two CPUs run one after the other most of the time
    context.target_max_block_size = 1  # bytes: what a task yields is handed on at once
    known = ray.put((source, shards, held_out))
    with ray.data.DataContext.current(context):
        written = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).flat_map(
            partial(_task, known, folder), num_cpus=1, compute=ray.data.TaskPoolStrategy(size=min(tasks, len(parts)))
        )
    yield from (json.loads(row["summary"]) for row in written.iter_rows())


def _dealt(clips: list[int], tasks: int) -> list[list[int]]:
    """The places of shards, of which so many clips are left to write, in parts of about as many clips, one a Ray Data task: as
    many parts as tasks run at once, or, of many shards, a multiple. Not a task a shard: until Ray Data has handed out the next
    and Ray has leased it a worker, a CPU idles for up to two seconds. A part's shards lie apart, so that where long recordings
    follow each other each part has its share."""
    count = min(len(clips), tasks * math.ceil(len(clips) / (tasks * SHARDS)))
    parts: list[list[int]] = [[] for _ in range(count)]
    least = [(0, part) for part in range(count)]  # a heap: clips, and whose
    for place in sorted(range(len(clips)), key=lambda place: -clips[place]):
        dealt, part = heapq.heappop(least)
        parts[part].append(place)
        heapq.heappush(least, (dealt + clips[place], part))
    return [sorted(part) for part in parts]


def _task(known: ray.ObjectRef, folder: Folder, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    source, shards, held_out = ray.get(known)
    for place in item["part"]:
        try:
            summary = write_shard(source, shards[place], folder, held_out if shards[place].split == "train" else HeldOut())
        except Exception as error:  # Ray Data takes what a generator raises for a fault of its own
            raise ray.exceptions.UserCodeException(f"{shards[place].name} could not be written") from error
        yield {"summary": json.dumps(summary)}


def write_shard(source: Source, shard: Shard, folder: Folder, held_out: HeldOut | None = None) -> dict[str, Any]:
    """Prepare one shard, unless its file is there already, without what is held out. Holds a row group of clips at a time.

    Args:
        held_out: clips whose samples are set aside if the shard has them.

    Returns:
        what the file holds: see :func:`_tally`, and its name and the digest of its clips.
    """
    name, summary = f"{shard.name}.parquet", f"{shard.name}.json"
    if (there := _finished(folder, name, summary, held_out or HeldOut())) is not None:
        return there
    rejected: list[Rejection] = []
    tally, schema = _tally(shard, source.modality), KEPT[source.modality].schema
    state = hashlib.blake2b(digest_size=16)
    # Noise-like samples, of sounds as of photographs, hardly compress, and nobody asks for their least and greatest.
    with (
        (folder / "clips").writing(name) as stream,
        pq.ParquetWriter(stream, schema, compression="none", use_dictionary=False, write_statistics=False) as writer,
    ):
        clips = _kept(source.clips(shard), held_out or HeldOut(), rejected)
        while group := list(islice(clips, ROW_GROUP)):
            rows = [clip.row() for clip in group]
            writer.write_table(_table(rows, schema), ROW_GROUP)
            _count(tally, group, source.modality)
            state.update(b"".join(_identity(row, source.modality) for row in rows))
    tally |= {"rejected": len(rejected), "reasons": Counter(one.reason for one in rejected), "digest": state.hexdigest()}
    tally["leaks"] = [vars(one) for one in rejected if one.reason in LEAKS][: card.EXAMPLES]
    (folder / "rejected").write(name, _parquet(rejected))
    (folder / "summaries").write_json(summary, tally)
    return dict((folder / "summaries").read_json(summary))


def _identity(row: dict[str, Any], modality: Modality) -> bytes:
    """All that a clip's row says, of its samples their digest, as a line: the same whichever library writes the file, and at a
    hundredth of the cost of reading its bytes again."""
    told = {name: value for name, value in row.items() if name != KEPT[modality].samples}
    return (json.dumps(told, sort_keys=True) + "\n").encode()


def _finished(folder: Folder, name: str, summary: str, held_out: HeldOut) -> dict[str, Any] | None:
    """The summary of a shard that needs nothing more: its file is there, and nothing in it is held out by now."""
    if not (folder / "clips").exists(name) or not (folder / "summaries").exists(summary):
        return None
    told: dict[str, Any] = (folder / "summaries").read_json(summary)
    return None if held_out.meets(told["digests"]) else told


def _kept(found: Iterator[Clip | Picture | Rejection], held_out: HeldOut, rejected: list[Rejection]) -> Iterator[Clip | Picture]:
    """The clips; what is set aside is put into `rejected`."""
    for item in found:
        if isinstance(item, Rejection):
            rejected.append(item)
        elif leak := held_out.find(digest=item.digest):
            rejected.append(Rejection(item.id, item.source, leak.reason, f"its samples are those of {leak.where}"))
        else:
            yield item


def _tally(shard: Shard, modality: Modality) -> dict[str, Any]:
    """Counts of a shard, before any clip; `words`: captions by their number of words; `digests`: of the clips' samples. What else
    there is of a modality is told by :data:`~ask_ray.data.schema.KEPT`."""
    kept = KEPT[modality]
    added = dict.fromkeys(("clips", "samples", "captions", "most_captions", "source_ids", *kept.added), 0)
    counted: dict[str, Counter[str]] = {name: Counter() for name in (*kept.counted, "words")}
    return {"name": f"{shard.name}.parquet", "split": shard.split, "digests": [], **added, **counted}


def _count(tally: dict[str, Any], clips: list[Clip | Picture], modality: Modality) -> None:
    for clip in clips:
        told = clip.tally()
        tally["clips"] += 1
        tally["digests"].append(clip.digest)
        tally["captions"] += len(clip.captions)
        tally["most_captions"] = max(tally["most_captions"], len(clip.captions))
        tally["source_ids"] += clip.source_id is not None
        for name in ("samples", *KEPT[modality].added):
            tally[name] += told[name]
        for name in KEPT[modality].counted:
            tally[name][str(told[name])] += 1
        tally["words"].update(str(len(caption.split())) for caption in clip.captions)


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = {name: [row[name] for row in rows] for name in schema.names}
    for kept in KEPT.values():
        if kept.samples in columns:
            columns[kept.samples] = _lists(columns[kept.samples])
    return pa.table(columns, schema=schema)


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    """Row groups are small enough for 32-bit offsets: see the bounds of `data.keep_seconds` and `data.image_size`."""
    offsets = np.cumsum([0, *(len(one) for one in arrays)])
    return pa.ListArray.from_arrays(offsets.astype(np.int32), np.concatenate(arrays))


def _parquet(rejected: list[Rejection]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table([vars(one) for one in rejected], REJECTED), sink, compression="none")
    return bytes(sink.getvalue())


def _write_manifest(data: DataSettings, folder: Folder, source: Source, written: list[dict[str, Any]]) -> None:
    """Publish the corpus with its data card, unless too little of it is usable."""
    early = source.early_rejections()
    reasons = Counter(rejection.reason for rejection in early)
    for row in written:
        reasons.update(row["reasons"])
    if not any(row["clips"] for row in written if row["split"] == "train"):
        raise SettingsError(f"data.{data.corpus}: nothing is left to train on: {_set_aside(source, folder, reasons)}")
    _check_share(data, source, folder, reasons)
    leaks = [vars(one) for one in early if one.reason in LEAKS]
    leaks += chain.from_iterable(row["leaks"] for row in sorted(written, key=lambda row: row["name"]))
    manifest = {
        "format": FORMAT,
        "corpus": data.corpus,
        "modality": data.modality,
        ("sample_rate" if data.modality == "audio" else "image_size"): data.form.resolution,
        "origin": source.origin(),
        "splits": {split: _summary([row for row in written if row["split"] == split], data.modality) for split in SPLITS},
        "rejected": dict(sorted(reasons.items())),
        "leaks": leaks[: card.EXAMPLES],
        "settings": _used(data) | {"held_out": list(map(masked, data.held_out))},
    }
    folder.write("card.md", card.render(manifest).encode())
    folder.write_json("manifest.json", manifest)


def _summary(rows: Iterable[dict[str, Any]], modality: Modality) -> dict[str, Any]:
    kept = KEPT[modality]
    rows = sorted((row for row in rows if row["clips"]), key=lambda row: row["name"])
    files = [{key: row[key] for key in ("name", "clips", "digest")} for row in rows]
    return {
        **{name: sum(row[name] for row in rows) for name in ("clips", "captions", "samples", "source_ids", *kept.added)},
        "most_captions": max((row["most_captions"] for row in rows), default=0),
        **{name: _merged(row[name] for row in rows) for name in (*kept.counted, "words")},
        "digest": digest_bytes(json.dumps(files).encode()),
        "files": files,
    }


def _merged(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts by number, added up, the smallest number first."""
    every: Counter[str] = Counter()
    for one in counts:
        every.update(one)
    return {number: every[number] for number in sorted(every, key=int)}
