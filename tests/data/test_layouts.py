"""AudioCaps, Clotho and WavCaps as they lie on researchers' disks: every clip found, what is wrong listed, wrong folders told."""

import json
import re
import shutil
from pathlib import Path

import pytest
from corpus_trees import video, write_csv, write_json

from ask_ray.config import DataSettings, SettingsError
from ask_ray.data.corpora import source_of
from ask_ray.data.layouts import youtube_id
from ask_ray.data.rows import Row, rows_of
from ask_ray.data.schema import SPLITS, Clip, Rejection

AS_FOLDER = {"retrieval": "audiocaps"}


def data_of(corpus: str, path: Path, **section: object) -> DataSettings:
    return DataSettings.model_validate({"corpus": corpus, "sample_rate": 16000, corpus: {"path": str(path), **section}})


def planned(corpus: str, path: Path, **section: object) -> tuple[dict[str, Row], dict[str, str]]:
    """Usable rows by id, and the reason of each row that is set aside by its id."""
    source = source_of(data_of(corpus, path, **section))
    return {row.id: row for row in rows_of(source.rows)}, {one.id: one.reason for one in source.early_rejections()}


def by_split(rows: dict[str, Row]) -> dict[str, int]:
    return {split: sum(row.split == split for row in rows.values()) for split in SPLITS}


def refused(corpus: str, path: Path, **section: object) -> str:
    with pytest.raises(SettingsError) as refusal:
        planned(corpus, path, **section)
    return str(refusal.value)


@pytest.fixture
def tree(trees, tmp_path):
    """A function that copies a tree, to change it."""
    return lambda name: Path(shutil.copytree(trees[name], tmp_path / name))


# --- AudioCaps


def test_the_original_form_has_a_clip_a_video_with_all_its_captions(trees):
    rows, aside = planned("audiocaps", trees["audiocaps"])
    assert by_split(rows) == {"train": 14, "validation": 2, "test": 4}
    for n in range(12):
        row = rows[video("train", n)]
        assert (row.captions, row.source_id) == ((f"a train sound number {n}, told 0",), f"youtube:{row.id}")
        assert row.path.is_file()
    assert {rows[video("test", n)].captions for n in range(4)} == {
        tuple(f"a test sound number {n}, told {k}" for k in range(5)) for n in range(4)
    }
    assert aside == {
        "gone-------": "missing file",
        "void-------": "empty",
        "audio/train/nobody_tells_of_it.wav": "no caption",
        video("test", 1): "held out by id",
    }


def test_each_way_to_call_a_recording_is_found(trees):
    rows, _ = planned("audiocaps", trees["audiocaps"])
    assert {row.path.suffix for row in rows.values()} == {".wav", ".flac", ".ogg", ".mp3"}
    names = [rows[video("train", n)].path.stem.replace(video("train", n), "ID") for n in range(4)]
    assert names == ["YID", "ID_31", "ID", "ID_33000_43000"]


def test_recordings_may_be_called_by_the_number_of_a_caption(tmp_path, write_audio):
    write_csv(tmp_path / "train.csv", ["audiocap_id", "youtube_id", "start_time", "caption"], [[91139, "r1nicOVtvkQ", 130, "x"]])
    write_audio(tmp_path / "train" / "91139.ogg")
    rows, _ = planned("audiocaps", tmp_path)
    assert rows["r1nicOVtvkQ"].path == tmp_path / "train" / "91139.ogg"


def test_the_retrieval_form_is_known_by_its_columns_and_has_the_same_ids(trees):
    rows, aside = planned("audiocaps", trees["retrieval"])
    assert by_split(rows) == {"train": 8, "validation": 2, "test": 3}
    assert aside == {}
    assert rows[video("train", 1)].source_id == f"youtube:{video('train', 1)}"
    assert len(rows[video("val", 0)].captions) == 5
    assert len(rows[video("train", 0)].captions) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("YrqfQRErjfk8.wav", "rqfQRErjfk8"),
        ("rqfQRErjfk8.flac", "rqfQRErjfk8"),
        ("YrqfQRErjfk.wav", "YrqfQRErjfk"),
        ("--PJHxphWEs_30.flac", "--PJHxphWEs"),
        ("Y--PJHxphWEs_30000_40000.wav", "--PJHxphWEs"),
        ("_xylo5_IiaM.wav", "_xylo5_IiaM"),
        ("91139.wav", None),
        ("a much longer name.wav", None),
    ],
)
def test_a_video_is_known_by_its_file(name, expected):
    assert youtube_id(name) == expected


