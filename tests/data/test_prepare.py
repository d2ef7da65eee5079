"""Preparing on a real Ray session: every row accounted for, taken up again, the same bytes however it ran."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from corpus_trees import write_csv
from hypothesis import given
from hypothesis import strategies as st

from ask_ray import experiment, lease
from ask_ray.config import DataSettings, FolderSettings, SettingsError, SoundscapeSettings, load
from ask_ray.data.corpora import Shard, source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.held_out import HeldOut
from ask_ray.data.prepare import SHARDS, PreparingFailed, _dealt, _fingerprint, _lists, prepare, write_shard
from ask_ray.data.schema import CLIPS, REJECTED, ROW_GROUP, SPLITS
from ask_ray.storage import Folder, StorageError, digest_bytes


def walk_files(root: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in root.rglob("*") if path.is_file())


pytestmark = pytest.mark.usefixtures("ray_session")

GOOD = 20
BAD = {
    "silent": "silent",
    "nan": "not finite",
    "short": "too short",
    "no-bytes": "empty",
    "no-samples": "empty",
    "text": "unreadable",
    "cut": "unreadable",
    "gone": "missing file",
    "wordless": "empty caption",
    "twice": "duplicate id",
    "holdout": "unknown split",
    "nameless": "no file name",
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, write_audio) -> Path:
    """Twenty good recordings of several kinds and twelve bad rows, one for each way to be bad."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = ["id,file_name,caption_1,caption_2,split"]
    for n in range(GOOD):
        ending, rate = ("wav", "flac", "ogg", "mp3")[n % 4], (16000, 44100, 8000)[n % 3]
        name = f"audio/{n}.{ending}"
        write_audio(folder / name, seconds=0.3 + 0.02 * n, rate=rate, hz=300 + 20 * n, channels=1 + n % 2)
        rows.append(f"good-{n},{n}.{ending},a tone of {300 + 20 * n} hertz,{'again' if n % 5 else ''},")
    wrong = np.full(8000, 0.1)
    wrong[5] = np.nan
    write_audio(folder / "silent.wav", samples=np.zeros(8000))
    write_audio(folder / "nan.wav", samples=wrong, subtype="FLOAT")
    write_audio(folder / "short.wav", seconds=0.05)
    write_audio(folder / "no-samples.wav", samples=np.zeros(0))
    write_audio(folder / "cut.flac")
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:2000])
    (folder / "no-bytes.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no recording")
    for name in ("silent.wav", "nan.wav", "short.wav", "no-samples.wav", "cut.flac", "no-bytes.wav", "text.wav", "gone.wav"):
        rows.append(f"{Path(name).stem},{name},x,,train")
    rows += ["wordless,0.wav, ,,test", "holdout,0.wav,x,,holdout", "nameless,,x,,train", "twice,4.wav,x,,train"]
    rows += ["twice,8.wav,x,,train"]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


def folder_data(recordings: Path, prepared: Path, **changes) -> DataSettings:
    folder = FolderSettings(path=str(recordings))
    return DataSettings(
        **{"corpus": "folder", "folder": folder, "prepared": str(prepared), "max_rejected": 0.5, "shard_clips": 6} | changes
    )


def soundscape_data(prepared: Path, **changes) -> DataSettings:
    soundscapes = SoundscapeSettings(train=20, validation=3, test=5, seconds=1.0, captions=2)
    return DataSettings(
        **{"soundscapes": soundscapes, "prepared": str(prepared), "sample_rate": 8000, "shard_clips": 8} | changes
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in walk_files(folder)}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in walk_files(folder)}


def home_of(corpus: Corpus) -> Path:
    assert corpus.folder.local is not None
    return corpus.folder.local


