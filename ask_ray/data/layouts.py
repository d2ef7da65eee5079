"""AudioCaps, Clotho and WavCaps as they are published and passed on.

What their lists and files are called is told by the corpora's own repositories and by github.com/Labbeti/aac-datasets,
github.com/XinhaoMei/audio-text_retrieval and github.com/XinhaoMei/WavCaps. Source ids are named alike in all of them, so that
a clip is recognised in another: `youtube:` with the video's id, `freesound:` with the sound's number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ask_ray.config import ClothoSettings, LayoutSettings, SettingsError, WavCapsSettings
from ask_ray.data import lists
from ask_ray.data.folders import Tree
from ask_ray.data.rows import Listing, Row, merged
from ask_ray.data.schema import BLACKLISTED, SPLITS
from ask_ray.storage import expanded, is_file

AUDIOCAPS = {"train": ("train",), "validation": ("val",), "test": ("test",)}
CLOTHO = {"train": ("development",), "validation": ("validation",), "test": ("evaluation",)}

#: WavCaps: the folder of a source's audio begins like this; its JSON file; how its ids are named everywhere.
WAVCAPS = {
    "AudioSet_SL": ("audioset", "as_final.json", "youtube"),
    "BBC_Sound_Effects": ("bbc", "bbc_final.json", "bbc"),
    "FreeSound": ("freesound", "fsd_final.json", "freesound"),
    "SoundBible": ("soundbible", "sb_final.json", "soundbible"),
}
#: What the blacklists call the sources that they know.
BLACKLIST_NAMES = {"AudioSet_SL": "AudioSet", "FreeSound": "FreeSound"}

_YOUTUBE = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_\d.*)?")


# --- AudioCaps -------------------------------------------------------------------------------------------------------


def audiocaps(settings: LayoutSettings) -> Listing:
    """AudioCaps by its `train.csv`, `val.csv` and `test.csv`, each in the original form (`youtube_id,start_time,caption`, a row a
    caption) or in the retrieval repository's (`file_name` with `caption` or `caption_1` to `caption_5`).

    Raises:
        SettingsError: if none of the lists is there, or one has other columns.
    """
    setting = "data.audiocaps.path"
    tree = Tree(settings.path or "", setting, AUDIOCAPS)
    found = {split: tree.named(f"{words[0]}.csv", f"{split}.csv") for split, words in AUDIOCAPS.items()}
    used = {split: path for split, path in found.items() if path is not None}
    if not used:
        raise tree.is_not("AudioCaps", "train.csv, val.csv and test.csv")
    rows: list[Row] = []
    forms = set()
    for split, path in used.items():
        table = _table(path, setting)
        columns = set(table.column_names)
        if {"youtube_id", "caption"} <= columns:
            forms.add("original CSV")
            rows += merged(_original_row(tree, split, row) for row in table.to_pylist())
        elif "file_name" in columns and lists.caption_columns(columns):
            forms.add("retrieval repository")
            rows += merged(_named_row(tree, split, row) for row in table.to_pylist())
        else:
            raise SettingsError(
                f"{setting}: {path} has the columns {_columns(table)}; AudioCaps has audiocap_id, youtube_id, start_time and "
                "caption, or in the retrieval repository's form file_name and caption or caption_1 to caption_5"
            )
    origin = tree.origin(f"AudioCaps, {' and '.join(sorted(forms))}", list(used.values()))
    return Listing(rows + tree.without_caption(), origin)


def _original_row(tree: Tree, split: str, row: dict[str, Any]) -> Row:
    video = str(row["youtube_id"] or "").strip()
    start = str(row.get("start_time") or "0").strip().removesuffix(".0")
    names = [f"Y{video}", video, f"{video}_{start}", f"Y{video}_{start}"]
    if start.isdigit():  # as AudioSet's downloads are called: start and end in seconds, or in milliseconds
        end = int(start) + 10
        names += [f"{video}_{start}_{end}", f"{video}_{int(start) * 1000}_{end * 1000}"]
    names += [str(row["audiocap_id"])] if row.get("audiocap_id") else []
    return _row(tree, split, video, [f"{name}.wav" for name in names], [row["caption"]], f"youtube:{video}" if video else None)


def _named_row(tree: Tree, split: str, row: dict[str, Any]) -> Row:
    name = str(row["file_name"] or "").strip()
    video = youtube_id(name)
    return _row(tree, split, video or name, [name], lists.captions_of(row), f"youtube:{video}" if video else None)


def youtube_id(name: str) -> str | None:
    """The video's id in the name of an AudioCaps or AudioSet file: `Y<id>.wav`, `<id>.wav`, `<id>_<start>.flac`, …"""
    found = _YOUTUBE.fullmatch(Path(name).stem)
    return found[1] if found else None


