"""Sources: what cannot be used is set aside with a reason, shards hold every row once, a bank of recordings."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ask_ray.config import DataSettings, FolderSettings, SettingsError, SoundscapeSettings
from ask_ray.data.corpora import RecordingSource, Shard, SoundscapeSource, source_of
from ask_ray.data.held_out import HeldOut
from ask_ray.data.prepare import write_shard
from ask_ray.data.rows import rows_of
from ask_ray.data.schema import BY_DIGEST, BY_SOURCE, Clip, Rejection
from ask_ray.storage import Folder, StorageError

HELD_OUT = {"validation": 0.0, "test": 0.0}

#: A file of Linux whose first bytes cannot be read: the error is that of a failing disk (EIO).
FAILING = Path("/proc/self/mem")


def folder_source(folder: Path, shard_clips: int = 256, **folder_settings) -> RecordingSource:
    settings = FolderSettings(path=str(folder), **folder_settings)
    made = source_of(DataSettings(corpus="folder", folder=settings, shard_clips=shard_clips))
    assert isinstance(made, RecordingSource)
    return made


def write_manifest(folder: Path, names: Iterable[object]) -> None:
    """A manifest, and its recordings."""
    files = [f"{name}.wav" for name in names]
    for file in files:
        (folder / file).write_bytes(b"x")
    (folder / "captions.csv").write_text("file_name,caption\n" + "".join(f"{file},x\n" for file in files))


# --- rows set aside


def test_rows_that_cannot_be_used_are_set_aside_with_a_reason(tmp_path, write_audio):
    for name in ("a.wav", "b.wav", "c.wav"):
        write_audio(tmp_path / name)
    (tmp_path / "void.wav").write_bytes(b"")
    (tmp_path / "captions.csv").write_text(
        "id,file_name,caption,split\n"
        "1,a.wav,x,train\n"
        "1,b.wav,again,train\n"
        "2,,nameless,train\n"
        "3,c.wav,x,holdout\n"
        "4,b.wav, ,train\n"
        "5,no.wav,x,test\n"
        f"6,{'x' * 300}.wav,x,train\n"
        "7,void.wav,x,test\n"
    )
    source = folder_source(tmp_path)
    early = {one.id: one.reason for one in source.early_rejections()}
    bad = {"1": "duplicate id", "2": "no file name", "3": "unknown split", "5": "missing file", "6": "missing file"}
    assert early == bad | {"4": "empty caption", "7": "empty"}
    (clip,) = (item for shard in source.shards() for item in source.clips(shard))
    assert isinstance(clip, Clip)
    assert (clip.id, clip.captions, clip.source) == ("1", ("x",), str(tmp_path / "a.wav"))
    assert source.key()


@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("fault", ["gone", "a folder", "failing"])
def test_a_file_that_only_this_node_cannot_read_is_not_set_aside(fault, banked, tmp_path, write_audio):
    path = write_audio(tmp_path / "a.wav")
    (tmp_path / "captions.csv").write_text("file_name,caption,split\na.wav,x,train\n")
    source = source_of(banked_on(tmp_path)) if banked else folder_source(tmp_path)
    path.unlink()
    if fault == "a folder":
        path.mkdir()
    elif fault == "failing":
        path.symlink_to(FAILING)
    with pytest.raises(StorageError, match=rf"^{path} was there .* Every node must see the same files"):
        source.early_rejections() if banked else list(source.clips(source.shards()[0]))


def test_what_a_file_holds_is_its_own_fault(tmp_path, write_audio):
    (tmp_path / "a.wav").write_text("no recording")
    (tmp_path / "captions.csv").write_text("file_name,caption,split\na.wav,x,train\n")
    source = folder_source(tmp_path)
    (item,) = source.clips(source.shards()[0])
    assert isinstance(item, Rejection)
    assert item.reason == "unreadable"


def test_names_that_are_no_utf_8_are_found_and_told(tmp_path, write_audio):
    """A folder that was packed where names are ISO-8859-1, and a recording there that no list names."""
    root = tmp_path / "in"
    odd = Path(os.fsdecode(os.fsencode(root) + b"/M\xf6we"))
    odd.mkdir(parents=True)
    write_audio(root / "a.wav").rename(odd / "a.wav")
    (odd / "b.wav").write_text("no recording")
    write_audio(root / "c.wav").rename(os.fsdecode(os.fsencode(root) + b"/B\xe4r.wav"))
    (root / "train.csv").write_text("file_name,caption\na.wav,x\nb.wav,y\n")
    source = source_of(DataSettings.model_validate({"corpus": "audiocaps", "audiocaps": {"path": str(root)}}))
    assert [(one.id, one.reason) for one in source.early_rejections()] == [(r"B\xe4r.wav", "no caption")]
    (shard,) = source.shards()
    summary = write_shard(source, shard, Folder.at(str(tmp_path / "out")))
    assert (summary["clips"], summary["reasons"]) == (1, {"unreadable": 1})
    kept, aside = (pq.read_table(tmp_path / "out" / name / "train-000000.parquet") for name in ("clips", "rejected"))
    assert kept.column("source").to_pylist() == [str(root / r"M\xf6we" / "a.wav")]
    assert aside.column("source").to_pylist() == [str(root / r"M\xf6we" / "b.wav")]


def test_a_clip_keeps_the_captions_that_have_text(tmp_path, write_audio):
    write_audio(tmp_path / "a.wav", rate=44100, channels=2)
    (tmp_path / "captions.csv").write_text("file_name,caption_1,caption_2,caption_3\na.wav,,  x ,y\n")
    source = folder_source(tmp_path, **HELD_OUT)
    (clip,) = source.clips(source.shards()[0])
    assert isinstance(clip, Clip)
    assert (clip.captions, clip.split, clip.rate, clip.waveform.dtype) == (("x", "y"), "train", 16000, np.dtype(np.int16))
    assert len(clip.waveform) == 8000


def test_a_given_split_is_kept_and_its_synonyms_are_known(tmp_path):
    words = {"train": "train", "VAL": "validation", "valid": "validation", "dev": "validation", " validation ": "validation"}
    words |= {"test": "test", "eval": "test", "Evaluation": "test"}
    write_manifest(tmp_path, [*range(len(words)), "free"])
    rows = "".join(f"{n}.wav,x,{word}\n" for n, word in enumerate(words))
    (tmp_path / "captions.csv").write_text("file_name,caption,split\n" + rows + "free.wav,x,\n")
    found = {row.id: row.split for row in rows_of(folder_source(tmp_path, **HELD_OUT).rows)}
    assert found == {f"{n}.wav": split for n, split in enumerate(words.values())} | {"free.wav": "train"}


def test_shards_hold_every_usable_row_once_and_one_split_each(tmp_path):
    write_manifest(tmp_path, [*range(50), 3, 4])
    source = folder_source(tmp_path, shard_clips=8)
    shards = source.shards()
    places = [place for shard in shards for place in range(shard.first, shard.last)]
    rows = list(rows_of(source.rows))
    assert sorted(places) == list(range(len(rows)))
    assert len(places) == 50
    assert all(0 < shard.last - shard.first <= 8 for shard in shards)
    assert all(row.split == shard.split for shard in shards for row in rows[shard.first : shard.last])
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


HERTZ = (500, 2000, 4000, 3000, 1000)


def banked_on(folder: Path) -> DataSettings:
    return DataSettings(
        soundscapes=SoundscapeSettings(train=8, validation=0, test=8, seconds=2.0, bank=str(folder), max_events=1)
    )


def tones(folder: Path, write_audio: Callable[..., Path], rows: str) -> SoundscapeSource:
    """A bank of five tones, named after their numbers, with a manifest of id, split and source id."""
    for n in range(5):
        write_audio(folder / "audio" / f"{n}.flac", rate=44100, hz=HERTZ[n], channels=2)
    (folder / "captions.csv").write_text(f"file_name,caption,split,source_id\n{rows}")
    source = source_of(banked_on(folder), HeldOut(source_ids={"freesound:7": "test clip '7' of another corpus"}))
    assert isinstance(source, SoundscapeSource)
    return source


def heard(source: SoundscapeSource, split: str) -> set[int]:
    """The tones that a split's scenes are made of; each is where the caption says it."""
    numbers = set()
    for clip in source.clips(next(shard for shard in source.shards() if shard.split == split)):
        assert isinstance(clip, Clip)
        (number,) = {n for n in range(5) if all(f"a tone number {n} sounds" in text.lower() for text in clip.captions)}
        power = np.abs(np.fft.rfft(clip.waveform.astype(float)))
        assert np.argmax(power) / 2.0 == pytest.approx(HERTZ[number], abs=5)
        numbers.add(number)
    return numbers


