"""Preparing pictures: every file accounted for, the same bytes however it ran, nothing trained on that is evaluated on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from picture_trees import coco_2017, karpathy, scene, spoilt_coco

from ask_ray.config import DataSettings, SettingsError
from ask_ray.data.corpora import source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.pictures import load
from ask_ray.data.prepare import prepare, write_shard
from ask_ray.data.schema import PICTURES, SPLITS, Picture
from ask_ray.modality import Form
from ask_ray.storage import Folder, digest_bytes

DECODED = {"000000000101": "unreadable", "000000000105": "held out by digest"}


def data_of(root: Path, prepared: Path, corpus: str = "coco", **changes: object) -> DataSettings:
    own = {"path": str(root), **({"validation": 0.0} if corpus == "coco" else {})}
    tree = {"corpus": corpus, corpus: own, "prepared": str(prepared), "image_size": 40, "shard_clips": 5}
    return DataSettings.model_validate(tree | changes)


@pytest.fixture(scope="module")
def corpus(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A spoilt COCO, prepared with Ray Data."""
    root = spoilt_coco(tmp_path_factory.mktemp("coco"))
    return prepare(data_of(root, tmp_path_factory.mktemp("prepared"), max_rejected=0.9))


def test_every_picture_is_kept_or_listed_with_its_reason(corpus: Corpus) -> None:
    assert [corpus.clips(split) for split in SPLITS] == [12, 0, 4]
    early = {"duplicate id": 1, "empty": 1, "missing file": 2, "no caption": 2}
    assert corpus.rejected() == dict(sorted((Counter(DECODED.values()) + Counter(early)).items()))
    assert corpus.folder.local is not None
    rejected = [row for path in sorted((corpus.folder.local / "rejected").iterdir()) for row in pq.read_table(path).to_pylist()]
    told = {row["id"]: row["reason"] for row in rejected}
    assert told.items() >= DECODED.items()
    assert len(rejected) == len(DECODED) + 6
    (leak,) = corpus.manifest["leaks"]
    assert (leak["id"], leak["detail"]) == ("000000000105", "its samples are those of test clip '000000000013'")


def test_what_is_kept_are_the_pictures_and_their_captions(corpus: Corpus) -> None:
    assert corpus.form == Form("image", 40)
    assert corpus.sample_rate is None
    seen = 0
    for split in SPLITS:
        assert corpus.columns(split) == (PICTURES.names if corpus.clips(split) else [])
        for group in corpus.groups(split):
            rows = corpus.read(group)
            for n, name in enumerate(rows.ids):
                image, captions = scene(int(name))
                pixels = rows.signal(n)
                assert (pixels.shape, pixels.dtype) == ((40, 53, 3), np.uint8)
                assert rows.captions[n] == captions
                if int(name) % 4 in (0, 1):  # as it was drawn, but for what JPEG does to it
                    wanted = np.asarray(image.resize((53, 40))).astype(int)
                    assert np.abs(pixels - wanted).mean() < 8
                seen += 1
    assert seen == 16


def test_the_manifest_and_the_card_count_what_the_files_hold(corpus: Corpus) -> None:
    told = corpus.manifest["splits"]["train"]
    assert (told["clips"], told["captions"], told["most_captions"], told["shrunk"]) == (12, 24, 2, 12)
    assert (told["shorter"], told["longer"]) == ({"40": 12}, {"53": 12})
    assert told["samples"] == 12 * 40 * 53 * 3
    assert corpus.mean_bytes("train") == 40 * 53 * 3
    assert not {"hours", "seconds", "rates", "lengths", "cut"} & told.keys()
    card = corpus.folder.read("card.md").decode()
    for line in (
        "# coco in pictures of at most 40 pixels",
        "| 000000000105 | held out by digest |",
        "| `data.image_size` | 40 |",
    ):
        assert line in card
    assert "| train | 12 | 24 | 40 / 40 / 40 | 53 / 53 / 53 | 8 / 8 / 8 | 12 | 12 |" in card
    for word in ("hours", "Hz", "keep_seconds"):
        assert word not in card


def test_single_pictures_are_those_of_the_whole(corpus: Corpus) -> None:
    whole = [rows.signal(n) for rows in map(corpus.read, corpus.groups("train")) for n in range(len(rows))]
    found = corpus.signals("train", [7, 0, 11])
    assert found.keys() == {7, 0, 11}
    assert all(np.array_equal(found[place], whole[place]) for place in found)