# --- Clotho ----------------------------------------------------------------------------------------------------------


def clotho(settings: ClothoSettings) -> Listing:
    """Clotho by its `clotho_captions_*.csv`, with the Freesound numbers of `clotho_metadata_*.csv`.

    Raises:
        SettingsError: if none of the lists of captions is there, one has other columns, or metadata are needed and missing, or
            are of other clips.
    """
    setting = "data.clotho.path"
    tree = Tree(settings.path or "", setting, CLOTHO)
    captions = {split: tree.named(f"clotho_captions_{word}.csv") for split, (word,) in CLOTHO.items()}
    metadata = {split: tree.named(f"clotho_metadata_{word}.csv") for split, (word,) in CLOTHO.items()}
    if settings.metadata:
        _refuse_without_metadata(tree, [split for split, path in captions.items() if path and metadata[split] is None])
    rows: list[Row] = []
    used: list[Path] = []
    for split, path in captions.items():
        if path is None:
            continue
        table = _table(path, setting)
        if "file_name" not in table.column_names or not lists.caption_columns(table.column_names):
            raise SettingsError(
                f"{setting}: {path} has the columns {_columns(table)}; Clotho has file_name and caption_1 to caption_5"
            )
        told = metadata[split]
        sounds = {} if told is None else _sounds(told, setting)
        used += [path, *([] if told is None else [told])]
        if told is not None and settings.metadata:
            _refuse_other_metadata(told, sounds, path, table.column("file_name").to_pylist())
        for row in table.to_pylist():
            name = str(row["file_name"] or "").strip()
            rows.append(_row(tree, split, name, [name], lists.captions_of(row), sounds.get(lists.plain(name))))
    if not rows:
        raise tree.is_not("Clotho", "clotho_captions_development.csv, …_validation.csv and …_evaluation.csv")
    return Listing(rows + tree.without_caption(), tree.origin("Clotho", used))


def _refuse_without_metadata(tree: Tree, lacking: list[str]) -> None:
    """A sound that two splits hold is known by its number alone: the excerpts of it differ."""
    if lacking:
        names = " and ".join(f"clotho_metadata_{word}.csv" for split in lacking for word in CLOTHO[split])
        raise SettingsError(
            f"data.clotho.metadata: {names} {'is' if len(lacking) == 1 else 'are'} not below {tree.root}, so training clips of "
            "sounds that are evaluated on would stay in; add Clotho's metadata, or set it to false to go without"
        )


def _refuse_other_metadata(metadata: Path, sounds: dict[str, str | None], captions: Path, names: list[str | None]) -> None:
    """Metadata of another split, or whose accents were lost, would guard nothing."""
    clips = {lists.plain(name) for name in names if name}
    named = len(clips & sounds.keys())
    if 2 * named < len(clips):
        raise SettingsError(
            f"data.clotho.metadata: {metadata} names {named} of the {len(clips)} clips of {captions.name}, so training clips of "
            "sounds that are evaluated on would stay in; give the metadata of that split, as Clotho publishes them, or set it to "
            "false to go without"
        )


def _sounds(metadata: Path, setting: str) -> dict[str, str | None]:
    """The source id of each file name; some sounds have no number there (`Not found`)."""
    table = _table(metadata, setting)
    if not {"file_name", "sound_id"} <= set(table.column_names):
        raise SettingsError(
            f"{setting}: {metadata} has the columns {_columns(table)}; Clotho's metadata have file_name and sound_id"
        )
    pairs = zip(table.column("file_name").to_pylist(), table.column("sound_id").to_pylist(), strict=True)
    numbers = {lists.plain(name): (sound or "").strip() for name, sound in pairs if name}
    return {name: f"freesound:{number}" if number.isdigit() else None for name, number in numbers.items()}


# --- WavCaps ---------------------------------------------------------------------------------------------------------


