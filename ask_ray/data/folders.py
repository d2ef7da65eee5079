"""A folder of recordings with a manifest of captions, and the recordings or pictures below any folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from ask_ray.config import FolderSettings, SettingsError
from ask_ray.data import lists
from ask_ray.data.files import is_there
from ask_ray.data.rows import SPLIT_WORDS, Listing, Row, texts
from ask_ray.data.schema import MISSING, NO_CAPTION, SPLITS, told
from ask_ray.modality import Modality
from ask_ray.storage import digest_file, expanded, is_file, is_folder, local_path


class Media(NamedTuple):
    """What captions describe. name: of one of them; endings: files that are taken for some, also those that cannot be read: they
    are listed as unreadable, not as missing."""

    name: str
    endings: tuple[str, ...]


RECORDINGS = Media("recording", (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".wma", ".webm"))
PICTURES = Media("picture", (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jp2"))

MEDIA: dict[Modality, Media] = {"audio": RECORDINGS, "image": PICTURES}

#: A folder at the top of a disk that only the system may list.
LOST = "lost+found"

_MANIFESTS = ("captions", "manifest")


class Named(NamedTuple):
    """The settings that name a folder and its manifest, for messages."""

    folder: str
    manifest: str


class Tree:
    """The files below a folder, walked once in the order of their names.

    Recordings, or pictures, are found by name within sections. A section is a folder at any depth whose name begins with one
    of the section's words (the deepest such folder counts); files in none are found for every section that lacks the name.

    Raises:
        SettingsError: if the folder is not there, or one below it cannot be listed.
    """

    def __init__(
        self, folder: str, setting: str, sections: Mapping[str, Sequence[str]] | None = None, media: Media = RECORDINGS
    ) -> None:
        self.root = local_path(folder)
        self._setting, self._sections, self._media = setting, sections or {}, media
        if not is_folder(self.root):
            raise SettingsError(f"{setting}: {self.root} is not a folder; give the folder that holds the {media.name}s")
        self._found: dict[tuple[str | None, str], list[Path]] = {}
        self._others: list[Path] = []
        self._used: set[Path] = set()
        for path in _walk(self.root, setting):
            if path.suffix.lower() in media.endings:
                self._found.setdefault((self._section(path), self._stem(path.name)), []).append(path)
            else:
                self._others.append(path)

    @property
    def held(self) -> int:
        """How many recordings or pictures there are."""
        return sum(map(len, self._found.values()))

    def lists(self, ending: str) -> list[Path]:
        """Files with an ending of lists, such as `.csv`, in any case."""
        return [path for path in self._others if path.name.lower().endswith(ending)]

    def named(self, *names: str) -> Path | None:
        """The one list of one of these names.

        Raises:
            SettingsError: if there are several, naming them.
        """
        found = [path for path in self._others if path.name in names]
        if len(found) > 1:
            there = ", ".join(below(path, self.root) for path in found)
            raise SettingsError(f"{self._setting}: {self.root} holds {there}: give the folder of one of them")
        return found[0] if found else None

    def find(self, section: str, *names: str) -> Path | None:
        """The recording or picture of the first of these names, with any of their endings, that the section has."""
        for name in names:
            inner = PurePath(name).name
            for key in ((section, self._stem(inner)), (None, self._stem(inner))):
                if held := self._found.get(key):
                    found = next((path for path in held if path.name == inner), held[0])
                    self._used.add(found)
                    return found
        return None

    def use(self, path: Path) -> None:
        """Count a file as one that a list names."""
        self._used.add(path)

    def without_caption(self) -> list[Row]:
        """The recordings or pictures that no list names, as rows that are set aside."""
        left = [path for paths in self._found.values() for path in paths if path not in self._used]
        detail = f"no list names this {self._media.name}"
        return [Row(below(path, self.root), path, (), problem=NO_CAPTION, detail=detail) for path in sorted(left)]

    def row(
        self, section: str, clip: str, names: Sequence[str], captions: Sequence[object], split: str | None, source_id: str | None
    ) -> Row:
        """A row whose recording or picture is looked for under several names; that it is missing is its problem."""
        path = self.find(section, *names) if clip else None
        problem = "no file name" if not clip else MISSING if path is None else None
        detail = f"looked below {self.root} for {', '.join(names)}" if problem == MISSING else ""
        return Row(clip, path or self.root / names[0], texts(captions), split, source_id, problem=problem, detail=detail)

    def origin(self, layout: str, used: Sequence[Path]) -> dict[str, Any]:
        """What the data card tells of where a corpus came from."""
        return {
            "layout": layout,
            "folder": str(self.root),
            "lists": {below(path, self.root): digest_file(path) for path in used},
        }

    def is_not(self, corpus: str, looked_for: str) -> SettingsError:
        """The error that the folder holds another thing than the corpus, with what is there."""
        return SettingsError(
            f"{self._setting}: {self.root} does not hold {corpus}: looked for {looked_for} at any depth; "
            f"found {held_in(self.root)}, with {self.held} {self._media.name}s below; "
            "give the corpus's folder, or choose another data.corpus"
        )

    def _section(self, path: Path) -> str | None:
        for part in reversed(path.relative_to(self.root).parts[:-1]):
            for section, words in self._sections.items():
                if part.lower().startswith(tuple(words)):
                    return section
        return None

    def _stem(self, name: str) -> str:
        """A file's name without an ending of what is looked for."""
        name = lists.plain(name)
        ending = PurePath(name).suffix
        return name.removesuffix(ending).rstrip() if ending.lower() in self._media.endings else name


