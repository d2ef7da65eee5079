"""Looking at a run without a Ray session: what is heard of a query, what is refused, and which figures are not to be trusted."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ask_ray import inspection
from ask_ray.config import Settings, SettingsError, load
from ask_ray.data import folders
from ask_ray.data.corpus import Corpus
from ask_ray.inspection import OpenedRun
from ask_ray.models import registry
from ask_ray.storage import Folder
from ask_ray.training.checkpoint import Place
from ask_ray.training.trainer import RunPlace

RATE = 8000


def settings_of(**changes: object) -> Settings:
    tree = {"data": {"sample_rate": RATE, "max_seconds": 1.0}, "model": {"width": 0.1, "dim": 8}, "ask": {"enabled": False}}
    return load({**tree, **changes})


def opened_on(corpus: str, folder: Path, **changes: object) -> OpenedRun:
    """A run on a corpus that ended with the weights it began with."""
    settings = settings_of(**changes)
    model = registry.build(settings.model, RATE).eval()
    return OpenedRun(RunPlace(Folder.at(str(folder)), "run"), model, settings, Place(1, 1, 0, corpus))


def evaluated(monkeypatch: pytest.MonkeyPatch, opened: OpenedRun, on: Corpus, file: Path) -> tuple[dict, str, str]:
    """What an evaluation of a run found, what it said, and what it wrote."""
    monkeypatch.setattr(OpenedRun, "at", lambda run: opened)
    said = io.StringIO()
    found = inspection.evaluate("run", str(on.folder), "test", [str(file)], console=Console(file=said, width=200))
    return found, said.getvalue(), file.read_text()


def test_clips_that_are_the_same_sound_are_told_where_both_corpora_cut_alike(recorded, monkeypatch, tmp_path):
    own, on = recorded("own", 300, rain=3, dog=1), recorded("on", 300, test_rain=3, test_bell=1)
    found, said, wrote = evaluated(monkeypatch, opened_on(own.folder.uri, tmp_path), on, tmp_path / "f.md")
    assert (found["seen"], found["cut_otherwise"]) == (["test_rain.wav"], [])
    assert "too high: 1 of the 2 clips" in said
    assert "may be" not in said
    assert "SEEN 1 clips" in wrote


@pytest.mark.parametrize(("kept", "here"), [(300, 2), (2, 300), (2, 2.5)])
def test_that_clips_were_cut_otherwise_and_cannot_be_compared_is_told(kept, here, recorded, monkeypatch, tmp_path):
    own, on = recorded("own", kept, rain=3, dog=1), recorded("on", here, test_rain=3, test_bell=1)
    found, said, wrote = evaluated(monkeypatch, opened_on(own.folder.uri, tmp_path), on, tmp_path / "f.md")
    assert (found["seen"], found["cut_otherwise"]) == ([], [str(own.folder)])
    assert f"The figures may be too high: {on.folder} keeps {here} s of a recording and {own.folder} {kept} s" in said
    assert f"--data.keep_seconds {kept}" in said
    assert "MAY HAVE SEEN clips" in wrote


def test_clips_that_were_seen_are_told_beside_those_that_cannot_be_compared(recorded, monkeypatch, tmp_path):
    own, on = recorded("own", 300, rain=3, dog=1), recorded("on", 2, test_rain=3, test_dog=1)
    found, said, wrote = evaluated(monkeypatch, opened_on(own.folder.uri, tmp_path), on, tmp_path / "f.md")
    assert (found["seen"], found["cut_otherwise"]) == (["test_dog.wav"], [str(own.folder)])
    assert "too high: 1 of the 2 clips" in said
    assert "may be too high" in said
    assert "SEEN 1 clips and MAY HAVE SEEN more" in wrote


@pytest.mark.parametrize(("trained", "tested"), [(3, 1), (1, 3)])
def test_other_lengths_make_no_difference_where_only_one_corpus_holds_longer_recordings(
    trained, tested, recorded, monkeypatch, tmp_path
):
    own, on = recorded("own", 300, rain=trained), recorded("on", 2, test_bell=tested)
    found, said, wrote = evaluated(monkeypatch, opened_on(own.folder.uri, tmp_path), on, tmp_path / "f.md")
    assert (found["seen"], found["cut_otherwise"]) == ([], [])
    for text in (said, wrote):
        assert "too high" not in text
        assert "SEEN" not in text


def test_a_corpus_of_the_knowledge_base_that_was_cut_otherwise_is_told(recorded, monkeypatch, tmp_path):
    own, more, on = recorded("own", 300, dog=1), recorded("more", 300, rain=3), recorded("on", 2, test_rain=3)
    knowledge = {"knowledge": {"sources": ["train", str(more.folder)]}}
    opened = opened_on(own.folder.uri, tmp_path, **knowledge, ask={"enabled": True})
    assert evaluated(monkeypatch, opened, on, tmp_path / "f.md")[0]["cut_otherwise"] == [str(more.folder)]
    without = opened_on(own.folder.uri, tmp_path, **knowledge)
    assert evaluated(monkeypatch, without, on, tmp_path / "f.md")[0]["cut_otherwise"] == []


def forking(run: str) -> dict[str, dict[str, object]]:
    return {"run": {"fork": run}}


@pytest.mark.parametrize("runs_between", [0, 1])
def test_what_the_weights_have_seen_before_a_fork_is_told_on_the_runs_own_corpus_too(
    runs_between, recorded, left_run, monkeypatch, tmp_path
):
    first, own = recorded("first", rain=3, dog=1), recorded("own", bell=1, test_rain=3, test_horn=1)
    fork = left_run("a", settings_of(), first)
    for number in range(runs_between):
        fork = left_run(f"b{number}", settings_of(**forking(fork)), own)
    found, said, wrote = evaluated(monkeypatch, opened_on(own.folder.uri, tmp_path, **forking(fork)), own, tmp_path / "f.md")
    assert (found["seen"], found["cut_otherwise"], found["unchecked"]) == (["test_rain.wav"], [], [])
    assert "too high: 1 of the 2 clips" in said
    assert "SEEN 1 clips" in wrote


def test_of_a_fork_on_the_same_corpus_nothing_is_told(recorded, left_run, monkeypatch, tmp_path):
    own = recorded("own", bell=1, test_rain=3)
    opened = opened_on(own.folder.uri, tmp_path, **forking(left_run("a", settings_of(), own)))
    found, said, _ = evaluated(monkeypatch, opened, own, tmp_path / "f.md")
    assert "seen" not in found
    assert "too high" not in said


def test_that_a_forked_run_is_gone_is_told(recorded, left_run, monkeypatch, tmp_path):
    own, gone = recorded("own", bell=1, test_rain=3), str(tmp_path / "gone")
    fork = left_run("a", settings_of(**forking(gone)), own)
    found, said, _ = evaluated(monkeypatch, opened_on(own.folder.uri, tmp_path, **forking(fork)), own, tmp_path / "f.md")
    (problem,) = found["unchecked"]
    assert problem.startswith(f"run.fork: {gone}")
    assert "may be too high" in said


def test_what_cannot_be_read_of_what_was_seen_costs_no_evaluation(recorded, monkeypatch, tmp_path):
    """A corpus with its manifest, but without its clips, is one that could not be opened; it is looked at before encoding."""
    own, on = recorded("own", dog=1), recorded("on", test_rain=3)
    shutil.rmtree(own.folder.local / "clips")
    found, said, wrote = evaluated(monkeypatch, opened_on(own.folder.uri, tmp_path), on, tmp_path / "f.md")
    (problem,) = found["unchecked"]
    assert str(own.folder / "clips") in problem
    assert "may be too high" in said
    assert "MAY HAVE SEEN" in wrote


def test_what_can_no_longer_be_compared_is_told_and_keeps_no_run_from_another_corpus(recorded, left_run, monkeypatch, tmp_path):
    first, own, on = recorded("first", rain=3), recorded("own", dog=1, test_bell=1), recorded("on", test_dog=1, test_rain=3)
    opened = opened_on(own.folder.uri, tmp_path, **forking(left_run("a", settings_of(), first)))
    shutil.rmtree(own.folder.local)
    found, said, wrote = evaluated(monkeypatch, opened, on, tmp_path / "f.md")
    assert found["seen"] == ["test_rain.wav"]
    (problem,) = found["unchecked"]
    assert str(own.folder) in problem
    assert f"The figures may be too high: whether clips of {on.folder} were trained on could not be checked: {problem}" in said
    assert "SEEN 1 clips and MAY HAVE SEEN more" in wrote
    with pytest.raises(SettingsError, match=rf"^{own.folder}: no prepared corpus is there"):
        inspection.evaluate("run", None, "test")


def test_a_corpus_of_another_form_than_the_run_was_trained_on_is_refused_without_its_own(recorded, monkeypatch, tmp_path):
    on = recorded("on", test_dog=1)
    opened = opened_on("gone", tmp_path, data={"sample_rate": 16000})
    with pytest.raises(SettingsError, match=r"^--corpus: .* has 8000 Hz, .* 16000 Hz: prepare it with --data\.sample_rate 16000"):
        evaluated(monkeypatch, opened, on, tmp_path / "f.md")


@pytest.mark.parametrize("query", ["a dog barks and then " * 20, "~10 dogs bark", "null\0byte"])
def test_a_query_that_no_filesystem_takes_as_a_name_is_a_text(query, tmp_path, monkeypatch):
    opened = opened_on("nowhere", tmp_path)
    monkeypatch.setattr(OpenedRun, "at", lambda run: opened)
    with pytest.raises(SettingsError, match="no knowledge base to search"):
        inspection.search(query, "run", "", 3)


@pytest.mark.parametrize("ending", [*folders.RECORDINGS.endings, *folders.PICTURES.endings, ".WAV"])
def test_a_query_that_ends_like_any_file_a_corpus_may_hold_is_one_that_is_not_there(ending):
    with pytest.raises(SettingsError, match=r"^query: .* is not there"):
        inspection.search(f"nowhere/a dog{ending}", "no run", "", 3)


@pytest.mark.parametrize("top", [0, -1])
def test_a_search_for_no_results_is_refused_before_a_run_is_opened(top):
    with pytest.raises(SettingsError, match=rf"^--top: {top} .* 1 or more"):
        inspection.search("a dog barks", "no run", "", top)


def test_brackets_in_what_is_asked_and_found_are_text():
    said = io.StringIO()
    table = inspection._ranking([(0.5, "Dog bark [dq4].wav", "[music] then [/] talk")], "nearest to '[/x] or [b]'", "clips")
    Console(file=said, width=120).print(table)
    for text in ("Dog bark [dq4].wav", "[music] then [/] talk", "'[/x] or [b]'"):
        assert text in said.getvalue()


def test_no_more_of_a_query_is_heard_than_of_a_clip(tmp_path, write_audio):
    """What follows is not even decoded: here it could not be used."""
    opened = opened_on("nowhere", tmp_path)
    samples = 0.1 * np.random.default_rng(0).standard_normal(3 * 22050).astype(np.float32)
    whole = inspection._perceived(write_audio(tmp_path / "a.wav", rate=22050, samples=samples[:22050], subtype="FLOAT"), opened)
    samples[2 * 22050 :] = np.nan
    longer = inspection._perceived(write_audio(tmp_path / "b.wav", rate=22050, samples=samples, subtype="FLOAT"), opened)
    assert (whole.vectors == longer.vectors).all()


def test_a_run_without_a_knowledge_base_says_that_another_can_be_named(tmp_path, monkeypatch):
    opened = opened_on("nowhere", tmp_path)
    monkeypatch.setattr(OpenedRun, "at", lambda run: opened)
    Folder.at(str(tmp_path / "run")).write_json("result.json", {})
    with pytest.raises(SettingsError, match=r"no knowledge base .*; name another with --run"):
        inspection.search("a dog barks", None, str(tmp_path), 3)