def wavcaps(settings: WavCapsSettings) -> Listing:
    """WavCaps by its JSON file per source, without what the blacklists name.

    Raises:
        SettingsError: if no JSON file is there, one is of another kind, or blacklists are needed and none is there.
    """
    setting = "data.wavcaps.path"
    tree = Tree(settings.path or "", setting, {source: (word,) for source, (word, *_) in WAVCAPS.items()})
    found = {source: tree.named(name) for source, (_, name, _) in WAVCAPS.items()}
    used = {source: path for source, path in found.items() if path is not None}
    if not used:
        raise tree.is_not("WavCaps", ", ".join(name for _, name, _ in WAVCAPS.values()))
    blacklists = _blacklists(settings, tree, used)
    banned = _banned(blacklists)
    rows = [row for source, path in used.items() for row in _source_rows(tree, source, path, banned.get(source, set()))]
    origin = tree.origin(f"WavCaps: {', '.join(used)}", [*used.values(), *blacklists])
    return Listing(rows + tree.without_caption(), origin)


def _source_rows(tree: Tree, source: str, path: Path, banned: set[str]) -> Iterator[Row]:
    namespace = WAVCAPS[source][2]
    for item in _items(path):
        name = str(item.get("id") or "").strip()
        stem = _bare(name)
        known = youtube_id(name) if namespace == "youtube" else stem
        row = _row(
            tree, source, f"{source}/{stem}" if stem else "", [name], lists.captions_of(item), known and f"{namespace}:{known}"
        )
        if stem in banned:
            row = replace(row, problem=BLACKLISTED, detail="a blacklist names its id")
        yield row


def _items(path: Path) -> list[dict[str, Any]]:
    """The clips of a source's file, of each only what is needed: the files hold far more.

    Raises:
        SettingsError: if it is not such a file.
    """

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key in ("id", "data") or lists.CAPTION.fullmatch(key)}

    try:
        with path.open(encoding="utf-8") as stream:
            told = json.load(stream, object_hook=keep)
    except (OSError, ValueError) as error:
        raise SettingsError(f"data.wavcaps.path: {path} cannot be read: {error}") from error
    items = told.get("data") if isinstance(told, dict) else told
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SettingsError(f"data.wavcaps.path: {path} is no list of clips; WavCaps has {{'data': [{{'id', 'caption', …}}]}}")
    if items and not ("id" in items[0] and lists.caption_columns(items[0])):
        raise SettingsError(f"data.wavcaps.path: the clips of {path} have no id or no caption; WavCaps' have both")
    return items


def _blacklists(settings: WavCapsSettings, tree: Tree, used: dict[str, Path]) -> list[Path]:
    if settings.blacklists is not None:
        paths = [tree.root / expanded(name) for name in settings.blacklists]
        missing = [path for path in paths if not is_file(path)]
        if missing:
            raise SettingsError(f"data.wavcaps.blacklists: {missing[0]} is not there; name JSON files, or give [] to go without")
        return paths
    found = [path for path in tree.lists(".json") if path.name.startswith("blacklist")]
    if not found and used.keys() & BLACKLIST_NAMES.keys():
        raise SettingsError(
            f"data.wavcaps.blacklists: no blacklist*.json is below {tree.root}, so clips that AudioCaps and Clotho are evaluated "
            "on would stay in; add WavCaps' blacklists, name them, or give [] to go without"
        )
    return found


def _banned(blacklists: list[Path]) -> dict[str, set[str]]:
    """The ids that blacklists name, without endings, by source."""
    banned: dict[str, set[str]] = {source: set() for source in BLACKLIST_NAMES}
    for path in blacklists:
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"data.wavcaps.blacklists: {path} cannot be read: {error}") from error
        if not isinstance(told, dict) or not told.keys() & set(BLACKLIST_NAMES.values()):
            raise SettingsError(f"data.wavcaps.blacklists: {path} has no list called {' or '.join(BLACKLIST_NAMES.values())}")
        for source, name in BLACKLIST_NAMES.items():
            if not isinstance(told.get(name, []), list):
                raise SettingsError(f"data.wavcaps.blacklists: {path}: {name} is no list of ids: name them, or leave it out")
            banned[source] |= {_bare(str(one)) for one in told.get(name, ())}
    return banned


def _bare(name: str) -> str:
    return lists.plain(name).removesuffix(".wav").removesuffix(".flac")


# --- what they share -------------------------------------------------------------------------------------------------


def _row(tree: Tree, section: str, clip: str, names: list[str], captions: Sequence[object], source_id: str | None) -> Row:
    """A row of a section that is a split, or of a source of WavCaps, whose clips are dealt to splits."""
    return tree.row(section, clip, names, captions, section if section in SPLITS else None, source_id)


def _columns(table: pa.Table) -> str:
    return ", ".join(table.column_names) or "none"


def _table(path: Path, setting: str) -> pa.Table:
    try:
        return lists.read_csv(path, (lists.UTF_8, lists.LATIN_1))
    except lists.UNREADABLE as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error}") from error
