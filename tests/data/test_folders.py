"""A folder with a manifest: manifests of three kinds, what is refused, and the recordings below a folder."""

import csv
import errno
import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import FolderSettings, SettingsError
from ask_ray.data import folders
from ask_ray.data.folders import Tree
from ask_ray.data.rows import Row
from ask_ray.storage import StorageError


def rows_in(folder: Path, **folder_settings) -> list[Row]:
    """Rows of a folder's manifest, without the recordings that it does not name."""
    listing = folders.folder(FolderSettings(path=str(folder), **folder_settings))
    return [row for row in listing.rows if row.problem != "no caption"]


def rows_of(folder: Path, text: str | bytes, name: str = "captions.csv") -> list[Row]:
    """Rows of a manifest, by their ids."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return sorted(rows_in(folder), key=lambda row: row.id)


def refused(folder: Path, **folder_settings) -> str:
    with pytest.raises(SettingsError) as refusal:
        rows_in(folder, **folder_settings)
    return str(refusal.value)


# --- manifests


def test_a_csv_with_quotes_newlines_a_byte_order_mark_and_non_ascii_names(tmp_path):
    text = '﻿file_name,caption\r\n"Möwe, groß.wav","a ""gull"", crying\nat sea"\r\n海.flac,Wellen\r\n'
    assert [(row.id, row.path, row.captions) for row in rows_of(tmp_path, text)] == [
        ("Möwe, groß.wav", tmp_path / "Möwe, groß.wav", ('a "gull", crying\nat sea',)),
        ("海.flac", tmp_path / "海.flac", ("Wellen",)),
    ]


@pytest.mark.parametrize("word", ["12", "1e5", "007", "true", "NA", "null", "nan", "2020-01-01", "10:30", "-0.50", "#N/A"])
def test_a_caption_that_looks_like_something_else_stays_text(word, tmp_path):
    both = [{"file_name": name, "caption": word, "id": f"{word}{name}"} for name in "ab"]
    frames = {
        "csv": "file_name,caption,id\n" + "".join(f"{row['file_name']},{word},{row['id']}\n" for row in both),
        "jsonl": "".join(json.dumps(row) + "\n" for row in both),
    }
    for ending, text in frames.items():
        folder = tmp_path / ending
        folder.mkdir()
        rows = rows_of(folder, text, f"captions.{ending}")
        assert [(row.id, row.captions) for row in rows] == [(f"{word}a", (word,)), (f"{word}b", (word,))]


@given(captions=st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1), min_size=1, max_size=5))
@budget(max_examples=40, deadline=None)
def test_any_caption_survives_every_kind_of_manifest(captions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    rows = [{"file_name": f"{n}.wav", "caption": caption} for n, caption in enumerate(captions)]
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["file_name", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        found = rows_in(folder, manifest=name)
        assert {row.id: row.captions for row in found} == {row["file_name"]: (row["caption"],) for row in rows}, name


def test_captions_come_in_the_order_of_their_numbers(tmp_path):
    text = "caption_10,caption_2,file_name,caption_1,caption,captions\nten,two,a.wav,one,none,not one\n"
    assert rows_of(tmp_path, text)[0].captions == ("none", "one", "two", "ten")


def test_a_jsonl_may_leave_keys_out(tmp_path):
    text = '{"file_name":"a.wav","caption_1":"x"}\n{"file_name":"b.wav","caption_1":"y","caption_2":"z","split":"val"}\n'
    rows = rows_of(tmp_path, text, "manifest.jsonl")
    assert [(row.captions, row.split) for row in rows] == [(("x",), None), (("y", "z"), "validation")]


def test_an_id_names_the_clip_and_may_be_a_number(tmp_path):
    text = "".join(json.dumps({"file_name": f"{n}.wav", "caption": "x", "id": n}) + "\n" for n in range(3))
    assert [row.id for row in rows_of(tmp_path, text, "captions.jsonl")] == ["0", "1", "2"]
    (tmp_path / "captions.jsonl").unlink()
    rows = rows_of(tmp_path, "file_name,caption,id\na.wav,x,007\nb.wav,x,\n")
    assert [(row.id, row.path.name) for row in rows] == [("007", "a.wav"), ("b.wav", "b.wav")]


def test_audio_may_lie_below_audio_or_anywhere(tmp_path, write_audio):
    for name in ("here.wav", "audio/there.wav", "audio/both.wav", "both.wav"):
        write_audio(tmp_path / name)
    elsewhere = write_audio(tmp_path.parent / "elsewhere.wav")
    text = f"id,file_name,caption\n1,here.wav,x\n2, there.wav ,x\n3,both.wav,x\n4,{elsewhere},x\n5,no.wav,x\n"
    expected = [tmp_path / "here.wav", tmp_path / "audio/there.wav", tmp_path / "both.wav", elsewhere, tmp_path / "no.wav"]
    rows = rows_of(tmp_path, text)
    assert [row.path for row in rows] == expected
    assert [row.problem for row in rows] == [None, None, None, None, "missing file"]
    assert rows[4].detail == f"looked for {tmp_path / 'no.wav'} and {tmp_path / 'audio' / 'no.wav'}"


def test_a_named_manifest_may_lie_elsewhere(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mine.csv").write_text("file_name,caption\na.wav,x\n")
    for manifest in ("../lists/mine.csv", str(tmp_path / "lists" / "mine.csv")):
        (row,) = rows_in(tmp_path / "corpus", manifest=manifest)
        assert row.path == tmp_path / "corpus" / "a.wav"


# --- refusals


def test_a_missing_folder_is_refused_by_name(tmp_path):
    message = refused(tmp_path / "no")
    assert message.startswith("data.folder.path: ")
    assert str(tmp_path / "no") in message


def test_a_missing_manifest_says_what_was_looked_for(tmp_path):
    message = refused(tmp_path)
    for word in ("data.folder.manifest: ", str(tmp_path), "captions.csv", "manifest.jsonl", "captions.parquet"):
        assert word in message
    assert message.endswith("the folder holds nothing")
    assert str(tmp_path / "mine.csv") in refused(tmp_path, manifest="mine.csv")


def test_a_folder_without_a_manifest_is_told_with_what_is_in_it(tmp_path):
    touch(tmp_path, "audio/a.wav", *(f"{n}.txt" for n in range(9)))
    assert refused(tmp_path).endswith(f"the folder holds {', '.join(f'{n}.txt' for n in range(8))} and 2 more")


def test_of_two_manifests_one_has_to_be_named(tmp_path):
    for name in ("captions.csv", "manifest.jsonl"):
        (tmp_path / name).write_text("file_name,caption\na.wav,x\n")
    assert "captions.csv, manifest.jsonl are there" in refused(tmp_path)
    assert rows_in(tmp_path, manifest="captions.csv")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("captions.csv", "path;text\na.wav;x\n", "path;text"),
        ("captions.csv", "file_name,text\na.wav,x\n", "file_name, text"),
        ("captions.csv", "path,caption\na.wav,x\n", "path, caption"),
        ("captions.csv", "file_name,caption_x\na.wav,x\n", "file_name, caption_x"),
        ("captions.jsonl", '{"wav": "a.wav", "caption": "x"}\n', "wav, caption"),
        ("captions.csv", "", "Empty"),
        pytest.param("captions.csv", "x" * 200_000, "field larger than field limit", id="a header of one word"),
        ("captions.csv", "file_name,caption\na.wav,x,y\n", "Expected 2 columns, got 3"),
        ("captions.csv", "file_name,caption\na.wav,ü\n".encode("latin-1"), "utf-8"),
        ("captions.csv", "file_name,caption\na.wav,ü\n".encode("utf-16"), "utf-8"),
        ("captions.jsonl", '{"file_name": "a.wav"\n', "cannot be read"),
        ("captions.jsonl", '[{"file_name": "a.wav", "caption": "x"}]\n', "cannot be read"),
        ("captions.parquet", b"no parquet at all", "cannot be read"),
        ("mine.txt", "file_name,caption\na.wav,x\n", ".parquet"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_what_is_wrong(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(tmp_path, manifest=name)
    assert message.startswith("data.folder.manifest: ")
    assert name in message
    assert told in message


# --- the files below a folder


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_recordings_that_no_list_names_are_listed(tmp_path):
    touch(tmp_path, "a.wav", "audio/b.FLAC", "audio/deep/er/c.mp3", "notes.txt", ".hidden.wav", ".cache/d.wav", "captions.txt")
    (tmp_path / "captions.csv").write_text("file_name,caption\na.wav,x\n")
    rows = folders.folder(FolderSettings(path=str(tmp_path))).rows
    assert [(row.id, row.problem) for row in rows] == [
        ("a.wav", None), ("audio/b.FLAC", "no caption"), ("audio/deep/er/c.mp3", "no caption")
    ]  # fmt: skip


def test_a_recording_is_found_in_its_section_or_in_none_but_never_in_another(tmp_path):
    touch(tmp_path, "waveforms/train/a.wav", "waveforms/test/a.flac", "waveforms/test/b.wav", "c.ogg")
    tree = Tree(str(tmp_path), "s", {"train": ("train",), "test": ("test",)})
    assert tree.find("train", "a.wav") == tmp_path / "waveforms/train/a.wav"
    assert tree.find("test", "a.wav") == tmp_path / "waveforms/test/a.flac"
    assert tree.find("train", "b.wav") is None
    assert tree.find("train", "no.wav", "c.wav") == tree.find("test", "c") == tmp_path / "c.ogg"
    assert [row.id for row in tree.without_caption()] == ["waveforms/test/b.wav"]


def test_of_one_name_with_two_endings_the_one_that_is_asked_for_is_taken(tmp_path):
    touch(tmp_path, "a.flac", "a.wav", "v1.0 bell.wav")
    tree = Tree(str(tmp_path), "s")
    assert tree.find("any", "a.wav") == tmp_path / "a.wav"
    assert tree.find("any", "a.mp3") == tmp_path / "a.flac"
    assert tree.find("any", "v1.0 bell") == tmp_path / "v1.0 bell.wav"


@pytest.mark.parametrize(("on_disk", "in_list"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_written_either_way(on_disk, in_list, tmp_path):
    touch(tmp_path, unicodedata.normalize(on_disk, "Möwe é.wav"))
    assert Tree(str(tmp_path), "s").find("any", unicodedata.normalize(in_list, "Möwe é.wav")) is not None


def test_links_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, "elsewhere/a.wav")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "audio").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "corpus")
    tree = Tree(str(tmp_path / "corpus"), "s")
    assert tree.find("any", "a.wav") == tmp_path / "corpus/audio/a.wav"
    assert len(tree.without_caption()) == 0


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    """But for what a disk's system keeps to itself. (Whoever may list everything runs this too.)"""
    shut, listing = [tmp_path / "lost+found", tmp_path / "test"], os.scandir
    for folder in shut:
        folder.mkdir()

    def scandir(path: str) -> object:
        if Path(path) in shut:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SettingsError, match=rf"^--x: {tmp_path / 'test'} cannot be listed: Permission denied; let it be read"):
        Tree(str(tmp_path), "--x")
    (tmp_path / "test").rmdir()
    assert Tree(str(tmp_path), "--x").held == 0


def test_a_home_that_nobody_has_is_refused(tmp_path):
    with pytest.raises(StorageError, match=r"^~nobody-of-this-name/x is no path on this machine"):
        Tree("~nobody-of-this-name/x", "--x")


def test_of_two_lists_of_one_name_neither_is_guessed(tmp_path):
    touch(tmp_path, "one/train.csv", "two/train.csv")
    with pytest.raises(SettingsError, match=r"one/train.csv, two/train.csv") as refusal:
        Tree(str(tmp_path), "data.audiocaps.path").named("train.csv")
    assert str(refusal.value).startswith("data.audiocaps.path: ")


def test_a_wrong_folder_is_told_with_what_is_in_it(tmp_path):
    touch(tmp_path, "audio/a.wav", *(f"{n}.txt" for n in range(9)))
    told = str(Tree(str(tmp_path), "data.clotho.path").is_not("Clotho", "clotho_captions_development.csv"))
    for word in ("data.clotho.path: ", str(tmp_path), "clotho_captions_development.csv", "0.txt", "and 2 more", "1 recordings"):
        assert word in told
    assert os.listdir(tmp_path)  # noqa: PTH208
