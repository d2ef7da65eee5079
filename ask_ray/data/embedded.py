"""Parquet files with the audio in them, as data sets are kept on the Hugging Face hub: listed without reading the audio, then
read forward."""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ask_ray.config import ParquetSettings, SettingsError
from ask_ray.data import files as reading
from ask_ray.data import lists
from ask_ray.data.folders import Tree, below
from ask_ray.data.rows import SPLIT_WORDS, Listing, Row, merged, texts
from ask_ray.data.schema import SPLITS, UnusableClip
from ask_ray.storage import is_file, local_path

SETTING = "data.parquet.path"

#: Columns of which the first that is there names the clip.
IDS = ("id", "youtube_id", "file_name")
#: Columns that hold captions, each as text or as a list of texts.
CAPTIONS = ("text", "caption", "captions")
#: Recordings read at once.
BATCH = 8

Recording = BinaryIO | Path | UnusableClip


def parquet(settings: ParquetSettings) -> Listing:
    """The rows of Parquet files, by every column but the audio. Rows with one id are captions of one clip if they tell the same
    excerpt of a video (`youtube_id` and, if there is one, `start_time`), or in one file the same name of the audio. Other rows
    with one id are different recordings, as where every file counts from 0: of those :func:`~ask_ray.data.rows.plan` keeps one.

    Raises:
        SettingsError: if there are no such files, one is damaged, or lacks the columns, naming those it has.
    """
    given = local_path(settings.path or "")
    alone = is_file(given)
    tree = Tree(str(given.parent if alone else given), SETTING)
    files = [given] if alone else tree.lists(".parquet")
    if not files:
        raise tree.is_not("Parquet", "*.parquet")
    rows = [row for path in files for row in _file_rows(path, tree.root)]
    return Listing(merged(_named(rows, tree.root)), tree.origin("Parquet with audio", files))


def recordings(path: Path, places: Sequence[int]) -> Iterator[Recording]:
    """The recordings of rows of a file, in ascending order: their bytes, the file that is named instead of them, or why there is
    neither, such as a damaged page. :data:`BATCH` are held at once, beside what Parquet needs to read them: where all of a
    column chunk is one page, as in many such files, that is a row group.

    Raises:
        StorageError: if the file is gone, or cannot be read for another reason than what it holds.
    """
    try:
        opened = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except OSError as error:
        raise reading.away(path, error) from error
    with opened as file:
        done, start = 0, 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            upto = bisect_left(places, stop)
            if done < upto:
                yield from _in_group(file, path, group, start, deque(places[done:upto]))
            done, start = upto, stop


def _in_group(file: pq.ParquetFile, path: Path, group: int, start: int, wanted: deque[int]) -> Iterator[Recording]:
    """The recordings of rows of the row group that begins with row `start`. Behind a damaged page no row of the group is read."""
    here = start
    try:
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=["audio"]):
            while wanted and wanted[0] < here + len(batch):
                found = _recording(path, batch.column(0)[wanted[0] - here].as_py())
                wanted.popleft()
                yield found
            here += len(batch)
            if not wanted:
                return
        raise pa.ArrowInvalid("it holds fewer rows than it announces")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        reading.read_through(path)
        last = start + file.metadata.row_group(group).num_rows - 1
        detail = f"{path}: row group {group} (rows {start} to {last}) cannot be read from row {wanted[0]} on: {error}"
        yield from (UnusableClip("unreadable", detail) for _ in wanted)


def _recording(path: Path, audio: dict[str, Any] | None) -> Recording:
    content, name = (audio or {}).get("bytes"), (audio or {}).get("path")
    if content:
        return io.BytesIO(content)
    if name and content is None:
        return path.parent / name
    return UnusableClip("empty", "the row holds no bytes of audio")