# --- Clotho


def test_clotho_has_its_splits_its_accents_and_its_sounds(trees):
    rows, aside = planned("clotho", trees["clotho"])
    assert by_split(rows) == {"train": 7, "validation": 2, "test": 3}
    assert {len(row.captions) for row in rows.values()} == {5}
    assert all(row.path.name == row.id and row.path.is_file() for row in rows.values())
    assert rows["Möwe, n° 2 evaluation.wav"].source_id == "freesound:3002"
    assert rows["Möwe, n° 1 development.wav"].source_id is None
    assert aside == {"Möwe, n° 0 development.wav": "held out by source id"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "iso-8859-1"])
def test_metadata_may_be_written_in_any_of_the_usual_encodings(encoding, tree):
    root = tree("clotho")
    path = root / "clotho_metadata_evaluation.csv"
    path.write_bytes(path.read_bytes().decode("iso-8859-1").encode(encoding))
    assert planned("clotho", root)[0]["Möwe, n° 2 evaluation.wav"].source_id == "freesound:3002"


def test_clotho_without_metadata_is_refused_unless_it_is_to_go_without(tree):
    root = tree("clotho")
    for path in root.glob("clotho_metadata_*.csv"):
        path.unlink()
    told = refused("clotho", root)
    assert told.startswith("data.clotho.metadata: ")
    for word in ("development.csv", "validation.csv", "evaluation.csv", str(root), "false"):
        assert word in told
    rows, aside = planned("clotho", root, metadata=False)
    assert {row.source_id for row in rows.values()} == {None}
    assert aside == {}


@pytest.mark.parametrize("split", ["development", "validation", "evaluation"])
def test_clotho_with_some_metadata_is_refused_and_what_is_there_is_used_where_it_may_go_without(split, tree):
    root = tree("clotho")
    (root / f"clotho_metadata_{split}.csv").unlink()
    told = refused("clotho", root)
    assert f"data.clotho.metadata: clotho_metadata_{split}.csv is not below" in told
    rows, aside = planned("clotho", root, metadata=False)
    of = {"development": "train", "validation": "validation", "evaluation": "test"}[split]
    assert {row.source_id for row in rows.values() if row.split == of} == {None}
    assert any(row.source_id for row in rows.values() if row.split != of)
    assert aside == ({"Möwe, n° 0 development.wav": "held out by source id"} if split == "validation" else {})


@pytest.mark.parametrize("how", ["another split's", "accents lost"])
def test_metadata_that_name_other_clips_are_refused_unless_it_is_to_go_without(how, tree):
    root = tree("clotho")
    path = root / "clotho_metadata_evaluation.csv"
    if how == "accents lost":
        path.write_bytes(path.read_bytes().replace("ö".encode("iso-8859-1"), b"?"))
    else:
        shutil.copy(root / "clotho_metadata_validation.csv", path)
    told = refused("clotho", root)
    assert told.startswith(f"data.clotho.metadata: {path} names 0 of the 3 clips of clotho_captions_evaluation.csv, ")
    assert "false" in told
    assert planned("clotho", root, metadata=False)[1] == {}


def test_a_sound_without_a_number_is_named_too(tree):
    root = tree("clotho")
    path = root / "clotho_metadata_evaluation.csv"
    rows = path.read_text(encoding="iso-8859-1").splitlines()
    told = [rows[0], *(re.sub(r";b,\d+,", ";b,Not found,", row) for row in rows[1:])]
    path.write_text("\n".join(told[:3]), encoding="iso-8859-1")  # two clips of three
    rows, _ = planned("clotho", root)
    assert {row.source_id for row in rows.values() if row.split == "test"} == {None}


