"""Labelled sounds in ESC-50's layout (Piczak, ESC: Dataset for Environmental Sound Classification, 2015):
`meta/esc50.csv` with `filename`, `fold`, `target` and `category`, and the recordings in `audio/`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ask_ray.config import SettingsError
from ask_ray.data import lists
from ask_ray.data.folders import RECORDINGS, held_in
from ask_ray.data.schema import Rejection
from ask_ray.storage import is_file, is_folder, local_path

COLUMNS = ("filename", "category")


class Labelled(NamedTuple):
    """A recording and what it is of."""

    path: Path
    category: str


class Listed(NamedTuple):
    """What the list says: clips in its order, and rows and recordings that are set aside."""

    clips: list[Labelled]
    aside: list[Rejection]

    def categories(self) -> list[str]:
        """The different categories, by name."""
        return sorted({clip.category for clip in self.clips})


def read(folder: str, setting: str) -> Listed:
    """Read the list. Whether recordings can be decoded, or are there, is seen when they are heard.

    Raises:
        SettingsError: naming `setting`, if the folder holds another thing, the list lacks a column, a file has two categories,
            or there are not two categories to tell apart.
    """
    root = local_path(folder)
    meta = root / "meta" / "esc50.csv"
    if not is_file(meta) or not is_folder(root / "audio"):
        raise SettingsError(
            f"{setting}: {root} does not hold ESC-50: looked for meta/esc50.csv and audio/; found {held_in(root)}"
        )
    table = lists.read(meta, setting)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise SettingsError(f"{setting}: {meta} has the columns {', '.join(table.column_names)}; it lacks {', '.join(missing)}")
    found = _judged(table.select(COLUMNS).to_pylist(), root / "audio", meta, setting)
    if len(found.categories()) < 2:
        raise SettingsError(f"{setting}: {meta} names {len(found.categories())} categories; at least 2 are told apart")
    return found


def _judged(rows: list[dict[str, str | None]], audio: Path, meta: Path, setting: str) -> Listed:
    categories: dict[str, str] = {}
    aside = []
    for number, row in enumerate(rows, 2):
        name, category = (str(row[column] or "").strip() for column in COLUMNS)
        if not name or not category:
            aside.append(Rejection(name, f"{meta}, row {number}", "no file name" if not name else "no category"))
        elif categories.setdefault(name, category) != category:
            raise SettingsError(
                f"{setting}: {meta}, row {number}: {name} is of {categories[name]!r} and of {category!r}: keep one"
            )
    known = {*categories, *(one.id for one in aside)}
    for path in sorted(audio.iterdir()):
        if path.suffix.lower() in RECORDINGS.endings and path.name not in known:
            aside.append(Rejection(path.name, str(path), "no category", f"{meta.name} does not name it"))
    return Listed([Labelled(audio / name, category) for name, category in categories.items()], aside)
