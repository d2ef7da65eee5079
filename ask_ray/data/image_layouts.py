"""COCO and Flickr30k as they are published and passed on.

What their lists and files are called is told by cocodataset.org and by the splits of Karpathy and Fei-Fei (CVPR 2015,
cs.stanford.edu/people/karpathy/deepimagesent), which the field's tables of retrieval are made on. A picture of COCO has the same
id and source id in both lists (`coco:391895`), so that it is recognised whichever split it was dealt to.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ask_ray.config import CocoSettings, FlickrSettings, SettingsError
from ask_ray.data.folders import PICTURES, Tree
from ask_ray.data.rows import SPLIT_WORDS, Listing, Row
from ask_ray.data.schema import MISSING, NO_CAPTION, SPLITS

COCO, FLICKR30K = "data.coco.path", "data.flickr30k.path"

#: The two lists of 2017, and what their pictures are for: those without a split are dealt to training and validation.
LISTS_2017 = {"captions_train2017.json": None, "captions_val2017.json": "test"}

#: What is read of the lists, which hold far more.
KEYS = {
    "images", "annotations", "id", "file_name", "image_id", "caption", "filename", "split", "sentences", "raw", "cocoid",
}  # fmt: skip


def coco(settings: CocoSettings) -> Listing:
    """COCO by Karpathy's `dataset_coco.json` if it is there, whose pictures may be named as of 2014 or of 2017; else by
    `captions_train2017.json` and `captions_val2017.json`: then val2017 is the test split, because COCO publishes no captions of
    its test pictures, and the validation split is dealt from train2017 by a hash of the pictures' numbers.

    Raises:
        SettingsError: if none of the lists is there, or one is of another kind.
    """
    tree = Tree(settings.path or "", COCO, media=PICTURES)
    if (path := tree.named("dataset_coco.json")) is not None:
        return _karpathy(tree, path, COCO, "COCO, Karpathy's splits")
    found = {name: path for name in LISTS_2017 if (path := tree.named(name)) is not None}
    if not found:
        raise tree.is_not("COCO", f"dataset_coco.json, {' and '.join(LISTS_2017)}")
    rows = [row for name, path in found.items() for row in _rows_2017(tree, path, LISTS_2017[name])]
    layout = "COCO 2017: val2017 is the test split, the validation split is dealt from train2017"
    return Listing(rows + tree.without_caption(), tree.origin(layout, list(found.values())))


def flickr30k(settings: FlickrSettings) -> Listing:
    """Flickr30k by Karpathy's `dataset_flickr30k.json`.

    Raises:
        SettingsError: if the list is not there, or of another kind.
    """
    tree = Tree(settings.path or "", FLICKR30K, media=PICTURES)
    path = tree.named("dataset_flickr30k.json")
    if path is None:
        raise tree.is_not("Flickr30k", "dataset_flickr30k.json")
    return _karpathy(tree, path, FLICKR30K, "Flickr30k, Karpathy's splits")


# --- Karpathy's splits -----------------------------------------------------------------------------------------------


def _karpathy(tree: Tree, path: Path, setting: str, layout: str) -> Listing:
    expected = "{'images': [{'filename', 'split', 'sentences': [{'raw'}], …}]}"
    images = _items(_read(path, setting), f"{setting}: {path}", "images", ("filename", "split", "sentences"), expected)
    rows = [_karpathy_row(tree, image) for image in images]
    return Listing(rows + tree.without_caption(), tree.origin(layout, [path]))


def _karpathy_row(tree: Tree, image: Mapping[str, Any]) -> Row:
    name, number = _text(image.get("filename")), image.get("cocoid")
    clip, names, source = name, [name], f"flickr:{Path(name).stem}" if name else None
    if number is not None:
        clip, source = _coco_id(number), f"coco:{number}"
        names = [name, f"{clip}.jpg"]
    told = image.get("sentences")
    captions = [one.get("raw") for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    given = _text(image.get("split"))
    split = "train" if given == "restval" else SPLIT_WORDS.get(given, given)
    row = _captioned(tree.row("", clip if name else "", names, captions, split, source))
    if row.problem is None and split not in SPLITS:
        row = replace(row, problem="unknown split", detail=f"the list says {given!r}")
    return row


# --- COCO 2017 -------------------------------------------------------------------------------------------------------


def _rows_2017(tree: Tree, path: Path, split: str | None) -> Iterator[Row]:
    """The pictures of a list with all their captions, and the captions that are of none of them."""
    expected = "{'images': [{'id', 'file_name', …}], 'annotations': [{'image_id', 'caption', …}]}"
    told = _read(path, COCO)
    images = _items(told, f"{COCO}: {path}", "images", ("id", "file_name"), expected)
    captions: dict[Any, list[object]] = defaultdict(list)
    for note in _items(told, f"{COCO}: {path}", "annotations", ("image_id", "caption"), expected):
        captions[note.get("image_id")].append(note.get("caption"))
    for image in images:
        number, name = image.get("id"), _text(image.get("file_name"))
        clip = _coco_id(number) if name and number is not None else ""
        yield _captioned(tree.row("", clip, [name], captions.get(number, ()), split, f"coco:{number}"))
    listed = {image.get("id") for image in images}
    for number in captions:
        if number not in listed:
            detail = f"{path.name} has captions of it, and does not list it"
            yield Row(_coco_id(number), path, (), split, problem=MISSING, detail=detail)


# --- what they share -------------------------------------------------------------------------------------------------


def _coco_id(number: object) -> str:
    """A picture's id, as the files of 2017 are called: whichever list names it."""
    return f"{number:012d}" if isinstance(number, int) else str(number)


def _captioned(row: Row) -> Row:
    """The row, set aside if no caption of it has text."""
    if row.problem is None and not any(caption.strip() for caption in row.captions):
        return replace(row, problem=NO_CAPTION, detail="the list has no caption of this picture")
    return row


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _read(path: Path, setting: str) -> object:
    """What a JSON file says, no more than :data:`KEYS` of it.

    Raises:
        SettingsError: if it is no JSON.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            return json.load(stream, object_hook=lambda found: {key: found[key] for key in found if key in KEYS})
    except (OSError, ValueError) as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error}") from error


def _items(told: object, where: str, name: str, keys: Sequence[str], expected: str) -> list[dict[str, Any]]:
    """A list that a file holds.

    Raises:
        SettingsError: if it holds none of that name, or its items lack one of `keys`; `where` names the file.
    """
    items = told.get(name) if isinstance(told, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SettingsError(f"{where} has no list called {name}; it should be {expected}")
    if items and not set(keys) <= items[0].keys():
        raise SettingsError(f"{where}: its {name} lack {', '.join(sorted(set(keys) - items[0].keys()))}; it should be {expected}")
    return items