def test_metadata_of_a_split_that_is_not_there_are_not_missed(tree):
    root = tree("clotho")
    for kind in ("captions", "metadata"):
        (root / f"clotho_{kind}_validation.csv").unlink()
    assert by_split(planned("clotho", root)[0]) == {"train": 7, "validation": 0, "test": 3}


# --- WavCaps


def test_wavcaps_has_every_source_and_leaves_out_what_is_blacklisted(trees):
    rows, aside = planned("wavcaps", trees["wavcaps"])
    assert by_split(rows) == {"train": 9, "validation": 0, "test": 0}
    assert {row.id.split("/")[0] for row in rows.values()} == {"AudioSet_SL", "BBC_Sound_Effects", "FreeSound", "SoundBible"}
    assert aside == {
        f"AudioSet_SL/Y{video('wavs', 1)}": "blacklisted", "FreeSound/80399": "blacklisted", "SoundBible/404": "missing file",
        "SoundBible/7": "empty caption",
    }  # fmt: skip
    assert rows["FreeSound/124"].source_id == "freesound:124"
    assert rows[f"AudioSet_SL/Y{video('wavs', 0)}"].source_id == f"youtube:{video('wavs', 0)}"


def test_a_number_that_two_sources_share_is_two_recordings(trees):
    rows, _ = planned("wavcaps", trees["wavcaps"])
    one, other = rows["FreeSound/123"], rows["SoundBible/123"]
    assert (one.path.parent.name, other.path.parent.name) == ("FreeSound", "SoundBible")
    assert (one.captions, other.captions) == (("FreeSound 123",), ("SoundBible 123",))
    assert one.source_id != other.source_id


def test_a_share_of_wavcaps_may_be_held_out(trees):
    """Of ten, and one of those to test on has no caption."""
    assert by_split(planned("wavcaps", trees["wavcaps"], validation=0.2, test=0.3)[0]) == {"train": 5, "validation": 2, "test": 2}


def test_blacklists_are_looked_for_named_or_left_out_on_purpose(tree, tmp_path):
    root = tree("wavcaps")
    blacklist = Path(shutil.move(root / "json_files/blacklist/blacklist_exclude_test_ac.json", tmp_path / "mine.json"))
    told = refused("wavcaps", root)
    assert told.startswith("data.wavcaps.blacklists: ")
    assert "[]" in told
    assert "blacklisted" not in planned("wavcaps", root, blacklists=[])[1].values()
    assert "blacklisted" in planned("wavcaps", root, blacklists=[str(blacklist)])[1].values()
    assert "no.json" in refused("wavcaps", root, blacklists=["no.json"])
    write_json(tmp_path / "other.json", ["123"])
    assert "AudioSet or FreeSound" in refused("wavcaps", root, blacklists=[str(tmp_path / "other.json")])
    for content in ({"AudioSet": None}, {"AudioSet": ["1"], "FreeSound": "80399"}):
        write_json(tmp_path / "other.json", content)
        told = refused("wavcaps", root, blacklists=[str(tmp_path / "other.json")])
        assert told.startswith(f"data.wavcaps.blacklists: {tmp_path / 'other.json'}: {list(content)[-1]} is no list of ids")
    assert "cannot be read" in refused("wavcaps", root, blacklists=["/proc/self/mem"])


def test_sources_without_clips_of_other_corpora_need_no_blacklist(tree):
    root = tree("wavcaps")
    shutil.rmtree(root / "json_files" / "blacklist")
    for source in ("AudioSet_SL", "FreeSound"):
        shutil.rmtree(root / "json_files" / source)
    assert len(planned("wavcaps", root)[0]) == 4


def test_a_source_may_be_a_bare_list_with_several_captions(tmp_path, write_audio):
    write_json(tmp_path / "sb_final.json", [{"id": 5, "caption_2": "y", "caption_1": "x", "duration": 1.0}])
    write_audio(tmp_path / "SoundBible_flac" / "5.wav")
    rows, _ = planned("wavcaps", tmp_path)
    assert rows["SoundBible/5"].captions == ("x", "y")