def folder(settings: FolderSettings) -> Listing:
    """The rows of a folder with a manifest, and the recordings there that it does not name."""
    named = Named("data.folder.path", "data.folder.manifest")
    tree = Tree(settings.path or "", named.folder)
    rows = list(manifest_rows(settings, named))
    for row in rows:
        tree.use(Path(os.path.normpath(row.path)))
    manifest = _manifest_path(tree.root, settings.manifest, named)
    return Listing(rows + tree.without_caption(), tree.origin("folder with a manifest", [manifest]))


def manifest_rows(settings: FolderSettings, named: Named) -> Iterator[Row]:
    """The manifest's rows in order; rows that can be judged without the audio already carry their problem.

    Raises:
        SettingsError: if the folder or the manifest is missing or malformed; the message says what was looked for.
    """
    root = local_path(settings.path or "")
    if not is_folder(root):
        raise SettingsError(f"{named.folder}: {root} is not a folder; give the folder that holds the recordings")
    table = _read_manifest(_manifest_path(root, settings.manifest, named), named)
    for row in table.to_pylist():
        yield _manifest_row(row, root)


def _manifest_row(row: dict[str, Any], root: Path) -> Row:
    name = str(row.get("file_name") or "").strip()
    places = (root / name, root / "audio" / name)
    path = next((place for place in places if is_there(place)), None)
    identity = name if row.get("id") in (None, "") else str(row["id"])
    given = str(row.get("split") or "").strip().lower()
    split = SPLIT_WORDS.get(given, given) or None
    problem, detail = None, ""
    if not name:
        problem = "no file name"
    elif split is not None and split not in SPLITS:
        problem = "unknown split"
    elif path is None:
        problem, detail = MISSING, f"looked for {' and '.join(dict.fromkeys(map(str, places)))}"
    source = str(row.get("source_id") or "").strip() or None
    return Row(identity, path or places[0], texts(lists.captions_of(row)), split, source, problem=problem, detail=detail)


def _manifest_path(root: Path, given: str | None, named: Named) -> Path:
    if given is not None:
        path = root / expanded(given)
        if not is_file(path):
            raise SettingsError(f"{named.manifest}: {path} is not there; name the CSV, JSONL or Parquet of captions")
        return path
    names = [f"{stem}{ending}" for stem in _MANIFESTS for ending in lists.READERS]
    found = [root / name for name in names if is_file(root / name)]
    if len(found) != 1:
        what = "none is there" if not found else f"{', '.join(path.name for path in found)} are there"
        sought = f"looked in {root} for one of {', '.join(names)}"
        raise SettingsError(f"{named.manifest}: {sought}: {what}; name one; the folder holds {held_in(root)}")
    return found[0]


def held_in(folder: Path) -> str:
    """What a folder holds, as it is told: the first names, or why it cannot be listed."""
    try:
        there = sorted(told(path.name) + ("/" if is_folder(path) else "") for path in folder.iterdir())
    except OSError as error:
        return f"no folder to list ({error.strerror})"
    return ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "") or "nothing"


def _read_manifest(path: Path, named: Named) -> pa.Table:
    """The manifest as a table.

    Raises:
        SettingsError: if it cannot be parsed or lacks the columns, naming those it has.
    """
    table = lists.read(path, named.manifest)
    if "file_name" not in table.column_names or not lists.caption_columns(table.column_names):
        found = ", ".join(table.column_names) or "none"
        raise SettingsError(
            f"{named.manifest}: {path} needs the columns file_name and caption (or caption_1 … caption_n); it has {found}"
        )
    return table


def _walk(root: Path, setting: str) -> Iterator[Path]:
    """Files below a folder in the order of their names, through links too but into no folder twice; none that is hidden. What
    a folder holds that cannot be listed would be missing without a word: it is refused."""

    def refuse(error: OSError) -> None:
        raise SettingsError(f"{setting}: {error.filename} cannot be listed: {error.strerror}; let it be read, or move it away")

    entered = set()
    for above, inner, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(above)
        inner[:] = [] if real in entered else sorted(name for name in inner if not name.startswith(".") and name != LOST)
        if real not in entered:
            yield from (Path(above, name) for name in sorted(files) if not name.startswith("."))
        entered.add(real)


def below(path: Path, root: Path) -> str:
    """A path as it is told: from a folder on where it is below it."""
    return told(path.relative_to(root) if path.is_relative_to(root) else path)
