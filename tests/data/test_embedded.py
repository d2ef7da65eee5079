"""Parquet with the audio in it: listed without reading the audio, read forward, a few recordings at a time."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_trees import write_parquet
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import ParquetSettings, SettingsError
from ask_ray.data import embedded
from ask_ray.data.rows import Row
from ask_ray.data.schema import UnusableClip


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


@given(places=st.sets(st.integers(0, 29)), row_group=st.integers(1, 40))
@budget(max_examples=40, deadline=None)
def test_the_asked_rows_are_read_in_order(places, row_group, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    write_parquet(path, [(f"{n}", bytes([n]) * 50, ["x"]) for n in range(30)], row_group)
    found = list(embedded.recordings(path, sorted(places)))
    assert [one.read() for one in found if isinstance(one, io.BytesIO)] == [bytes([n]) * 50 for n in sorted(places)]


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
