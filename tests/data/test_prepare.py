"""Preparing on a real Ray session: every row accounted for, taken up again, the same bytes however it ran."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ask_ray.config import DataSettings, FolderSettings, SettingsError, SoundscapeSettings, load
from ask_ray.data.corpora import Shard
from ask_ray.data.corpus import Corpus
from ask_ray.data.prepare import PreparingFailed, _waveforms, prepare, write_shard
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
            assert (file["clips"], file["digest"]) == (len(found), digest_bytes(path.read_bytes()))
            rows += found
        assert all(row["split"] == split for row in rows)
        assert told["clips"] == corpus.clips(split) == len(rows)
        assert told["captions"] == sum(len(row["captions"]) for row in rows)
        assert told["most_captions"] == max(len(row["captions"]) for row in rows)
        assert told["samples"] == sum(len(row["waveform"]) for row in rows)
        assert told["hours"] * 3600 == pytest.approx(sum(row["duration"] for row in rows))
    listed = {file["name"] for split in SPLITS for file in corpus.manifest["splits"][split]["files"]}
    empty = {path.name for path in walk_files(home / "clips")} - listed
    assert all(pq.read_metadata(home / "clips" / name).num_rows == 0 for name in empty)


def test_soundscapes_have_the_asked_sizes(soundscape_corpus):
    assert [soundscape_corpus.clips(split) for split in SPLITS] == [20, 3, 5]
    assert soundscape_corpus.rejected() == {}
    assert soundscape_corpus.sample_rate == 8000
    assert {len(row["waveform"]) for row in rows_below(home_of(soundscape_corpus) / "clips")} == {8000}


def test_preparing_again_does_nothing(recordings, tmp_path, monkeypatch):
    for data in (folder_data(recordings, tmp_path), soundscape_data(tmp_path)):
        first = prepare(data)
        before, stamps = contents(home_of(first)), times(home_of(first))
        with monkeypatch.context() as patch:
            patch.setattr("ask_ray.data.prepare._run", lambda *_: pytest.fail("work was done again"))
            again = prepare(data.model_copy(update={"cache_mib": 3, "prepare_tasks": 1, "max_seconds": 2.0}))
        assert again == first
        assert (contents(home_of(again)), times(home_of(again))) == (before, stamps)


def test_an_interrupted_run_is_completed_without_doing_finished_shards_again(recordings, tmp_path):
    for data in (folder_data(recordings, tmp_path), soundscape_data(tmp_path)):
        home = home_of(prepare(data))
        before, stamps = contents(home), times(home)
        lost = sorted((home / "clips").iterdir())[1]
        lost.unlink()
        (home / "manifest.json").unlink()
        redone = {"manifest.json", f"clips/{lost.name}", f"rejected/{lost.name}", f"shards/{lost.stem}.json"}
        redone |= {"rejected/planning.parquet"} & set(before)
        assert home_of(prepare(data)) == home
        after = times(home)
        assert contents(home) == before
        assert {name for name in before if after[name] != stamps[name]} == redone


def test_a_shard_without_its_summary_is_done_again(tmp_path):
    home = home_of(prepare(soundscape_data(tmp_path)))
    before = contents(home)
    (home / "manifest.json").unlink()
    sorted((home / "shards").iterdir())[0].unlink()
    prepare(soundscape_data(tmp_path))
    assert contents(home) == before


def test_the_files_do_not_depend_on_the_number_of_tasks(recordings, tmp_path):
    for make in (lambda place, tasks: folder_data(recordings, place, prepare_tasks=tasks), soundscape_with_tasks):
        homes = [home_of(prepare(make(tmp_path / str(tasks), tasks))) for tasks in (1, 2)]
        one, two = map(contents, homes)
        manifests = [json.loads(found.pop("manifest.json")) for found in (one, two)]
        assert one == two
        assert homes[0].name == homes[1].name
        for manifest in manifests:
            del manifest["settings"]
        assert manifests[0] == manifests[1]


def soundscape_with_tasks(place: Path, tasks: int) -> DataSettings:
    return soundscape_data(place, prepare_tasks=tasks)


def test_what_changes_the_clips_changes_the_folder(recordings, folder_corpus, tmp_path, write_audio):
    write_audio(tmp_path / "in" / "a.wav")
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\na.wav,x\n")
    data = folder_data(tmp_path / "in", tmp_path / "out", folder=FolderSettings(path=str(tmp_path / "in"), validation=0, test=0))
    names = {prepare(data).folder.name}
    for change in ({"sample_rate": 8000}, {"min_seconds": 0.2}, {"shard_clips": 7}):
        names.add(prepare(data.model_copy(update=change)).folder.name)
    write_audio(tmp_path / "in" / "a.wav", hz=500.0)
    names.add(prepare(data).folder.name)
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\na.wav,y\n")
    names.add(prepare(data).folder.name)
    assert len(names) == 6


def test_too_many_bad_rows_are_refused_and_repairing_the_limit_is_enough(recordings, tmp_path):
    share = len(BAD) / (GOOD + len(BAD) + 1)
    with pytest.raises(SettingsError) as refusal:
        prepare(folder_data(recordings, tmp_path, max_rejected=share - 0.01))
    message = str(refusal.value)
    assert message.startswith("data.max_rejected is ")
    assert f"{len(BAD)} of {GOOD + len(BAD) + 1} recordings" in message
    for reason in set(BAD.values()):
        assert reason in message
    (home,) = tmp_path.iterdir()
    assert str(home / "rejected") in message
    assert not (home / "manifest.json").exists()
    assert len(rows_below(home / "rejected")) == len(BAD)
    stamps = times(home / "clips")
    assert prepare(folder_data(recordings, tmp_path, max_rejected=share + 0.001)).clips("train") > 0
    assert times(home / "clips") == stamps


@pytest.mark.parametrize(
    ("rows", "told"), [("gone.wav,x\nalso.wav,y\n", "missing file"), (",x\n", "no file name"), ("", "none given")]
)
def test_a_corpus_of_which_nothing_is_left_is_refused(rows, told, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\n" + rows)
    with pytest.raises(SettingsError, match=told) as refusal:
        prepare(folder_data(tmp_path / "in", tmp_path / "out", max_rejected=1.0))
    assert str(refusal.value).startswith("data.folder: ")
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^data\.prepared: "):
        prepare(soundscape_data(tmp_path / "file" / "below"))


def test_progress_ends_at_all_clips(recordings, tmp_path):
    told: list[tuple[int, int]] = []
    prepare(folder_data(recordings, tmp_path), lambda done, total: told.append((done, total)))
    planned = GOOD + len(BAD) + 1 - 3
    assert {total for _, total in told} == {planned}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (planned, planned)


def test_a_bank_of_recordings_is_prepared_with_its_rejections(tmp_path, write_audio):
    for n in range(4):
        write_audio(tmp_path / "bank" / f"{n}.flac", hz=400 * (n + 1), rate=22050)
    rows = "".join(f"{n}.flac,a tone called {n} sounds\n" for n in range(4))
    (tmp_path / "bank" / "captions.csv").write_text(f"file_name,caption\n{rows}gone.flac,x\n")
    soundscapes = SoundscapeSettings(train=6, validation=0, test=2, seconds=2.0, bank=str(tmp_path / "bank"))
    corpus = prepare(soundscape_data(tmp_path / "out", soundscapes=soundscapes, max_rejected=0.5))
    assert [corpus.clips(split) for split in SPLITS] == [6, 0, 2]
    assert corpus.rejected() == {"missing file": 1}
    assert all("a tone called" in text.lower() for row in rows_below(home_of(corpus) / "clips") for text in row["captions"])


def test_a_shard_too_large_for_one_file_names_its_setting():
    huge = np.broadcast_to(np.int16(1), (1 << 30,))
    with pytest.raises(SettingsError, match=r"^data\.shard_clips: "):
        _waveforms([huge, huge])
    assert _waveforms([np.arange(3, dtype=np.int16), np.zeros(0, np.int16)]).to_pylist() == [[0, 1, 2], []]


def test_a_write_that_fails_leaves_no_shard_that_looks_finished(tmp_path):
    class Broken:
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
    (made / "shards" / "train-000000.json").unlink()
    shutil.rmtree(made / "clips")
    (made / "clips").write_text("")  # a file where a folder must be: no task can write there
    with pytest.raises(PreparingFailed, match="Finished files are kept"):
        prepare(settings.data)
