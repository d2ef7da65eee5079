"""Values that a corpus has no room for: refused with their line, but only where no point of the space makes them right."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from rich.console import Console

from ask_ray import cluster, experiment
from ask_ray.config import Settings, SettingsError, SweepSettings, load, with_values
from ask_ray.data.corpus import Corpus
from ask_ray.data.schema import FORMAT, SPLITS
from ask_ray.storage import Folder
from ask_ray.tuning import space, sweep

CAPTIONS, NC, K = "knowledge.captions_per_clip", "ask.prototypes", "ask.neighbours"


def settings_of(**ask: Any) -> Settings:
    shared = {"workers": 1, "batch_size": 8, "device": "cpu", "evaluate_every": 1}
    return load({"training": shared, "knowledge": {"captions_per_clip": 1}, "ask": {"prototypes": 8, **ask}})


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """100 clips of five captions, of which there is no more than what the manifest tells."""
    files = [{"name": "clips", "clips": 100}]
    of_each = {"clips": 100, "most_captions": 5, "files": files, "samples": 100}
    form = {"modality": "audio", "sample_rate": 16000, "settings": {"keep_seconds": 10}}
    told = {"format": FORMAT, **form, "splits": dict.fromkeys(SPLITS, of_each)}
    (Folder.at(str(tmp_path)) / "corpus").write_json("manifest.json", told)
    return Corpus.open(str(tmp_path / "corpus"))


def read(tmp_path: Path, swept: dict[str, Any]) -> space.Space:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"space": swept}, sort_keys=False))
    return space.read(str(tmp_path / "space.yaml")).space


def check(tmp_path: Path, corpus: Corpus, swept: dict[str, Any], algorithm: str, base: Settings) -> None:
    made = read(tmp_path, swept)
    sweep._check_values(made, base, space.points_of(made, SweepSettings(algorithm=algorithm)), corpus)


@pytest.mark.parametrize(
    ("swept", "algorithm"),
    [
        ({CAPTIONS: {"grid": [1, 5]}, NC: {"grid": [400], "when": {CAPTIONS: 5}}}, "grid"),
        ({CAPTIONS: {"choice": [1, 5]}, NC: {"choice": [400], "when": {CAPTIONS: 5}}}, "optuna"),
        ({CAPTIONS: {"choice": [1, 5]}, NC: {"randint": [200, 501], "when": {CAPTIONS: 5}}}, "optuna"),
        ({CAPTIONS: {"grid": [5]}, NC: {"grid": [8, 500]}}, "grid"),
        ({"ask.enabled": {"grid": [True, False]}, K: {"grid": [5, 50], "when": {"ask.enabled": True}}}, "grid"),
    ],
)
def test_a_value_is_tried_with_the_values_that_it_is_swept_beside(tmp_path, corpus, swept, algorithm):
    check(tmp_path, corpus, swept, algorithm, settings_of(exclude="none"))


@pytest.mark.parametrize(
    ("swept", "algorithm", "line"),
    [
        ({CAPTIONS: {"grid": [1, 5]}, NC: {"grid": [8, 501]}}, "grid", 6),
        ({CAPTIONS: {"choice": [1, 5]}, NC: {"choice": [101], "when": {CAPTIONS: 1}}}, "optuna", 6),
        ({CAPTIONS: {"choice": [1, 5]}, NC: {"randint": [8, 502], "when": {CAPTIONS: 5}}}, "optuna", 6),
        ({K: {"lograndint": [2, 102]}}, "random", 2),
    ],
)
def test_a_value_that_works_in_no_point_is_refused_with_its_line(tmp_path, corpus, swept, algorithm, line):
    with pytest.raises(SettingsError, match=rf"space\.yaml:{line}: ask\.(prototypes|neighbours): is \d+, but"):
        check(tmp_path, corpus, swept, algorithm, settings_of(exclude="none"))


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ({}, r"^\S+space\.yaml: .* point that cannot run: knowledge\.captions_per_clip 1, ask\.prototypes 400: .*`when`$"),
        ({"training.evaluate_every": 3}, r"^training\.evaluate_every is 3: "),  # of what all trials share
    ],
)
def test_what_fails_in_one_point_names_the_point_and_what_fails_in_all_the_setting(tmp_path, corpus, base, told):
    made = read(tmp_path, {CAPTIONS: {"grid": [1, 5]}, NC: {"grid": [8, 400]}})
    with pytest.raises(SettingsError, match=told):
        sweep._check_points(made, with_values(settings_of(exclude="none"), base), made.grid(), corpus)


def nodes_of(monkeypatch: pytest.MonkeyPatch, cpus: float, memory: float = 0) -> None:
    """A cluster of one node."""
    resources = {"CPU": cpus, "memory": memory}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)


def test_trials_at_once_are_those_of_the_point_that_takes_most_and_one_that_never_fits_is_named(tmp_path, monkeypatch):
    nodes_of(monkeypatch, 4.2)
    shared = settings_of(enabled=False)
    assert sweep._room(read(tmp_path, {"training.cpus_per_worker": {"grid": [0.5, 2.0]}}), shared, [], 8) == 7
    made = read(tmp_path, {"training.cpus_per_worker": {"grid": [0.5, 2.0]}})
    assert sweep._room(made, shared, made.grid(), 8) == 2
    for never in (4.2, 5.0):  # no room for the trial itself, and none for its worker
        made = read(tmp_path, {"training.cpus_per_worker": {"grid": [0.5, never]}})
        with pytest.raises(SettingsError, match=rf"^\S+space\.yaml: .* cannot run: training\.cpus_per_worker {never:g}: "):
            sweep._room(made, shared, made.grid(), 8)


def held(made: space.Space, base: Settings, corpus: Corpus, room: int = 8) -> int:
    towers = sweep._check_towers([base, *made.check_points(base, made.grid())])
    return sweep._held(made, base, made.grid(), lambda one: sweep._takes(one, corpus, towers), room)


def test_memory_bounds_trials_by_the_towers_of_the_point_that_takes_most(tmp_path, corpus, monkeypatch):
    base = with_values(settings_of(enabled=False), {"model.width": 0.25})
    made = read(tmp_path, {"model.width": {"grid": [0.25, 2.0]}})
    small, large = (
        sweep._takes(one, corpus, sweep._check_towers([one])).worker_bytes for one in made.check_points(base, made.grid())
    )
    assert large > 2 * small
    nodes_of(monkeypatch, 64, 2.5 * large)
    assert held(made, base, corpus) == 2
    assert held(read(tmp_path, {"model.width": {"grid": [0.25]}}), base, corpus) >= 5
    nodes_of(monkeypatch, 64, (small + large) / 2)
    with pytest.raises(SettingsError, match=r"^\S+space\.yaml: .* cannot run: model\.width 2: .* keeps .* GiB"):
        held(made, base, corpus)
    nodes_of(monkeypatch, 64, small / 2)
    with pytest.raises(SettingsError, match=r"^training\.workers: "):  # all that could be tried takes as much
        held(read(tmp_path, {"ask.rho": {"grid": [0.2, 0.8]}}), base, corpus)


def test_a_sweep_goes_on_as_it_was_begun_whatever_memory_is_free_by_now(tmp_path, corpus, monkeypatch):
    base = settings_of(enabled=False)
    home, swept = str(tmp_path / "runs"), read(tmp_path, {"model.width": {"grid": [0.25, 0.5, 0.75]}})
    base, of = with_values(base, {"run.storage": home}), SweepSettings(algorithm="grid", name="sweep", concurrent=3)
    monkeypatch.setattr(cluster, "connect_for_sweep", lambda *asked: None)
    monkeypatch.setattr(experiment, "prepared", lambda *asked: corpus)

    def checked(cpus: float, gib: float) -> sweep.Checked:
        nodes_of(monkeypatch, cpus, gib * 2**30)
        return sweep._checked(base, of, swept, Console(quiet=True))

    begun = checked(8, 64)
    assert (begun.at_once, begun.continued) == (3, False)
    tight = 1.5 * begun.takes.worker_bytes / 2**30
    assert checked(8, tight).at_once < 3
    sweep._begin(begun, of, Console(quiet=True))
    assert (checked(8, tight).at_once, checked(8, 64).continued) == (3, True)
    with pytest.raises(SettingsError, match=r"begun with 3 trials at once, and here is room for 1 by CPUs and GPUs"):
        checked(1, 64)


def test_towers_of_other_lengths_of_clips_are_apart_where_tokens_meet():
    for interaction, count in (("cosine", 1), ("late", 2)):
        base = with_values(settings_of(), {"model.interaction": interaction, "model.width": 0.1})
        assert len(sweep._check_towers([with_values(base, {"data.max_seconds": seconds}) for seconds in (1.0, 2.0)])) == count