def _file_rows(path: Path, root: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names, place = _columns(path, file.schema_arrow), 0
            for group in range(file.num_row_groups):
                inside = _holds_bytes(file.metadata.row_group(group))
                for batch in file.iter_batches(4096, row_groups=[group], columns=names):
                    for row in batch.to_pylist():
                        yield _row(row, path, place, root, inside)
                        place += 1
    except lists.UNREADABLE as error:
        raise SettingsError(f"{SETTING}: {path} cannot be read: {error}") from error


def _holds_bytes(group: pq.RowGroupMetaData) -> bool:
    """Whether a row group may hold recordings; where the file says that there are none, its rows name files."""
    columns = (group.column(number) for number in range(group.num_columns))
    found = next(column.statistics for column in columns if column.path_in_schema == "audio.bytes")
    return found is None or not found.has_null_count or found.null_count < group.num_rows


def _columns(path: Path, schema: pa.Schema) -> list[str]:
    """Of a file's columns, what a row is made from, without the bytes."""
    audio = schema.field("audio").type if "audio" in schema.names else None
    captions = _captions(schema.names)
    if audio is None or not pa.types.is_struct(audio) or audio.get_field_index("bytes") < 0 or not captions:
        raise SettingsError(
            f"{SETTING}: {path} needs the columns audio (with bytes and path) and text, caption, captions or caption_1 … "
            f"caption_n; it has {', '.join(f'{field.name} ({field.type})' for field in schema) or 'none'}"
        )
    others = [name for name in (*IDS, "start_time", "split", "source_id", "sound_id") if name in schema.names]
    return [*captions, *others, *(["audio.path"] if audio.get_field_index("path") >= 0 else [])]


def _captions(names: Sequence[str]) -> list[str]:
    return [name for name in CAPTIONS if name in names and name != "caption"] + lists.caption_columns(names)


def _row(row: dict[str, Any], path: Path, place: int, root: Path, inside: bool) -> Row:
    given = str(row.get("split") or "").strip().lower()
    split = SPLIT_WORDS.get(given, given) or split_of(path.relative_to(root))
    clip = next((str(row[name]) for name in IDS if row.get(name) not in (None, "")), "")
    held = [row[name] for name in _captions(list(row))]
    captions = texts(text for one in held for text in (one if isinstance(one, list) else [one]))
    name = str((row.get("audio") or {}).get("path") or "")
    problem = "unknown split" if split is not None and split not in SPLITS else None
    detail = "" if clip else PurePath(name).name
    recording = _recording_of(row, path, place)
    if name and not inside:
        return Row(clip, path.parent / name, captions, split, _source_id(row), None, problem, detail, recording)
    return Row(clip, path, captions, split, _source_id(row), place, problem, detail, recording)


def _recording_of(row: dict[str, Any], path: Path, place: int) -> str:
    """What rows of the same recording have alike, and no others."""
    if video := str(row.get("youtube_id") or "").strip():
        return f"{video} from {str(row.get('start_time') or 0).strip().removesuffix('.0')}"
    name = (row.get("audio") or {}).get("path") or row.get("file_name")
    return f"{path} {name}" if name else f"{path}#{place}"


def _source_id(row: dict[str, Any]) -> str | None:
    if row.get("source_id"):
        return str(row["source_id"]).strip() or None
    if row.get("youtube_id"):
        return f"youtube:{str(row['youtube_id']).strip()}"
    sound = str(row.get("sound_id") or "").strip()
    return f"freesound:{sound}" if sound.isdigit() else None


def split_of(path: Path) -> str | None:
    """The split that a file's name, else a folder's above it, begins with: `train-00000-of-00004`, `validation/part.parquet`."""
    for part in reversed(path.parts):
        word = re.split(r"[^a-z]", part.lower())[0]
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return None


def _named(rows: list[Row], root: Path) -> Iterator[Row]:
    """Rows without an id are named after their recordings where those names are unique, else after their places below `root`:
    files of two folders may have one name."""
    names = Counter(row.detail for row in rows if not row.id)
    for row in rows:
        if row.id:
            yield row
        else:
            place = below(row.path, root) + ("" if row.place is None else f"#{row.place}")
            yield replace(row, id=row.detail if row.detail and names[row.detail] == 1 else place, detail="")
