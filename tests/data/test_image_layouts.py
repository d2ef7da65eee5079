"""COCO and Flickr30k as they lie on researchers' disks: every picture found, what is wrong listed, wrong folders told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from picture_trees import coco_2017, karpathy, scene, spoilt_coco, write

from ask_ray.config import DataSettings, SettingsError
from ask_ray.data.corpora import source_of
from ask_ray.data.rows import Row, rows_of
from ask_ray.data.schema import SPLITS


def planned(corpus: str, path: Path, **section: object) -> tuple[dict[str, Row], dict[str, str]]:
    """Usable rows by id, and the reason of each row that is set aside by its id."""
    source = source_of(DataSettings.model_validate({"corpus": corpus, corpus: {"path": str(path), **section}}))
    return {row.id: row for row in rows_of(source.rows)}, {one.id: one.reason for one in source.early_rejections()}


def by_split(rows: dict[str, Row]) -> dict[str, int]:
    return {split: sum(row.split == split for row in rows.values()) for split in SPLITS}


def test_of_coco_2017_val_is_the_test_split_and_validation_is_dealt_from_train(tmp_path: Path) -> None:
    rows, aside = planned("coco", coco_2017(tmp_path, train=50), validation=0.2)
    assert by_split(rows) == {"train": 40, "validation": 10, "test": 4}
    assert aside == {}
    for number in range(1, 55):
        row = rows[f"{number:012d}"]
        assert row.captions == tuple(scene(number)[1])
        assert row.source_id == f"coco:{number}"
        assert row.path.is_file()
        assert (row.split == "test") == (number > 50)
    again, _ = planned("coco", tmp_path, validation=0.2)
    assert again == rows


def test_what_is_wrong_in_coco_is_listed_with_its_reason(tmp_path: Path) -> None:
    rows, aside = planned("coco", spoilt_coco(tmp_path))
    assert aside == {
        "000000000001": "duplicate id",
        "000000000102": "empty",
        "000000000103": "missing file",
        "000000000104": "no caption",
        "000000000777": "missing file",
        "train2017/nobody tells of it é.jpg": "no caption",
    }
    assert {"000000000101", "000000000105"} <= rows.keys(), "what only decoding shows is still to come"


def test_karpathys_splits_of_coco_find_pictures_called_as_of_2014_and_of_2017(tmp_path: Path) -> None:
    karpathy(tmp_path, "coco")
    coco_2017(tmp_path / "also", train=8, test=2)  # Karpathy's list is the one that the field's tables are made on
    rows, aside = planned("coco", tmp_path)
    assert by_split(rows) == {"train": 8, "validation": 2, "test": 3}
    assert (aside.pop("000000000014"), aside.pop("000000000015")) == ("missing file", "unknown split")
    assert set(aside.values()) == {"no caption"}
    assert {row.path.name.startswith("COCO_val2014_") for row in rows.values()} == {True, False}
    assert rows["000000000008"].split == "train", "restval is trained on"
    assert rows["000000000009"].captions == tuple(scene(209)[1])
    assert rows["000000000009"].source_id == "coco:9"


def test_a_picture_of_coco_has_one_id_in_both_lists(tmp_path: Path) -> None:
    both = [planned("coco", root)[0] for root in (coco_2017(tmp_path / "2017"), karpathy(tmp_path / "karpathy", "coco"))]
    assert both[0]["000000000003"].source_id == both[1]["000000000003"].source_id == "coco:3"


def test_flickr30k_has_its_splits_its_accents_and_its_sources(tmp_path: Path) -> None:
    rows, aside = planned("flickr30k", karpathy(tmp_path, "flickr30k"))
    assert by_split(rows) == {"train": 8, "validation": 2, "test": 3}
    assert aside == {"1014é.jpg": "missing file", "1015é.jpg": "unknown split"}
    assert rows["109é.jpg"].source_id == "flickr:109é"
    assert rows["109é.jpg"].split == "validation"


def test_names_that_a_picture_was_converted_to_are_found(tmp_path: Path) -> None:
    root = karpathy(tmp_path, "flickr30k")
    (root / "images" / "101é.jpg").rename(root / "images" / "101é.webp")
    rows, _ = planned("flickr30k", root)
    assert rows["101é.jpg"].path.name == "101é.webp"


@pytest.mark.parametrize(
    ("corpus", "listed", "told"),
    [
        ("coco", None, ("captions_train2017.json", "dataset_coco.json", "1 pictures below", "readme.txt")),
        ("flickr30k", None, ("dataset_flickr30k.json", "1 pictures below")),
        ("coco", {"captions_train2017.json": {"images": []}}, ("captions_train2017.json", "no list called annotations")),
        ("coco", {"captions_val2017.json": {"images": [{"id": 1}], "annotations": []}}, ("lack file_name",)),
        ("coco", {"captions_val2017.json": [1]}, ("no list called images",)),
        ("flickr30k", {"dataset_flickr30k.json": {"images": [{"filename": "a"}]}}, ("lack sentences, split",)),
        ("flickr30k", {"dataset_flickr30k.json": None}, ("no list called images",)),
        ("flickr30k", {"dataset_flickr30k.json": "cut"}, ("cannot be read",)),
    ],
)
def test_what_is_another_thing_is_refused_with_what_was_looked_for(tmp_path: Path, corpus: str, listed, told) -> None:
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "a.jpg").write_bytes(b"x")
    for name, content in (listed or {}).items():
        write(tmp_path / name, content)
        if content == "cut":
            (tmp_path / name).write_text('{"images": [')
    with pytest.raises(SettingsError, match=rf"data\.{corpus}\.path: ") as refusal:
        planned(corpus, tmp_path)
    for word in told:
        assert word in str(refusal.value)


def test_rows_with_odd_values_are_set_aside_and_stop_nothing(tmp_path: Path) -> None:
    root = coco_2017(tmp_path)
    path = root / "annotations" / "captions_train2017.json"
    told = json.loads(path.read_text())
    told["images"] += [{"id": None, "file_name": "a.jpg"}, {"id": 500, "file_name": None}, {"file_name": 3}]
    told["annotations"] += [{"image_id": 1, "caption": None}, {"caption": "of nothing"}]
    path.write_text(json.dumps(told))
    rows, aside = planned("coco", root)
    assert len(rows) == 16
    assert set(aside.values()) <= {"no file name", "missing file"}
    assert rows["000000000001"].captions == tuple(scene(1)[1])