def test_a_shard_has_the_same_bytes_whoever_writes_it(tmp_path: Path) -> None:
    data = data_of(coco_2017(tmp_path / "coco"), tmp_path)
    for name in ("one", "two"):
        source = source_of(data)
        for shard in source.shards():
            write_shard(source, shard, Folder.at(str(tmp_path / name)))
    ones = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert [path.suffix for path in ones].count(".json") == len(source.shards())
    for path in ones:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_the_size_of_pictures_is_part_of_what_is_prepared_and_settings_of_sounds_are_not(
    ray_session: None, tmp_path: Path
) -> None:
    root = coco_2017(tmp_path / "coco")
    first = prepare(data_of(root, tmp_path))
    assert prepare(data_of(root, tmp_path, sample_rate=8000, keep_seconds=20.0)) == first
    other = prepare(data_of(root, tmp_path, image_size=32))
    assert other.folder != first.folder
    assert other.form == Form("image", 32)


def test_what_another_corpus_is_evaluated_on_is_left_out(ray_session: None, corpus: Corpus, tmp_path: Path) -> None:
    """A test picture of COCO under another name, in Flickr30k's layout."""
    root = karpathy(tmp_path / "flickr", "flickr30k")
    listed = corpus.read(corpus.groups("test")[0]).ids
    assert corpus.folder.local is not None
    source = pq.read_table(corpus.folder.local / "clips" / corpus.groups("test")[0].file).to_pylist()[0]["source"]
    shutil.copy(source, root / "images" / "101é.jpg")
    made = prepare(data_of(root, tmp_path, "flickr30k", held_out=[corpus.folder.uri], max_rejected=0.9))
    assert made.rejected()["held out by digest"] == 1
    assert made.clips("train") == 7
    assert listed[0] in made.manifest["leaks"][0]["detail"]
    with pytest.raises(SettingsError, match=r"data\.held_out: .*images of 40 pixels.*images of 32 pixels.*data\.image_size 32"):
        prepare(data_of(root, tmp_path, "flickr30k", held_out=[corpus.folder.uri], image_size=32))
    with pytest.raises(SettingsError, match=r"data\.held_out: .*images of 40 pixels.*16000 Hz"):
        prepare(DataSettings(prepared=str(tmp_path), held_out=[corpus.folder.uri]))


def test_too_many_that_cannot_be_used_refuse_the_corpus(ray_session: None, tmp_path: Path) -> None:
    root = spoilt_coco(tmp_path / "coco")
    told = rf"data\.max_rejected is 0\.1: 4 of 22 images were set aside .* below {root} are \d+ pictures"
    with pytest.raises(SettingsError, match=told):  # those that planning finds: nothing is decoded
        prepare(data_of(root, tmp_path))
    with pytest.raises(SettingsError, match=r"data\.max_rejected is 0\.2: 5 of 22 images were set aside"):
        prepare(data_of(root, tmp_path, max_rejected=0.2))


def test_the_digest_is_of_pixels_and_shape() -> None:
    pixels = load_scene((16, 24))
    one = Picture("a", "train", ("x",), pixels, "file")
    assert one.digest == Picture("b", "test", ("y",), pixels.copy(), "other").digest
    assert one.digest != Picture("a", "train", ("x",), pixels.reshape(24, 16, 3), "file").digest
    assert one.digest == digest_bytes(b"(16, 24, 3)" + pixels.tobytes())
    row = one.row()
    assert (row["height"], row["width"], len(row["pixels"])) == (16, 24, 16 * 24 * 3)


def load_scene(shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(scene(1, (shape[1], shape[0]))[0])


def test_the_list_tells_where_the_pictures_came_from(corpus: Corpus) -> None:
    origin = corpus.manifest["origin"]
    assert origin["layout"].startswith("COCO 2017: val2017 is the test split")
    assert set(origin["lists"]) == {"annotations/captions_train2017.json", "annotations/captions_val2017.json"}
    assert json.loads(corpus.folder.read("manifest.json"))["image_size"] == 40
    assert load(Path(origin["folder"]) / "val2017" / "000000000013.jpg", 40).shrunk