def test_soundscapes_may_be_composed_from_a_bank_of_recordings(tmp_path, write_audio):
    for name in ("quiet.wav", "5.flac"):
        (tmp_path / name).write_bytes(b"")
    rows = "".join(f"{n}.flac,A tone number {n} sounds.,{'train' if n < 3 else 'test'},\n" for n in range(4))
    source = tones(tmp_path, write_audio, f"{rows}quiet.wav,x,,\ngone.wav,y,,\n4.flac,...,,\n5.flac,,,\n")
    assert heard(source, "train") == {0, 1, 2}
    assert heard(source, "test") == {3}
    rejected = sorted((one.id, one.reason) for one in source.early_rejections())
    assert rejected == [
        ("4.flac", "empty caption"),
        ("5.flac", "empty caption"),
        ("gone.wav", "missing file"),
        ("quiet.wav", "empty"),
    ]
    assert source.recordings() == 8


def test_no_scene_to_train_on_holds_a_recording_that_is_evaluated_on(tmp_path, write_audio):
    """By source id, here (2) and elsewhere (1), and by its samples (4)."""
    told = [
        (0, "train", ""),
        (1, "train", "freesound:7"),
        (2, "train", "freesound:8"),
        (3, "test", "freesound:8"),
        (4, "train", ""),
    ]
    rows = "".join(f"{n}.flac,A tone number {n} sounds.,{split},{source}\n" for n, split, source in told)
    write_audio(tmp_path / "copy.flac", rate=44100, hz=HERTZ[4], channels=2)
    source = tones(tmp_path, write_audio, f"{rows}copy.flac,A tone number 4 sounds.,test,\n")
    assert heard(source, "train") == {0}
    assert heard(source, "test") == {3, 4}
    rejected = sorted((one.id, one.reason) for one in source.early_rejections())
    assert rejected == [("1.flac", BY_SOURCE), ("2.flac", BY_SOURCE), ("4.flac", BY_DIGEST)]