def rows_below(folder: Path) -> list[dict]:
    return [row for path in walk_files(folder) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def folder_corpus(ray_session, recordings, tmp_path_factory) -> Corpus:
    return prepare(folder_data(recordings, tmp_path_factory.mktemp("folder")))


@pytest.fixture(scope="module")
def soundscape_corpus(ray_session, tmp_path_factory) -> Corpus:
    return prepare(soundscape_data(tmp_path_factory.mktemp("soundscapes")))


def test_nothing_is_silently_dropped_and_every_reason_is_told(folder_corpus):
    home = home_of(folder_corpus)
    clips, rejected = rows_below(home / "clips"), rows_below(home / "rejected")
    assert len(clips) + len(rejected) == GOOD + len(BAD) + 1
    assert {row["id"] for row in clips} == {f"good-{n}" for n in range(GOOD)} | {"twice"}
    assert {row["id"]: row["reason"] for row in rejected} == BAD
    assert len(rejected) == len(BAD)
    assert folder_corpus.rejected() == dict(Counter(BAD.values()))
    assert all(row["source"] for row in rejected)
    for path in walk_files(home / "rejected"):
        assert pq.read_schema(path).equals(REJECTED), path


def test_prepared_clips_are_the_recordings(folder_corpus):
    for row in rows_below(home_of(folder_corpus) / "clips"):
        if row["id"] == "twice":
            continue
        n = int(row["id"].removeprefix("good-"))
        assert row["duration"] == pytest.approx(0.3 + 0.02 * n, abs=0.08 if n % 4 == 3 else 1e-3)
        assert row["duration"] == pytest.approx(len(row["waveform"]) / 16000)
        assert row["captions"] == [f"a tone of {300 + 20 * n} hertz"] + (["again"] if n % 5 else [])
        assert Path(row["source"]).name.startswith(f"{n}.")
        power = np.abs(np.fft.rfft(row["waveform"], 1 << 16))
        assert np.argmax(power) * 16000 / (1 << 16) == pytest.approx(300 + 20 * n, abs=3)


@pytest.mark.parametrize("which", ["folder_corpus", "soundscape_corpus"])
def test_the_manifest_counts_what_the_files_hold(which, request):
    corpus = request.getfixturevalue(which)
    home = home_of(corpus)
    assert corpus.manifest == json.loads((home / "manifest.json").read_text())
    for split in SPLITS:
        told = corpus.manifest["splits"][split]
        rows = []
        for file in told["files"]:
            path = home / "clips" / file["name"]
            parquet = pq.ParquetFile(path)
            assert parquet.schema_arrow.equals(CLIPS)
            assert all(parquet.metadata.row_group(n).num_rows <= ROW_GROUP for n in range(parquet.num_row_groups))
            found = parquet.read().to_pylist()
            assert (file["clips"], file["digest"]) == (len(found), digest_of(found, corpus.sample_rate))
            rows += found
        assert all(row["split"] == split for row in rows)
        assert told["clips"] == corpus.clips(split) == len(rows)
        assert told["captions"] == sum(len(row["captions"]) for row in rows)
        assert told["most_captions"] == max(len(row["captions"]) for row in rows)
        assert told["samples"] == sum(len(row["waveform"]) for row in rows)
        assert told["seconds"] == pytest.approx(sum(row["duration"] for row in rows))
        assert told["lengths"] == {str(n): count for n, count in sorted(Counter(int(row["duration"]) for row in rows).items())}
        words = Counter(len(caption.split()) for row in rows for caption in row["captions"])
        assert told["words"] == {str(n): count for n, count in sorted(words.items())}
        assert sum(told["rates"].values()) == len(rows)
        assert all(row["digest"] == digest_bytes(np.array(row["waveform"], np.int16).tobytes()) for row in rows)
    listed = {file["name"] for split in SPLITS for file in corpus.manifest["splits"][split]["files"]}
    empty = {path.name for path in walk_files(home / "clips")} - listed
    assert all(pq.read_metadata(home / "clips" / name).num_rows == 0 for name in empty)


def digest_of(rows: list[dict], rate: int) -> str:
    """Of rows as a file gives them, in which seconds have lost digits."""
    exact = [{**row, "duration": len(row["waveform"]) / rate} for row in rows]
    lines = [json.dumps({name: row[name] for name in sorted(row) if name != "waveform"}) for row in exact]
    return digest_bytes("".join(f"{line}\n" for line in lines).encode())


def test_soundscapes_have_the_asked_sizes(soundscape_corpus):
    assert [soundscape_corpus.clips(split) for split in SPLITS] == [20, 3, 5]
    assert soundscape_corpus.rejected() == {}
    assert soundscape_corpus.sample_rate == 8000
    assert {len(row["waveform"]) for row in rows_below(home_of(soundscape_corpus) / "clips")} == {8000}


def copied(corpus: Corpus, place: Path) -> Path:
    """A prepared corpus to damage, below another `data.prepared`: its folder. Where it is kept changes nothing."""
    return shutil.copytree(home_of(corpus), place / corpus.folder.name)


def test_preparing_again_does_nothing(recordings, folder_corpus, soundscape_corpus, monkeypatch):
    for first, data in (
        (folder_corpus, folder_data(recordings, home_of(folder_corpus).parent)),
        (soundscape_corpus, soundscape_data(home_of(soundscape_corpus).parent)),
    ):
        before, stamps = contents(home_of(first)), times(home_of(first))
        with monkeypatch.context() as patch:
            patch.setattr("ask_ray.data.prepare._run", lambda *_: pytest.fail("work was done again"))
            again = prepare(data.model_copy(update={"cache_mib": 3, "prepare_tasks": 1, "max_seconds": 2.0}))
        assert again == first
        assert (contents(home_of(again)), times(home_of(again))) == (before, stamps)


def test_an_interrupted_run_is_completed_without_doing_finished_shards_again(
    recordings, folder_corpus, soundscape_corpus, tmp_path
):
    for corpus, data in ((folder_corpus, folder_data(recordings, tmp_path)), (soundscape_corpus, soundscape_data(tmp_path))):
        home = copied(corpus, tmp_path)
        before, stamps = contents(home), times(home)
        lost = sorted((home / "clips").iterdir())[1]
        lost.unlink()
        (home / "manifest.json").unlink()
        redone = {"manifest.json", "card.md", f"clips/{lost.name}", f"rejected/{lost.name}", f"summaries/{lost.stem}.json"}
        redone |= {"rejected/planning.parquet"} & set(before)
        assert home_of(prepare(data)) == home
        after = times(home)
        assert contents(home) == before
        assert {name for name in before if after[name] != stamps[name]} == redone


def test_a_shard_without_its_summary_is_done_again(soundscape_corpus, tmp_path):
    home = copied(soundscape_corpus, tmp_path)
    before = contents(home)
    (home / "manifest.json").unlink()
    sorted((home / "summaries").iterdir())[0].unlink()
    assert home_of(prepare(soundscape_data(tmp_path))) == home
    assert contents(home) == before


def test_the_files_do_not_depend_on_the_number_of_tasks(recordings, folder_corpus, soundscape_corpus, tmp_path):
    assert DataSettings().prepare_tasks == 2
    for two, data in ((folder_corpus, folder_data(recordings, tmp_path)), (soundscape_corpus, soundscape_data(tmp_path))):
        one = prepare(data.model_copy(update={"prepare_tasks": 1}))
        assert contents(home_of(one)) == contents(home_of(two))
        assert one.folder.name == two.folder.name


def name_of(data: DataSettings) -> str:
    """The name of the folder that a corpus would be prepared in."""
    held_out = HeldOut.named(data.held_out, data.form)
    return f"{data.corpus}-{_fingerprint(data, source_of(data, held_out), held_out)}"


def test_what_changes_the_clips_changes_the_folder(tmp_path, write_audio):
    os.utime(write_audio(tmp_path / "in" / "a.wav"), ns=(0, 0))  # long before it is changed below, however fast that comes
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\na.wav,x\n")
    data = folder_data(tmp_path / "in", tmp_path / "out", folder=FolderSettings(path=str(tmp_path / "in"), validation=0, test=0))
    names = {prepare(data).folder.name}
    assert names == {name_of(data)}
    for change in ({"sample_rate": 8000}, {"min_seconds": 0.2}, {"shard_clips": 7}):
        names.add(name_of(data.model_copy(update=change)))
    write_audio(tmp_path / "in" / "a.wav", hz=500.0)
    names.add(name_of(data))
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\na.wav,y\n")
    names.add(name_of(data))
    assert len(names) == 6


def test_too_many_bad_rows_are_refused_and_repairing_the_limit_is_enough(recordings, tmp_path):
    share = len(BAD) / (GOOD + len(BAD) + 1)
    with pytest.raises(SettingsError) as refusal:
        prepare(folder_data(recordings, tmp_path, max_rejected=share - 0.01))
    message = str(refusal.value)
    assert message.startswith("data.max_rejected is ")
    assert f"{len(BAD)} of {GOOD + len(BAD) + 1} clips" in message
    for reason in set(BAD.values()):
        assert reason in message
    (home,) = tmp_path.iterdir()
    assert str(home / "rejected") in message
    assert not (home / "manifest.json").exists()
    assert len(rows_below(home / "rejected")) == len(BAD)
    stamps = times(home / "clips")
    assert prepare(folder_data(recordings, tmp_path, max_rejected=share + 0.001)).clips("train") > 0
    assert times(home / "clips") == stamps


def undecoded(data: DataSettings) -> str:
    """The message of a corpus that is refused before anything is decoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ask_ray.data.prepare._run", lambda *_: pytest.fail("something was decoded"))
        with pytest.raises(SettingsError) as refusal:
            prepare(data)
    return str(refusal.value)


def test_what_planning_sets_aside_is_held_against_the_limit_before_anything_is_decoded(tmp_path, write_audio):
    for n in range(9):
        write_audio(tmp_path / "in" / f"{n}.wav", hz=300 + n)
    for n in range(20):
        (tmp_path / "in" / f"unnamed-{n}.wav").write_bytes(b"")  # no list names them: they count for nothing
    rows = "".join(f"{n}.wav,x\n" for n in [*range(9), "gone"])
    (tmp_path / "in" / "captions.csv").write_text(f"file_name,caption\n{rows}")
    told = undecoded(folder_data(tmp_path / "in", tmp_path / "out", max_rejected=0.09))
    assert told.startswith(
        "data.max_rejected is 0.09: 1 of 10 clips were set aside ({'missing file': 1}); for example 'gone.wav': "
    )
    assert f"looked for {tmp_path / 'in' / 'gone.wav'} and " in told
    assert f"below {tmp_path / 'in'} are 29 recordings" in told
    (home,) = (tmp_path / "out").iterdir()
    assert str(home / "rejected") in told
    assert Counter(row["reason"] for row in rows_below(home / "rejected")) == {"missing file": 1, "no caption": 20}
    assert [path.name for path in walk_files(home)] == ["planning.parquet"]
    data = folder_data(tmp_path / "in", tmp_path / "out", max_rejected=0.1)
    made = prepare(data)
    assert home_of(made) == home
    assert sum(made.clips(split) for split in SPLITS) == 9


def test_empty_files_and_captions_are_held_against_the_limit_before_anything_is_decoded(tmp_path, write_audio):
    for n in range(4):
        write_audio(tmp_path / "in" / f"{n}.wav", hz=300 + n)
    (tmp_path / "in" / "void.wav").write_bytes(b"")
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\n0.wav,x\n1.wav,x\n2.wav,x\n3.wav, \nvoid.wav,x\n")
    told = undecoded(folder_data(tmp_path / "in", tmp_path / "out", max_rejected=0.3))
    assert told.startswith("data.max_rejected is 0.3: 2 of 5 clips were set aside ({'empty': 1, 'empty caption': 1}); see ")


def test_a_layout_of_which_every_file_is_missing_says_what_was_looked_for_and_what_is_there(tmp_path, write_audio):
    root = tmp_path / "AudioCaps"
    write_csv(root / "train.csv", ["youtube_id", "start_time", "caption"], [[f"{n:011d}", 30, "x"] for n in range(3)])
    for n in range(2):
        write_audio(root / "clips" / f"sound-{n}.wav")
    told = undecoded(layout_data("audiocaps", root, tmp_path / "out", max_rejected=1.0))
    assert told.startswith("data.audiocaps: no clip is left for the training split: {'missing file': 3, 'no caption': 2}; ")
    assert f"for example '00000000000': looked below {root} for Y00000000000.wav, 00000000000.wav, " in told
    assert f"below {root} are 2 recordings; see {tmp_path / 'out'}" in told
    listed = rows_below(tmp_path / "out")
    assert Counter(row["reason"] for row in listed) == {"missing file": 3, "no caption": 2}


def test_a_corpus_that_was_prepared_under_a_laxer_limit_is_refused_when_it_is_opened(recordings, folder_corpus):
    home, share = home_of(folder_corpus), len(BAD) / (GOOD + len(BAD) + 1)
    strict = folder_data(recordings, home.parent, max_rejected=share - 0.01)
    told = undecoded(strict)
    assert told.startswith(
        f"data.max_rejected is {strict.max_rejected}: {len(BAD)} of {GOOD + len(BAD) + 1} clips were set aside"
    )
    assert str(home / "rejected") in told
    assert prepare(folder_data(recordings, home.parent, max_rejected=share + 0.001)) == folder_corpus


def test_the_manifest_holds_the_settings_that_change_the_clips_alone(folder_corpus, soundscape_corpus):
    audio = {"corpus", "sample_rate", "min_seconds", "keep_seconds", "shard_clips", "held_out"}
    assert folder_corpus.manifest["settings"].keys() == audio | {"folder"}
    assert soundscape_corpus.manifest["settings"].keys() == audio | {"soundscapes"}


@pytest.mark.parametrize(("cpus", "largest"), [({}, "0"), ({"CPU": 0.5}, "0.5")])
def test_preparing_is_refused_where_no_node_has_a_whole_cpu(cpus, largest, tmp_path, monkeypatch):
    """A cluster like that of `ray start --head --num-cpus=0`, on which tasks would wait for ever."""
    node = ray.nodes()[0]
    others = {name: amount for name, amount in node["Resources"].items() if name != "CPU"}
    gone = {**node, "Alive": False, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": True, "Resources": others | cpus}, gone])
    settings = load({"data": {"prepared": str(tmp_path), "soundscapes": {"train": 4, "validation": 0, "test": 1}}})
    with pytest.raises(SettingsError) as refusal:
        experiment.prepare_only(settings)
    told = "data.prepared: preparing takes a whole CPU for each task, and no live node of the cluster has one"
    assert str(refusal.value).startswith(f"{told} (the largest has {largest})")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "told"), [("gone.wav,x\nalso.wav,y\n", "missing file"), (",x\n", "no file name"), ("", "none given")]
)
def test_a_corpus_of_which_nothing_is_left_is_refused(rows, told, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\n" + rows)
    message = undecoded(folder_data(tmp_path / "in", tmp_path / "out", max_rejected=1.0))
    assert message.startswith("data.folder: no clip is left for the training split: ")
    assert told in message
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^data\.prepared: "):
        prepare(soundscape_data(tmp_path / "file" / "below"))


def test_progress_ends_at_all_clips(recordings, tmp_path):
    told: list[tuple[int, int]] = []
    prepare(folder_data(recordings, tmp_path), lambda done, total: told.append((done, total)))
    planned = GOOD + len(BAD) + 1 - 6  # what shows without decoding is set aside before
    assert {total for _, total in told} == {planned}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (planned, planned)
    assert len(told) == len(source_of(folder_data(recordings, tmp_path)).shards()), "not when a file is there"


def test_a_bank_of_recordings_is_prepared_with_its_rejections(tmp_path, write_audio):
    for n in range(4):
        write_audio(tmp_path / "bank" / f"{n}.flac", hz=400 * (n + 1), rate=22050)
    rows = "".join(f"{n}.flac,a tone called {n} sounds,{'test' if n == 0 else 'train'}\n" for n in range(4))
    (tmp_path / "bank" / "captions.csv").write_text(f"file_name,caption,split\n{rows}gone.flac,x,train\n")
    soundscapes = SoundscapeSettings(train=6, validation=0, test=2, seconds=2.0, bank=str(tmp_path / "bank"))
    corpus = prepare(soundscape_data(tmp_path / "out", soundscapes=soundscapes, max_rejected=0.5))
    assert [corpus.clips(split) for split in SPLITS] == [6, 0, 2]
    assert corpus.rejected() == {"missing file": 1}
    assert all("a tone called" in text.lower() for row in rows_below(home_of(corpus) / "clips") for text in row["captions"])


def test_samples_of_clips_lie_one_after_the_other():
    assert _lists([np.arange(3, dtype=np.int16), np.zeros(0, np.int16)]).to_pylist() == [[0, 1, 2], []]
    assert np.iinfo(np.int32).max > ROW_GROUP * 600 * 48000  # the longest clips there can be: see data.keep_seconds


def test_a_write_that_fails_leaves_no_shard_that_looks_finished(tmp_path):
    class Broken:
        modality = "audio"

        def clips(self, shard):
            yield from ()
            raise OSError("the disk is gone")

    folder = Folder.at(str(tmp_path))
    with pytest.raises(OSError, match="the disk is gone"):
        write_shard(Broken(), Shard("train", 0, 0, 4), folder)
    assert list(walk_files(tmp_path)) == []
    assert isinstance(CLIPS, pa.Schema)


def test_a_task_that_fails_ends_with_the_cause_and_keeps_what_is_finished(ray_session, tmp_path):
    settings = load({"data": {"prepared": str(tmp_path), "soundscapes": {"train": 4, "validation": 0, "test": 1, "seconds": 1}}})
    made = prepare(settings.data).folder.local
    (made / "manifest.json").unlink()
    (made / "summaries" / "train-000000.json").unlink()
    shutil.rmtree(made / "clips")
    (made / "clips").write_text("")  # a file where a folder must be: no task can write there
    with pytest.raises(
        PreparingFailed, match=r"stopped: (StorageError|NotADirectoryError|FileExistsError): .*Finished files are kept"
    ):
        prepare(settings.data)


def test_storage_that_fails_in_a_task_sets_nothing_aside_and_preparing_goes_on_when_it_is_mended(tmp_path, write_audio):
    """A file that the driver sees and its node does not: here it has gone since planning."""
    path, *_ = (write_audio(tmp_path / "in" / f"{name}.wav", hz=hz) for name, hz in (("a", 300), ("b", 400), ("c", 500)))
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption,split\na.wav,x,train\nb.wav,x,train\nc.wav,x,test\n")
    data = folder_data(tmp_path / "in", tmp_path / "out", max_rejected=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ask_ray.data.prepare._check_plan", lambda *_: path.rename(tmp_path / "away.wav"))
        with pytest.raises(PreparingFailed, match=rf"StorageError: {path} was there when .* mount them there.*the same command"):
            prepare(data)
    (tmp_path / "away.wav").rename(path)
    made = prepare(data)
    assert (made.clips("train"), made.rejected()) == (2, {})


# --- the field's corpora


LAYOUTS = ("audiocaps", "retrieval", "clotho", "wavcaps", "parquet")
CLIPS_OF = {"audiocaps": [12, 2, 4], "retrieval": [8, 2, 3], "clotho": [6, 2, 3], "wavcaps": [6, 1, 2], "parquet": [9, 0, 3]}
ASIDE_OF = {
    "audiocaps": {
        "empty": 1, "held out by digest": 1, "held out by id": 1, "missing file": 1, "no caption": 1, "unreadable": 1
    },
    "retrieval": {},
    "clotho": {"held out by source id": 1, "unreadable": 1},
    "wavcaps": {"blacklisted": 2, "empty caption": 1, "missing file": 1},
    "parquet": {"empty": 1, "held out by digest": 1, "unreadable": 1},
}  # fmt: skip


def layout_data(name: str, path: Path, prepared: Path, **changes) -> DataSettings:
    section = {"path": str(path)} | ({"validation": 0.1, "test": 0.2} if name == "wavcaps" else {})
    corpus = "audiocaps" if name == "retrieval" else name
    return DataSettings.model_validate(
        {"corpus": corpus, corpus: section, "prepared": str(prepared), "max_rejected": 0.3, "shard_clips": 5, "sample_rate": 8000}
        | changes
    )


@pytest.fixture(scope="module")
def layouts(ray_session, trees, tmp_path_factory) -> dict[str, Corpus]:
    home = tmp_path_factory.mktemp("layouts")
    return {name: prepare(layout_data(name, trees[name], home)) for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_public_layout_is_prepared_with_what_is_wrong_listed(name, layouts):
    corpus = layouts[name]
    assert [corpus.clips(split) for split in SPLITS] == CLIPS_OF[name]
    assert corpus.rejected() == ASIDE_OF[name]
    listed = rows_below(home_of(corpus) / "rejected")
    assert Counter(row["reason"] for row in listed) == ASIDE_OF[name]
    assert all(row["id"] and row["source"] for row in listed)
    told = (home_of(corpus) / "card.md").read_text()
    for reason, count in ASIDE_OF[name].items():
        assert f"| {reason} | {count} |" in told
    for leak in (row for row in listed if row["reason"].startswith("held out")):
        assert leak["id"] in told
    for row in rows_below(home_of(corpus) / "clips"):
        assert len(row["waveform"]) == pytest.approx(3200, abs=600)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_that_is_evaluated_is_trained_on(name, layouts):
    corpus = layouts[name]
    training = corpus.identities("train")
    for split in ("validation", "test"):
        held_out = corpus.identities(split)
        assert not set(held_out.ids) & set(training.ids)
        assert not set(held_out.digests) & set(training.digests)
        assert not ({*held_out.source_ids} & {*training.source_ids}) - {None}


def test_the_job_prepares_a_public_layout_and_tells_what_it_left_out(layouts, trees, tmp_path, start_job):
    words = ("--corpus", "audiocaps", "--path", str(trees["audiocaps"]), "--out", str(tmp_path / "prepared"))
    settings = {"sample_rate": "8000", "shard_clips": "5", "max_rejected": "0.3"}
    job = start_job("prepare", *words, *(word for name, value in settings.items() for word in (f"--data.{name}", value)))
    assert job.process.wait(timeout=240) == 0, job.output.read_text()
    (home,) = (tmp_path / "prepared").iterdir()
    assert contents(home) == contents(home_of(layouts["audiocaps"]))
    told = job.output.read_text()
    for reason, count in ASIDE_OF["audiocaps"].items():
        assert f"set aside: {count} {reason}" in told
    leaks = [row["id"] for row in rows_below(home / "rejected") if row["reason"].startswith("held out")]
    assert len(leaks) == 2
    assert all(f"kept out of training: {leak} (held out by " in told for leak in leaks)
    assert f"Data card {home / 'card.md'}" in told


def test_the_files_of_a_layout_do_not_depend_on_the_number_of_tasks(layouts, trees, tmp_path):
    for name in ("audiocaps", "parquet"):
        again = prepare(layout_data(name, trees[name], tmp_path, prepare_tasks=4))
        assert contents(home_of(layouts[name])) == contents(home_of(again))


@pytest.mark.parametrize("left", ["all leaks", "a clean file with the summary of before", "a clean file without its summary"])
def test_a_run_killed_before_all_its_leaks_were_taken_out_takes_them_out(layouts, trees, tmp_path, left):
    """What an evaluation split holds too is in the training split's files at first."""
    data, whole = layout_data("audiocaps", trees["audiocaps"], tmp_path), home_of(layouts["audiocaps"])
    home, source = tmp_path / whole.name, source_of(data)
    for shard in source.shards():
        write_shard(source, shard, Folder.at(str(home)))
    leaking = [name for name, content in contents(home / "clips").items() if content != (whole / "clips" / name).read_bytes()]
    assert leaking
    assert all(name.startswith("train") for name in leaking)
    if left != "all leaks":
        shutil.copy(whole / "clips" / leaking[0], home / "clips" / leaking[0])
    if left == "a clean file without its summary":
        (home / "summaries" / leaking[0]).with_suffix(".json").unlink()
    prepare(data)
    assert contents(home) == contents(whole)


def test_a_corpus_is_prepared_by_one_driver_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    data = soundscape_data(tmp_path)
    with lease.held(Folder.at(str(tmp_path / name_of(data))), "data.prepared"), pytest.raises(SettingsError, match="under way"):
        prepare(data)


@given(sizes=st.lists(st.integers(1, 256), min_size=1, max_size=400), tasks=st.integers(1, 64))
def test_every_shard_is_in_one_part_and_parts_have_about_as_many_clips(sizes, tasks):
    parts = _dealt(sizes, tasks)
    assert sorted(place for part in parts for place in part) == list(range(len(sizes)))
    clips = [sum(sizes[place] for place in part) for part in parts]
    assert max(clips) - min(clips) <= max(sizes)
    assert len(parts) == len(sizes) or len(parts) % tasks == 0, "some would wait for the others at the end"
    assert len(parts) * SHARDS >= len(sizes)


def test_what_another_corpus_is_evaluated_on_is_kept_out_and_named(layouts, trees, tmp_path):
    clotho = layouts["clotho"]
    guarded = prepare(layout_data("wavcaps", trees["wavcaps"], tmp_path, held_out=[str(clotho.folder)]))
    assert guarded.folder.name != layouts["wavcaps"].folder.name
    leaks = [row for row in rows_below(home_of(guarded) / "rejected") if row["reason"].startswith("held out")]
    assert [(row["id"], row["reason"]) for row in leaks] == [("FreeSound/3002", "held out by source id")]
    assert "test clip 'Möwe, n° 2 evaluation.wav'" in leaks[0]["detail"]
    assert "FreeSound/3002" in (home_of(guarded) / "card.md").read_text()


def test_digests_of_another_corpus_are_compared_too(layouts, trees, tmp_path, write_audio):
    audiocaps = layouts["audiocaps"]
    copied = next(path for path in (trees["audiocaps"] / "audio" / "test").iterdir() if path.suffix == ".wav")
    shutil.copy(copied, write_audio(tmp_path / "in" / "other.wav").with_name("mine.wav"))
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\nother.wav,x\nmine.wav,y\n")
    folder = {"path": str(tmp_path / "in"), "validation": 0, "test": 0}
    data = DataSettings.model_validate({"corpus": "folder", "folder": folder, "prepared": str(tmp_path), "sample_rate": 8000})
    assert prepare(data).ids("train") == ["other.wav", "mine.wav"] or prepare(data).ids("train") == ["mine.wav", "other.wav"]
    guarded = prepare(data.model_copy(update={"held_out": [str(audiocaps.folder)]}))
    assert guarded.ids("train") == ["other.wav"]
    assert guarded.rejected() == {"held out by digest": 1}


def test_long_recordings_are_cut_and_counted(tmp_path, write_audio):
    for n, seconds in enumerate((0.5, 3.0)):
        write_audio(tmp_path / "in" / f"{n}.flac", seconds=seconds, hz=300 + n)
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\n0.flac,x\n1.flac,y\n")
    folder = FolderSettings(path=str(tmp_path / "in"), validation=0, test=0)
    corpus = prepare(folder_data(tmp_path / "in", tmp_path, folder=folder, keep_seconds=1.5))
    assert sorted(row["duration"] for row in rows_below(home_of(corpus) / "clips")) == [0.5, 1.5]
    assert corpus.manifest["splits"]["train"]["cut"] == 1


def test_a_killed_run_goes_on_where_it_was_killed(start_job, tmp_path):
    """The whole job, killed with SIGKILL; what it finished is kept, and in the end all is as if it was left alone."""
    scenes = [f"--data.soundscapes.{name}" for name in ("train", "validation", "test", "seconds", "captions")]
    words = [word for pair in zip(scenes, ("240", "4", "4", "2", "1"), strict=True) for word in pair]
    prepared = tmp_path / "killed"
    job = start_job("prepare", *words, "--data.shard_clips", "4", "--data.sample_rate", "8000", "--out", str(prepared))
    job.kill_when(lambda: len(list(prepared.glob("*/summaries/*.json"))) >= 8, seconds=300)
    (home,) = prepared.iterdir()
    assert not (home / "manifest.json").exists()
    finished = times(home / "summaries") | {f"clips/{name}": stamp for name, stamp in times(home / "clips").items()}
    done = {name.removesuffix(".json") for name in times(home / "summaries")}
    made = {"train": 240, "validation": 4, "test": 4, "seconds": 2.0, "captions": 1}
    data = DataSettings(prepared=str(prepared), sample_rate=8000, shard_clips=4, soundscapes=SoundscapeSettings(**made))
    again = prepare(data)
    assert home_of(again) == home
    for name in done:
        assert (home / "summaries" / f"{name}.json").stat().st_mtime_ns == finished[f"{name}.json"]
        assert (home / "clips" / f"{name}.parquet").stat().st_mtime_ns == finished[f"clips/{name}.parquet"]
    alone = prepare(data.model_copy(update={"prepared": str(tmp_path / "alone")}))
    left = {path.name for path in home.rglob(".*")}
    assert {name: content for name, content in contents(home / "clips").items() if name not in left} == contents(
        home_of(alone) / "clips"
    )
    assert (home / "card.md").read_bytes() == (home_of(alone) / "card.md").read_bytes()


def test_memory_does_not_grow_with_the_clips_of_a_file(tmp_path):
    """The peak of a process that writes a file of 64 clips of 10 s, and of one that writes 512."""
    code = """
import resource, sys
from ask_ray.config import DataSettings, SoundscapeSettings
from ask_ray.data.corpora import Shard, source_of
from ask_ray.data.prepare import write_shard
from ask_ray.storage import Folder
from ask_ray.data.schema import Clip
import numpy as np

class Noise:
    modality = "audio"

    def clips(self, shard):
        for n in range(shard.first, shard.last):
            samples = np.random.default_rng(n).integers(-999, 999, 160_000).astype(np.int16)
            yield Clip(str(n), "train", ("x",), samples, "", 16000, 16000)

write_shard(Noise(), Shard("train", 0, 0, int(sys.argv[1])), Folder.at(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(n), str(tmp_path / str(n))], capture_output=True, text=True, check=True
            ).stdout
        )
        for n in (64, 512)
    ]
    assert peaks[1] - peaks[0] < 60_000  # KiB; the file is 164 MB