# --- what is refused


@pytest.mark.parametrize(
    ("corpus", "looked_for"),
    [("audiocaps", "train.csv"), ("clotho", "clotho_captions_development.csv"), ("wavcaps", "fsd_final.json")],
)
def test_a_wrong_folder_tells_what_was_looked_for_and_what_was_found(corpus, looked_for, tmp_path, write_audio):
    write_audio(tmp_path / "audio" / "a.wav")
    (tmp_path / "readme.txt").write_text("")
    told = refused(corpus, tmp_path)
    for word in (f"data.{corpus}.path: ", str(tmp_path), looked_for, "audio/", "readme.txt", "1 recordings"):
        assert word in told
    assert "is not a folder" in refused(corpus, tmp_path / "no")


@pytest.mark.parametrize(
    ("corpus", "name", "needed"),
    [
        ("audiocaps", "train.csv", "youtube_id"),
        ("clotho", "clotho_captions_development.csv", "caption_1"),
        ("clotho", "clotho_metadata_evaluation.csv", "sound_id"),
    ],
)
def test_a_list_with_other_columns_is_refused(corpus, name, needed, tree):
    root = tree(corpus)
    (path,) = root.rglob(name)
    write_csv(path, ["wav", "text"], [["a.wav", "x"]])
    told = refused(corpus, root)
    for word in (f"data.{corpus}.path: ", str(path), "wav, text", needed):
        assert word in told


@pytest.mark.parametrize("content", ["{", '{"clips": []}', '{"data": [1]}', '{"data": [{"audio": "x", "text": "y"}]}'])
def test_a_source_file_of_another_kind_is_refused(content, tree):
    root = tree("wavcaps")
    (root / "json_files/SoundBible/sb_final.json").write_text(content)
    told = refused("wavcaps", root)
    assert told.startswith("data.wavcaps.path: ")
    assert "sb_final.json" in told


@pytest.mark.parametrize("corpus", ["audiocaps", "clotho"])
def test_a_list_that_is_cut_or_ragged_is_refused_by_name(corpus, tree):
    root = tree(corpus)
    path = next(path for path in sorted(root.rglob("*.csv")) if "metadata" not in path.name)
    path.write_bytes(path.read_bytes() + b"one,too,many,columns,for,any,of,these,lists\r\n")
    told = refused(corpus, root)
    assert str(path) in told
    assert "columns" in told


@pytest.mark.parametrize("corpus", ["audiocaps", "clotho"])
def test_a_list_whose_header_is_no_header_is_refused_by_name(corpus, tree):
    """Python's reader takes no field of more than 128 KiB."""
    root = tree(corpus)
    path = next(path for path in sorted(root.rglob("*.csv")) if "metadata" not in path.name)
    path.write_text("x" * 200_000)
    told = refused(corpus, root)
    assert told.startswith(f"data.{corpus}.path: {path} cannot be read: field larger than field limit")


# --- decoding


@pytest.mark.parametrize("name", ["audiocaps", "retrieval", "clotho", "wavcaps", "parquet"])
def test_every_row_is_a_clip_or_is_set_aside(name, trees):
    source = source_of(data_of(AS_FOLDER.get(name, name), trees[name]))
    found = [item for shard in source.shards() for item in source.clips(shard)]
    assert len(found) == len(source.rows)
    clips = {item.id: item for item in found if isinstance(item, Clip)}
    reasons = {item.id: item.reason for item in found if isinstance(item, Rejection)}
    assert reasons == {
        "audiocaps": {"cut-------": "unreadable"},
        "clotho": {"Möwe, n° 2 development.wav": "unreadable"},
        "parquet": {"void.wav": "empty", "cut.flac": "unreadable"},
    }.get(name, {})
    assert all(abs(len(clip.waveform) - 6400) <= 1200 for clip in clips.values())  # mp3 pads
    origin = source.origin()
    assert len(origin["lists"]) >= 3
    assert json.dumps(origin)
