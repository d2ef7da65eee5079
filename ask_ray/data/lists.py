"""Lists of captions: CSV, JSON and Parquet files as tables of text."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ask_ray.config import SettingsError

READERS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
CAPTION = re.compile(r"caption(_\d+)?")

#: What a list that cannot be read raises; pyarrow takes no path that is not UTF-8.
UNREADABLE = (pa.ArrowException, csv.Error, UnicodeError, OSError)

#: What a CSV may be written in: UTF-8 with or without a byte order mark; Clotho's metadata are ISO-8859-1.
UTF_8, LATIN_1 = "utf-8-sig", "iso-8859-1"


def read(path: Path, setting: str) -> pa.Table:
    """A list by its ending.

    Raises:
        SettingsError: naming `setting` and the file, if it cannot be parsed.
    """
    kind = READERS.get(path.suffix.lower())
    try:
        if kind == "csv":
            return read_csv(path)
        if kind == "json":
            return _read_json(path)
        if kind == "parquet":
            return pyarrow.parquet.read_table(path)
    except UNREADABLE as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error}") from error
    raise SettingsError(f"{setting}: {path.name} is not a {', '.join(READERS)} file")


def read_csv(path: Path, encodings: Iterable[str] = (UTF_8,)) -> pa.Table:
    """A CSV whose every column is text: a caption that looks like a number or a date stays as it was written.

    Args:
        encodings: tried in turn; the last one's error is raised.
    """
    text = _decoded(path.read_bytes(), list(encodings))
    names = next(csv.reader(io.StringIO(text, newline="")), [])
    return pyarrow.csv.read_csv(
        io.BytesIO(text.encode()),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )


def caption_columns(names: Iterable[str]) -> list[str]:
    """`caption`, then `caption_1`, `caption_2`, … by their numbers."""
    return sorted((name for name in names if CAPTION.fullmatch(name)), key=lambda name: (len(name), name))


def captions_of(row: dict[str, Any]) -> list[object]:
    """A row's captions, in the order of :func:`caption_columns`."""
    return [row[name] for name in caption_columns(row)]


def plain(name: str) -> str:
    """A name without surrounding space, letters with accents as one character each: so it is equal however it was written."""
    return unicodedata.normalize("NFC", name.strip())


def _decoded(content: bytes, encodings: list[str]) -> str:
    for encoding in encodings[:-1]:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode(encodings[-1])


def _read_json(path: Path) -> pa.Table:
    """A JSONL file; text that looks like a date stays text."""
    table = pyarrow.json.read_json(path)
    dates = [(field.name, pa.string()) for field in table.schema if pa.types.is_timestamp(field.type)]
    return pyarrow.json.read_json(path, parse_options=pyarrow.json.ParseOptions(pa.schema(dates))) if dates else table
