"""Rows: each id once, splits that stay, and nothing of an evaluation split in the training split."""

import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import DataSettings, FolderSettings, SplitShares
from ask_ray.data.corpora import RecordingSource, source_of
from ask_ray.data.held_out import HeldOut
from ask_ray.data.rows import Plan, Row, merged, plan, rows_of, texts
from ask_ray.data.schema import MISSING, SPLITS

HELD_OUT = {"validation": 0.0, "test": 0.0}


def folder_source(folder: Path, shard_clips: int = 256, **folder_settings) -> RecordingSource:
    settings = FolderSettings(path=str(folder), **folder_settings)
    made = source_of(DataSettings(corpus="folder", folder=settings, shard_clips=shard_clips))
    assert isinstance(made, RecordingSource)
    return made


def splits_of(source: RecordingSource) -> dict[str, list[str]]:
    rows = list(rows_of(source.rows))
    return {split: [row.id for row in rows if row.split == split] for split in SPLITS}


def write_manifest(folder: Path, names: Iterable[object]) -> None:
    """A manifest, and its recordings."""
    files = [f"{name}.wav" for name in names]
    for file in files:
        (folder / file).write_bytes(b"x")
    (folder / "captions.csv").write_text("file_name,caption\n" + "".join(f"{file},x\n" for file in files))


@given(count=st.integers(1, 60), validation=st.floats(0, 0.6), test=st.floats(0, 0.39), seed=st.integers(0, 9))
@budget(max_examples=40, deadline=None)
def test_splits_have_exact_sizes_and_are_disjoint(count, validation, test, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    names = [f"{seed}-{n}" for n in range(count)]
    write_manifest(folder, names)
    split = splits_of(folder_source(folder, validation=validation, test=test))
    assert (len(split["validation"]), len(split["test"])) == (round(count * validation), round(count * test))
    assert sorted(name for ids in split.values() for name in ids) == sorted(f"{name}.wav" for name in names)


def test_the_split_does_not_depend_on_the_order_of_rows(tmp_path):
    found = []
    for order in (1, -1):
        write_manifest(tmp_path, range(50)[::order])
        source = folder_source(tmp_path)
        found.append((splits_of(source), source.rows.column("id").to_pylist()))
    assert found[0] == found[1]


def test_added_rows_move_few_clips(tmp_path):
    write_manifest(tmp_path, range(200))
    before = {name: split for split, names in splits_of(folder_source(tmp_path)).items() for name in names}
    write_manifest(tmp_path, [*range(1000, 1020), *range(200)])
    after = {name: split for split, names in splits_of(folder_source(tmp_path)).items() for name in names}
    moved = [name for name in before if before[name] != after[name]]
    assert len(moved) <= 12
    assert not any({before[name], after[name]} == {"train", "validation"} for name in moved)


# --- what must not be trained on


def row(clip: str, split: str | None, source_id: str | None = None) -> Row:
    return Row(clip, Path(__file__), ("x",), split, source_id)  # any file that is there


def planned(rows: list[Row], held_out: HeldOut | None = None, **shares: float) -> Plan:
    return plan(rows, SplitShares(**shares), held_out or HeldOut())


def kept(made: Plan) -> dict[str, list[str]]:
    rows = list(rows_of(made.usable))
    return {split: [one.id for one in rows if one.split == split] for split in SPLITS}


def aside(made: Plan) -> dict[str, str]:
    return {one["id"]: one["reason"] for one in made.rejected.to_pylist()}


def test_an_id_of_an_evaluation_split_is_not_trained_on_wherever_it_stands_first():
    for order in (1, -1):
        made = planned(
            [row("a", "train"), row("b", "train"), row("a", "test"), row("c", "validation"), row("c", "test")][::order]
        )
        assert kept(made) == {"train": ["b"], "validation": [], "test": ["a", "c"][::order]}
        assert aside(made) == {"a": "held out by id", "c": "duplicate id"}


def test_a_source_of_an_evaluation_split_is_not_trained_on():
    rows = [row("a", "train", "freesound:1"), row("b", "train", "freesound:2"), row("c", "train"), row("d", "train", "1")]
    made = planned([*rows, row("e", "validation", "freesound:1"), row("f", "test", "youtube:2")])
    assert kept(made) == {"train": ["b", "c", "d"], "validation": ["e"], "test": ["f"]}
    (one,) = made.rejected.to_pylist()
    assert (one["id"], one["reason"], one["detail"]) == ("a", "held out by source id", "it is validation clip 'e'")


def test_what_other_corpora_hold_out_is_not_trained_on_but_may_be_evaluated_on():
    other = HeldOut({"a": "test clip 'a' of /other"}, {f"freesound:{n}": "test clip 'z' of /other" for n in (1, 2)})
    made = planned(
        [row("a", "train"), row("b", "train", "freesound:1"), row("c", "train"), row("d", "test", "freesound:2")], other
    )
    assert kept(made) == {"train": ["c"], "validation": [], "test": ["d"]}
    assert aside(made) == {"a": "held out by id", "b": "held out by source id"}
    assert {one["detail"] for one in made.rejected.to_pylist()} == {
        "it is test clip 'a' of /other",
        "it is test clip 'z' of /other",
    }


@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([None, *SPLITS]), st.one_of(st.none(), st.integers(0, 4))), max_size=25)
)
@budget(max_examples=150, deadline=None)
def test_no_row_is_lost_and_none_leaks(drawn):
    rows = [row(f"c{clip}", split, None if source is None else f"s{source}") for clip, split, source in drawn]
    made = planned(rows, validation=0.2, test=0.2)
    usable = list(rows_of(made.usable))
    assert len(usable) + len(made.rejected) == len(rows)
    assert len({one.id for one in usable}) == len(usable)
    held_out = [one for one in usable if one.split != "train"]
    training = [one for one in usable if one.split == "train"]
    assert not {one.id for one in held_out} & {one.id for one in training}
    assert not {one.source_id for one in held_out if one.source_id} & {one.source_id for one in training}
    assert [one.split for one in usable] == sorted((one.split for one in usable), key=SPLITS.index)


