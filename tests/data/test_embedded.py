"""Parquet with the audio in it: listed without reading the audio, read forward, a few recordings at a time."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_trees import write_parquet
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import DataSettings, ParquetSettings, SettingsError
from ask_ray.data import embedded
from ask_ray.data.corpora import source_of
from ask_ray.data.rows import Row
from ask_ray.data.schema import Rejection, UnusableClip
from ask_ray.storage import StorageError


def listed(path: Path) -> list[Row]:
    return embedded.parquet(ParquetSettings(path=str(path))).rows


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """A file with the columns of the first row, `audio` from `bytes` and `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {name: pa.array([row[name] for row in rows], kind if name == "audio" else None) for name in rows[0]}
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def sound(content: bytes | None = b"x", path: str | None = None) -> dict[str, object]:
    return {"bytes": content, "path": path}


def test_splits_are_named_by_files_or_folders_and_the_order_is_theirs(trees):
    rows = listed(trees["parquet"])
    assert [row.split for row in rows] == ["test"] * 3 + ["train"] * (5 + 6 + 1)
    assert [row.place for row in rows] == [*range(3), *range(5), *range(6), 0]
    assert rows[0].id == "test-00000- 0é.wav"
    assert rows[0].captions == ("test-00000- 0é.wav sounds", "it is test-00000- 0é.wav")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00004.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("valid/part-0.parquet", "validation"),
        ("test_clean/0001.parquet", "test"),
        ("Evaluation.parquet", "test"),
        ("training/x/0.parquet", "train"),
        ("data/testing-of-guns/0.parquet", "test"),
        ("data/0001.parquet", None),
        ("contest-1.parquet", None),
    ],
)
def test_a_split_is_the_first_word_of_a_file_or_folder(path, split):
    assert embedded.split_of(Path(path)) == split


@pytest.mark.parametrize(
    ("columns", "captions"),
    [
        ({"text": "x"}, ("x",)),
        ({"caption": "x"}, ("x",)),
        ({"caption": ["x", "y"]}, ("x", "y")),
        ({"captions": ["x", None, "y"]}, ("x", "y")),
        ({"caption_2": "y", "caption_1": "x"}, ("x", "y")),
        ({"text": "t", "captions": ["x"], "caption": "c"}, ("t", "x", "c")),
    ],
)
def test_captions_come_as_text_or_lists(columns, captions, tmp_path):
    write(tmp_path / "train.parquet", [{"audio": sound(path="a.wav"), **columns}])
    assert [row.captions for row in listed(tmp_path)] == [captions]


def test_names_come_from_ids_paths_or_places(tmp_path):
    audio = [sound(path="same.wav"), sound(path="same.wav"), sound(path="dir/own.wav"), sound()]
    path = write(tmp_path / "train.parquet", [{"audio": one, "text": "x"} for one in audio])
    assert [row.id for row in listed(path)] == ["train.parquet#0", "train.parquet#1", "own.wav", "train.parquet#3"]
    write(
        path, [{"audio": one, "text": "x", "id": n, "source_id": f"freesound:{n}", "split": "dev"} for n, one in enumerate(audio)]
    )
    rows = listed(tmp_path)
    assert [(row.id, row.source_id, row.split) for row in rows] == [(str(n), f"freesound:{n}", "validation") for n in range(4)]


def test_rows_of_one_video_are_one_clip(tmp_path):
    told = [("abcdefghijk", "x"), ("abcdefghijk", "y"), ("-----------", "z")]
    write(
        tmp_path / "test.parquet",
        [{"audio": sound(), "caption": text, "youtube_id": name, "start_time": 3} for name, text in told],
    )
    rows = listed(tmp_path)
    assert [(row.id, row.captions, row.place, row.source_id) for row in rows] == [
        ("abcdefghijk", ("x", "y"), 0, "youtube:abcdefghijk"),
        ("-----------", ("z",), 2, "youtube:-----------"),
    ]


def test_other_excerpts_of_a_video_are_other_recordings(tmp_path):
    told = [("abcdefghijk", 3, "x"), ("abcdefghijk", 60, "y"), ("abcdefghijk", 3, "z")]
    write(
        tmp_path / "train.parquet",
        [{"audio": sound(), "caption": text, "youtube_id": name, "start_time": start} for name, start, text in told],
    )
    assert [(row.captions, row.place) for row in listed(tmp_path)] == [(("x", "z"), 0), (("y",), 1)]


def test_rows_of_one_id_are_one_clip_if_their_file_names_one_recording(tmp_path):
    told = [(7, "a.wav"), (7, "b.wav"), (7, "a.wav"), (8, None), (8, None), (9, "a.wav")]
    write(
        tmp_path / "train.parquet",
        [{"audio": sound(path=name), "text": f"{n}", "id": clip} for n, (clip, name) in enumerate(told)],
    )
    assert [(row.id, row.captions, row.place) for row in listed(tmp_path)] == [
        ("7", ("0", "2"), 0), ("7", ("1",), 1), ("8", ("3",), 3), ("8", ("4",), 4), ("9", ("5",), 5)
    ]  # fmt: skip
    write(tmp_path / "train.parquet", [{"audio": sound(), "text": text, "file_name": "a.wav"} for text in "xy"])
    assert [row.captions for row in listed(tmp_path)] == [("x", "y")]


def test_ids_that_begin_anew_in_each_file_are_told_as_duplicates_and_no_captions_are_mixed(tmp_path, write_audio):
    """The names of the audio begin anew, too."""
    for shard in range(2):
        rows = []
        for n in range(3):
            content = write_audio(tmp_path / "parts" / f"{shard}{n}.wav", hz=300 + 70 * n + 300 * shard).read_bytes()
            rows.append({"audio": sound(content, f"{n}.wav"), "text": f"{n} of {shard}", "id": n})
        write(tmp_path / "data" / f"train-{shard}.parquet", rows)
    source = source_of(DataSettings(corpus="parquet", parquet=ParquetSettings(path=str(tmp_path / "data"))))
    clips = [clip for shard in source.shards() for clip in source.clips(shard)]
    assert [(clip.id, clip.captions) for clip in clips] == [(str(n), (f"{n} of 0",)) for n in range(3)]
    first, second = (tmp_path / "data" / f"train-{shard}.parquet" for shard in range(2))
    assert [(one.id, one.source, one.reason, one.detail) for one in source.early_rejections()] == [
        (str(n), f"{second}#{n}", "duplicate id", f"{first}#{n} has it too") for n in range(3)
    ]


@given(places=st.sets(st.integers(0, 29)), row_group=st.integers(1, 40))
@budget(max_examples=40, deadline=None)
def test_the_asked_rows_are_read_in_order(places, row_group, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    write_parquet(path, [(f"{n}", bytes([n]) * 50, ["x"]) for n in range(30)], row_group)
    found = list(embedded.recordings(path, sorted(places)))
    assert [one.read() for one in found if isinstance(one, io.BytesIO)] == [bytes([n]) * 50 for n in sorted(places)]


@pytest.mark.parametrize(("place", "first"), [(0, 24), (-20, 40)], ids=["a page's header", "the last page's content"])
def test_behind_a_damaged_page_the_rows_of_its_group_are_set_aside_and_others_are_read(place, first, tmp_path, write_audio):
    content = write_audio(tmp_path / "a.wav", samples=np.random.default_rng(0).uniform(-0.5, 0.5, 4000)).read_bytes()
    path, kind = tmp_path / "data" / "train.parquet", pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path.parent.mkdir()
    table = pa.table({"audio": pa.array([sound(content, f"{n}.wav") for n in range(60)], kind), "text": ["x"] * 60})
    pages = {"data_page_size": 1, "write_batch_size": 8, "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, row_group_size=24, compression="zstd", **pages)
    column = pq.read_metadata(path).row_group(1).column(0)
    begin = column.data_page_offset + (place if place >= 0 else column.total_compressed_size + place)
    spoilt = bytearray(path.read_bytes())
    spoilt[begin : begin + 16] = b"\xff" * 16
    path.write_bytes(spoilt)

    source = source_of(DataSettings(corpus="parquet", shard_clips=16, parquet=ParquetSettings(path=str(path))))
    found = {int(one.id[:-4]): one for shard in source.shards() for one in source.clips(shard)}
    assert list(found) == list(range(60))
    aside = {n: one for n, one in found.items() if isinstance(one, Rejection)}
    assert list(aside) == list(range(first, 48))
    assert {one.reason for one in aside.values()} == {"unreadable"}
    for n, one in aside.items():
        assert one.source == f"{path}#{n}"
        assert f"{path}: row group 1 (rows 24 to 47) cannot be read from row " in one.detail


def damaged(path: Path, group: int) -> Path:
    """A file of rows in groups of 8, of which one has a damaged page."""
    write_parquet(path, [(f"{n}", np.random.default_rng(n).bytes(900), ["x"]) for n in range(24)], 8)
    column = pq.read_metadata(path).row_group(group).column(0)
    spoilt = bytearray(path.read_bytes())
    spoilt[column.data_page_offset : column.data_page_offset + 16] = b"\xff" * 16
    path.write_bytes(spoilt)
    return path


def test_storage_that_fails_is_not_taken_for_damage(tmp_path):
    """After the first group the file can no longer be read, as if its disk failed."""
    path = damaged(tmp_path / "a.parquet", 1)
    assert sum(isinstance(one, UnusableClip) for one in embedded.recordings(path, range(24))) == 8
    found = embedded.recordings(path, range(24))
    for _ in range(8):
        assert isinstance(next(found), io.BytesIO)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(StorageError, match=rf"^{path} was there .*Input/output error"):
        next(found)
    with pytest.raises(StorageError, match=r"gone\.parquet was there "):
        next(embedded.recordings(tmp_path / "gone.parquet", [0]))


def test_a_row_may_name_a_file_in_place_of_bytes(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        [{"audio": one, "text": "x"} for one in (sound(None, "b.wav"), sound(None), sound(b"", "b.wav"), None)],
    )
    first, *others = embedded.recordings(path, [0, 1, 2, 3])
    assert first == tmp_path / "b.wav"
    assert [one.reason for one in others if isinstance(one, UnusableClip)] == ["empty"] * 3


def test_what_is_no_such_data_set_is_refused_with_what_it_has(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(SettingsError, match=r"^data\.parquet\.path: .*\*\.parquet.*a\.txt"):
        listed(tmp_path)
    path = tmp_path / "a.parquet"
    for table in ({"audio": ["a.wav"], "text": ["x"]}, {"audio": [sound()], "label": [1]}, {"text": ["x"]}):
        pq.write_table(pa.table(table), path)
        with pytest.raises(SettingsError, match=r"^data\.parquet\.path: .*a\.parquet needs the columns audio") as refusal:
            listed(tmp_path)
        assert all(name in str(refusal.value) for name in table)
    path.write_bytes(b"no parquet")
    with pytest.raises(SettingsError, match=r"^data\.parquet\.path: .*a\.parquet cannot be read"):
        listed(path)


def test_files_of_two_folders_that_have_one_name_hold_clips_of_two_names(tmp_path):
    """As the hub itself converts data sets."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write(tmp_path / split / "0000.parquet", [{"audio": sound(), "text": "x"}])
    assert {row.id: row.split for row in listed(tmp_path)} == {"train/0000.parquet#0": "train", "test/0000.parquet#0": "test"}


def test_rows_that_name_files_are_rows_of_files(tmp_path, write_audio):
    """They are looked at before anything is decoded, as those of any list are."""
    write_audio(tmp_path / "a.wav")
    rows = [{"audio": sound(None, name), "text": f"of {name}", "split": "train"} for name in ("a.wav", "gone.wav")]
    path = write(tmp_path / "train.parquet", rows)
    assert [(row.path, row.place) for row in listed(path)] == [(tmp_path / "a.wav", None), (tmp_path / "gone.wav", None)]
    source = source_of(DataSettings(corpus="parquet", parquet=ParquetSettings(path=str(path))))
    assert [(one.id, one.reason) for one in source.early_rejections()] == [("gone.wav", "missing file")]
    (clip,) = (clip for shard in source.shards() for clip in source.clips(shard))
    assert (clip.id, clip.captions, clip.source) == ("a.wav", ("of a.wav",), str(tmp_path / "a.wav"))
