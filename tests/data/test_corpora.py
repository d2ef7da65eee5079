"""Sources: manifests of three kinds, rows set aside with a reason, stable splits, a bank of recordings."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import DataSettings, FolderSettings, SettingsError, SoundscapeSettings
from ask_ray.data.corpora import FolderSource, Shard, SoundscapeSource, source_of
from ask_ray.data.schema import SPLITS, Clip, Rejection

HELD_OUT = {"validation": 0.0, "test": 0.0}


def folder_source(folder: Path, shard_clips: int = 256, **folder_settings) -> FolderSource:
    settings = FolderSettings(path=str(folder), **folder_settings)
    made = source_of(DataSettings(corpus="folder", folder=settings, shard_clips=shard_clips))
    assert isinstance(made, FolderSource)
    return made


def rows_of(folder: Path, text: str | bytes, name: str = "captions.csv") -> list:
    """Rows of a manifest, in its order."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = folder_source(folder, **HELD_OUT).rows
    return sorted(rows, key=lambda row: row.id)


def refused(folder: Path, **folder_settings) -> str:
    with pytest.raises(SettingsError) as refusal:
        folder_source(folder, **folder_settings)
    return str(refusal.value)


def splits_of(source: FolderSource) -> dict[str, list[str]]:
    return {split: [row.id for row in source.rows if row.split == split and not row.problem] for split in SPLITS}


def ids_of(source: FolderSource, split: str) -> list[str]:
    return [source.rows[n].id for shard in source.shards() if shard.split == split for n in range(shard.first, shard.last)]


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
        found = folder_source(folder, manifest=name, **HELD_OUT).rows
        assert {row.id: row.captions for row in found} == {row["file_name"]: (row["caption"],) for row in rows}, name


def test_captions_come_in_the_order_of_their_numbers(tmp_path):
    text = "caption_10,caption_2,file_name,caption_1,caption,captions\nten,two,a.wav,one,none,not one\n"
    assert rows_of(tmp_path, text)[0].captions == ("none", "one", "two", "ten")


def test_a_jsonl_may_leave_keys_out(tmp_path):
    text = '{"file_name":"a.wav","caption_1":"x"}\n{"file_name":"b.wav","caption_1":"y","caption_2":"z","split":"val"}\n'
    rows = rows_of(tmp_path, text, "manifest.jsonl")
    assert [(row.captions, row.split) for row in rows] == [(("x", None), "train"), (("y", "z"), "validation")]


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
    assert [row.path for row in rows_of(tmp_path, text)] == expected