def test_a_bank_that_cannot_be_used_is_refused_by_name(tmp_path):
    with pytest.raises(SettingsError, match=r"^data\.soundscapes\.bank") as refusal:
        source_of(banked_on(tmp_path / "no"))
    assert str(tmp_path / "no") in str(refusal.value)
    (tmp_path / "sounds.txt").touch()
    with pytest.raises(SettingsError, match=r"^data\.soundscapes\.bank: looked in .*; the folder holds sounds\.txt$"):
        source_of(banked_on(tmp_path))
    (tmp_path / "captions.csv").write_text("file_name,caption\ngone.wav,y\n")
    with pytest.raises(SettingsError, match=r"^data\.soundscapes\.bank: none of the 1 recordings"):
        source_of(banked_on(tmp_path)).early_rejections()


def test_a_bank_without_a_recording_for_a_split_is_refused(tmp_path, write_audio):
    source = tones(tmp_path, write_audio, "0.flac,A tone number 0 sounds.,train,\n")
    with pytest.raises(SettingsError, match=r"^data\.soundscapes\.bank: no usable recording .* is for the split test: tell"):
        source.early_rejections()


def test_the_key_of_soundscapes_changes_with_the_bank(tmp_path, write_audio):
    keys = []
    for n in range(2):
        write_audio(tmp_path / str(n) / "a.wav", hz=300 + n)
        (tmp_path / str(n) / "captions.csv").write_text("file_name,caption\na.wav,x\n")
        keys.append(source_of(banked_on(tmp_path / str(n))).key())
    assert keys[0] != keys[1]
    assert source_of(DataSettings()).key() == ""
