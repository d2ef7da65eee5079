"""ESC-50's layout: what is listed, what is set aside, what is refused."""

import os
from pathlib import Path

import pytest

from ask_ray.config import SettingsError
from ask_ray.data import esc50 as layout


def test_the_list_says_which_sounds_there_are_and_what_is_not_named_is_set_aside(esc50: Path):
    found = layout.read(str(esc50), "--path")
    assert [clip.path.name for clip in found.clips] == [
        "1-0.wav", "2-0.wav", "1-1.wav", "2-1.wav", "1-2.wav", "2-2.wav", "cut.wav", "gone.wav"
    ]  # fmt: skip
    assert found.categories() == ["church_bells", "dog", "water_drops"]
    assert [(one.id, one.reason) for one in found.aside] == [("stray.wav", "no category")]


def test_rows_without_a_name_or_a_category_are_set_aside_by_their_number(esc50: Path):
    with (esc50 / "meta" / "esc50.csv").open("a") as stream:
        stream.write(",5,0,dog,False,1,A\nstray.wav,5,0,,False,1,A\n1-0.wav,1,0,dog,False,1,A\n")
    found = layout.read(str(esc50), "--path")
    assert [(one.source.rpartition(", ")[2], one.reason) for one in found.aside] == [
        ("row 10", "no file name"), ("row 11", "no category")
    ]  # fmt: skip
    assert len(found.clips) == 8, "a row that is there twice counts once"


def test_a_name_that_is_no_utf_8_is_told_so_that_it_can_be_printed(esc50: Path):
    (esc50 / "audio" / os.fsdecode(b"M\xf6we.wav")).write_bytes(b"x")
    aside = {one.id: one.source for one in layout.read(str(esc50), "--path").aside}
    assert aside[r"M\xf6we.wav"] == str(esc50 / "audio" / r"M\xf6we.wav")


@pytest.mark.parametrize("kept", [None, "meta", "audio"])
def test_another_folder_is_refused_with_what_was_looked_for_and_what_is_there(tmp_path: Path, kept: str | None):
    root = tmp_path / "clotho"
    if kept:
        (root / kept).mkdir(parents=True)
        (root / "captions.csv").write_text("")
    with pytest.raises(SettingsError) as refusal:
        layout.read(str(root), "--path")
    told = str(refusal.value)
    assert told.startswith(f"--path: {root} does not hold ESC-50: looked for meta/esc50.csv and audio/; found ")
    there = {
        None: "no folder to list (No such file or directory)",
        "meta": "captions.csv, meta/",
        "audio": "audio/, captions.csv",
    }
    assert told.endswith(there[kept])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,label\n1-0.wav,dog\n", r"has the columns file, label; it lacks filename, category"),
        ("filename,category\n1-0.wav,dog\n", r"names 1 categories; at least 2"),
        ("filename,category\n1-0.wav,dog\n1-0.wav,cat\n", r"row 3: 1-0.wav is of 'dog' and of 'cat'"),
        ("", r"cannot be read"),
    ],
)
def test_another_list_is_refused(esc50: Path, text: str, told: str):
    (esc50 / "meta" / "esc50.csv").write_text(text)
    with pytest.raises(SettingsError, match=told):
        layout.read(str(esc50), "--path")