def test_a_named_manifest_may_lie_elsewhere(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mine.csv").write_text("file_name,caption\na.wav,x\n")
    for manifest in ("../lists/mine.csv", str(tmp_path / "lists" / "mine.csv")):
        row = folder_source(tmp_path / "corpus", manifest=manifest, **HELD_OUT).rows[0]
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
    assert str(tmp_path / "mine.csv") in refused(tmp_path, manifest="mine.csv")


def test_of_two_manifests_one_has_to_be_named(tmp_path):
    for name in ("captions.csv", "manifest.jsonl"):
        (tmp_path / name).write_text("file_name,caption\na.wav,x\n")
    assert "captions.csv, manifest.jsonl are there" in refused(tmp_path)
    assert folder_source(tmp_path, manifest="captions.csv").rows


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("captions.csv", "path;text\na.wav;x\n", "path;text"),
        ("captions.csv", "file_name,text\na.wav,x\n", "file_name, text"),
        ("captions.csv", "path,caption\na.wav,x\n", "path, caption"),
        ("captions.csv", "file_name,caption_x\na.wav,x\n", "file_name, caption_x"),
        ("captions.jsonl", '{"wav": "a.wav", "caption": "x"}\n', "wav, caption"),
        ("captions.csv", "", "Empty"),
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


# --- rows set aside


def test_rows_that_cannot_be_used_are_set_aside_with_a_reason(tmp_path, write_audio):
    for name in ("a.wav", "b.wav", "c.wav"):
        write_audio(tmp_path / name)
    (tmp_path / "captions.csv").write_text(
        "id,file_name,caption,split\n"
        "1,a.wav,x,train\n"
        "1,b.wav,again,train\n"
        "2,,nameless,train\n"
        "3,c.wav,x,holdout\n"
        "4,b.wav, ,train\n"
        "5,no.wav,x,test\n"
        f"6,{'x' * 300}.wav,x,train\n"
    )
    source = folder_source(tmp_path)
    early = {(one.id, one.reason) for one in source.early_rejections()}
    assert early == {("1", "duplicate id"), ("2", "no file name"), ("3", "unknown split")}
    found = [item for shard in source.shards() for item in source.clips(shard)]
    assert [(item.id, item.captions) for item in found if isinstance(item, Clip)] == [("1", ("x",))]
    late = {(item.id, item.reason) for item in found if isinstance(item, Rejection)}
    assert late == {("4", "empty caption"), ("5", "missing file"), ("6", "missing file")}
    assert all(item.source for item in found)
    assert source.key()


def test_a_clip_keeps_the_captions_that_have_text(tmp_path, write_audio):
    write_audio(tmp_path / "a.wav", rate=44100, channels=2)
    (tmp_path / "captions.csv").write_text("file_name,caption_1,caption_2,caption_3\na.wav,,  x ,y\n")
    source = folder_source(tmp_path, **HELD_OUT)
    (clip,) = source.clips(source.shards()[0])
    assert isinstance(clip, Clip)
    assert (clip.captions, clip.split, clip.rate, clip.waveform.dtype) == (("x", "y"), "train", 16000, np.dtype(np.int16))
    assert len(clip.waveform) == 8000


# --- splits


def manifest(names) -> str:
    return "file_name,caption\n" + "".join(f"{name}.wav,x\n" for name in names)


@given(count=st.integers(1, 60), validation=st.floats(0, 0.6), test=st.floats(0, 0.39), seed=st.integers(0, 9))
@budget(max_examples=40, deadline=None)
def test_splits_have_exact_sizes_and_are_disjoint(count, validation, test, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    names = [f"{seed}-{n}" for n in range(count)]
    (folder / "captions.csv").write_text(manifest(names))
    split = splits_of(folder_source(folder, validation=validation, test=test))
    assert (len(split["validation"]), len(split["test"])) == (round(count * validation), round(count * test))
    assert sorted(name for ids in split.values() for name in ids) == sorted(f"{name}.wav" for name in names)


def test_the_split_does_not_depend_on_the_order_of_rows(tmp_path):
    found = []
    for order in (1, -1):
        (tmp_path / "captions.csv").write_text(manifest(range(50)[::order]))
        source = folder_source(tmp_path)
        found.append((splits_of(source), [ids_of(source, split) for split in SPLITS]))
    assert found[0] == found[1]


def test_added_rows_move_few_clips(tmp_path):
    (tmp_path / "captions.csv").write_text(manifest(range(200)))
    before = {name: split for split, names in splits_of(folder_source(tmp_path)).items() for name in names}
    (tmp_path / "captions.csv").write_text(manifest([*range(1000, 1020), *range(200)]))
    after = {name: split for split, names in splits_of(folder_source(tmp_path)).items() for name in names}
    moved = [name for name in before if before[name] != after[name]]
    assert len(moved) <= 12
    assert not any({before[name], after[name]} == {"train", "validation"} for name in moved)


def test_a_given_split_is_kept_and_its_synonyms_are_known(tmp_path):
    words = {"train": "train", "VAL": "validation", "valid": "validation", "dev": "validation", " validation ": "validation"}
    words |= {"test": "test", "eval": "test", "Evaluation": "test"}
    rows = "".join(f"{n}.wav,x,{word}\n" for n, word in enumerate(words))
    source_text = "file_name,caption,split\n" + rows + "free.wav,x,\n"
    found = {row.id: row.split for row in rows_of(tmp_path, source_text)}
    assert found == {f"{n}.wav": split for n, split in enumerate(words.values())} | {"free.wav": "train"}


def test_shards_hold_every_usable_row_once_and_one_split_each(tmp_path):
    (tmp_path / "captions.csv").write_text(manifest([*range(50), 3, 4]))
    source = folder_source(tmp_path, shard_clips=8)
    shards = source.shards()
    places = [place for shard in shards for place in range(shard.first, shard.last)]
    assert sorted(places) == [n for n, row in enumerate(source.rows) if not row.problem]
    assert len(places) == 50
    assert all(0 < shard.last - shard.first <= 8 for shard in shards)
    assert all(row.split == shard.split for shard in shards for row in source.rows[shard.first : shard.last])
    assert len({shard.name for shard in shards}) == len(shards)


def test_the_key_changes_with_a_recording_and_with_a_caption(tmp_path, write_audio):
    def key(caption: str) -> str:
        (tmp_path / "captions.csv").write_text(f"file_name,caption\na.wav,{caption}\n")
        return folder_source(tmp_path, **HELD_OUT).key()

    write_audio(tmp_path / "a.wav")
    first = key("x")
    assert key("x") == first
    assert key("y") != first
    write_audio(tmp_path / "a.wav", seconds=0.6)
    assert key("x") != first


# --- soundscapes


def test_soundscapes_are_planned_as_asked():
    made = DataSettings(shard_clips=4, soundscapes=SoundscapeSettings(train=9, validation=0, test=4))
    source = source_of(made)
    assert isinstance(source, SoundscapeSource)
    expected = [("train", 0, 0, 4), ("train", 1, 4, 8), ("train", 2, 8, 9), ("test", 0, 0, 4)]
    assert source.shards() == [Shard(*parts) for parts in expected]
    assert source.early_rejections() == []


def test_a_shard_does_not_depend_on_the_size_of_shards():
    made = [DataSettings(shard_clips=size, soundscapes=SoundscapeSettings(train=6, seconds=1.0)) for size in (2, 6)]
    found = []
    for data in made:
        source = source_of(data)
        shards = [shard for shard in source.shards() if shard.split == "train"]
        found.append([(clip.id, clip.captions, clip.waveform.tobytes()) for shard in shards for clip in source.clips(shard)])
    assert found[0] == found[1]


def banked(folder: Path) -> DataSettings:
    return DataSettings(soundscapes=SoundscapeSettings(train=4, seconds=2.0, bank=str(folder), max_events=1))


def test_soundscapes_may_be_composed_from_a_bank_of_recordings(tmp_path, write_audio):
    for n, hz in enumerate((500, 2000, 4000)):
        write_audio(tmp_path / "audio" / f"{n}.flac", rate=44100, hz=hz, channels=2)
    (tmp_path / "quiet.wav").write_bytes(b"")
    rows = "".join(f"{n}.flac,A tone number {n} sounds.\n" for n in range(3))
    (tmp_path / "captions.csv").write_text(f"file_name,caption\n{rows}quiet.wav,x\ngone.wav,y\n0.flac,...\n1.flac,\n")
    source = source_of(banked(tmp_path))
    clips = list(source.clips(source.shards()[0]))
    assert len(clips) == 4
    for clip in clips:
        assert isinstance(clip, Clip)
        (number,) = {n for n in range(3) if all(f"a tone number {n} sounds" in text.lower() for text in clip.captions)}
        power = np.abs(np.fft.rfft(clip.waveform.astype(float)))
        assert np.argmax(power) / 2.0 == pytest.approx((500, 2000, 4000)[number], abs=5)
    rejected = sorted((one.id, one.reason) for one in source.early_rejections())
    assert rejected == [
        ("0.flac", "empty caption"),
        ("1.flac", "empty caption"),
        ("gone.wav", "missing file"),
        ("quiet.wav", "empty"),
    ]


def test_a_bank_that_cannot_be_used_is_refused_by_name(tmp_path):
    with pytest.raises(SettingsError, match=r"^data\.soundscapes\.bank") as refusal:
        source_of(banked(tmp_path / "no")).key()
    assert str(tmp_path / "no") in str(refusal.value)
    (tmp_path / "captions.csv").write_text("file_name,caption\ngone.wav,y\n")
    with pytest.raises(SettingsError, match=r"^data\.soundscapes\.bank: none of the 1 recordings"):
        source_of(banked(tmp_path)).early_rejections()


def test_the_key_of_soundscapes_changes_with_the_bank(tmp_path, write_audio):
    keys = []
    for n in range(2):
        write_audio(tmp_path / str(n) / "a.wav", hz=300 + n)
        (tmp_path / str(n) / "captions.csv").write_text("file_name,caption\na.wav,x\n")
        keys.append(source_of(banked(tmp_path / str(n))).key())
    assert keys[0] != keys[1]
    assert source_of(DataSettings()).key() == ""