def test_takes_of_one_source_are_dealt_together():
    rows = [row(f"{source}-{take}", None, f"s{source}") for source in range(40) for take in range(5)]
    made = planned(rows, validation=0.1, test=0.2)
    torn = {one["id"].split("-")[0] for one in made.rejected.to_pylist()}
    assert len(torn) <= 2  # one at each border
    assert len(kept(made)["test"]) == 40


# --- one clip in several rows


def test_rows_of_one_clip_become_one_with_all_captions():
    rows = [Row("a", Path("1"), ("x",), "test"), Row("b", Path("2"), ("y",), "test"), Row("a", Path("3"), ("z",), "test")]
    assert [(one.id, one.path, one.captions) for one in merged(rows)] == [("a", Path("1"), ("x", "z")), ("b", Path("2"), ("y",))]


def test_the_recording_that_is_there_is_taken_and_rows_without_id_stay_apart():
    rows = [
        Row("a", Path("1"), ("x",), problem="missing file"),
        Row("a", Path("2"), ("z",)),
        Row("", Path("3"), ()),
        Row("", Path("4"), ()),
    ]
    first, second, third = merged(rows)
    assert (first.path, first.captions, first.problem) == (Path("2"), ("x", "z"), None)
    assert (second.path, third.path) == (Path("3"), Path("4"))


def test_one_id_in_two_splits_is_two_rows():
    assert len(merged([row("a", "train"), row("a", "test")])) == 2


def test_one_id_of_two_recordings_is_two_rows():
    rows = [Row("a", Path(name), ("x",), "train", recording=name) for name in ("1", "2", "1")]
    assert [(one.path, one.captions) for one in merged(rows)] == [(Path("1"), ("x", "x")), (Path("2"), ("x",))]


def test_one_name_of_two_recordings_is_no_leak():
    rows = [replace(row("0.wav", split), recording=f"{split}/0.wav") for split in ("train", "test")]
    assert aside(planned(rows)) == {"0.wav": "duplicate id"}
    assert aside(planned([replace(one, recording="one") for one in rows])) == {"0.wav": "held out by id"}


def test_a_link_that_leads_nowhere_is_a_missing_file(tmp_path):
    (tmp_path / "a.wav").symlink_to(tmp_path / "gone.wav")
    made = planned([replace(row("a", "train"), path=tmp_path / "a.wav")])
    assert aside(made) == {"a": MISSING}


def test_half_characters_of_json_become_question_marks():
    assert texts(["a dog \ud83d", None, "rain"]) == ("a dog ?", "rain")
    assert row("\ud83d", "train").rejection(MISSING).id == "\\xed\\xa0\\xbd"


def test_planning_takes_about_a_kilobyte_a_clip():
    tracemalloc.start()
    try:
        rows = [
            Row(f"{n:07d}.wav", Path(__file__), (f"a dog barks {n} times, then rain falls",), None, f"a:{n}") for n in range(9000)
        ]
        made = planned(rows)
        assert tracemalloc.get_traced_memory()[1] < 2048 * len(rows)
    finally:
        tracemalloc.stop()
    assert made.usable.nbytes < 200 * len(rows), "the table that every task has"
