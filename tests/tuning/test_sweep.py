"""Sweeps with real Ray Tune: what cannot work is refused before the first trial; what is stopped or fails stops nothing else."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from sweeps import QUICK, write_space

from ask_ray import lease
from ask_ray.config import SettingsError, SweepSettings, load
from ask_ray.storage import Folder
from ask_ray.tuning import space, sweep

mlflow = pytest.importorskip("mlflow")

RHO = {"ask.rho": {"grid": [0.5, 0.8]}}
GRID = {"algorithm": "grid"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


def begin(home: Path, swept: dict[str, Any], of: dict[str, Any], settings: dict[str, Any] | None = None) -> dict[str, Any]:
    found = space.read(str(write_space(home, swept, of, settings)))
    return sweep.sweep(load(found.settings), SweepSettings.model_validate(found.sweep), found, Console(quiet=True))


ASK = {"enabled": True, "prototypes": 8}


@pytest.mark.parametrize(
    ("swept", "of", "settings", "message"),
    [
        ({"ask.neighbours": {"grid": [5, 64]}}, GRID, {"ask": ASK}, "ask.neighbours: .*64 clips 63 are left"),
        ({"ask.prototypes": {"grid": [8, 65]}}, GRID, {"ask": ASK}, "ask.prototypes: .*65, but the knowledge base has 64"),
        (
            RHO,
            {**GRID, "metric": "accuracy"},
            None,
            "sweep.metric: no evaluation on the validation split reports 'accuracy'; they report mean_r1, t2a_r1",
        ),
        (RHO, GRID, {"training": {"epochs": 3, "evaluate_every": 2}}, "training.evaluate_every is 2: the last of 3 epochs"),
        (
            RHO,
            GRID,
            {"training": {"epochs": 3, "evaluate_every": 1, "workers": 2, "min_workers": 1, "cpus_per_worker": 1}},
            "training.min_workers: the trials of a sweep have fixed shares",
        ),
        (
            RHO,
            GRID,
            {"training": {"epochs": 3, "evaluate_every": 1, "workers": 4, "cpus_per_worker": 1, "batch_size": 16}},
            r"sweep: a trial reserves 0.05 CPU for itself, 4 workers x \(1 CPU .* the cluster's nodes hold 4 CPU",
        ),
        (
            {"training.evaluate_every": {"grid": [1, 2]}},
            GRID,
            None,
            "training.evaluate_every is 2: the last of 3 epochs",
        ),
        (RHO, GRID, {"run": {"name": "mine"}}, "run.name: a sweep gives it to its trials itself; set sweep.name"),
        (RHO, GRID, {"run": {"seed": 3}}, "run.seed: .*set sweep.seeds"),
        (RHO, {"algorithm": "pbt", "trials": 64}, None, "pbt trains all of its 64 trials at once, and there is room for"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_trial(home, ray_session, swept, of, settings, message):
    with pytest.raises(SettingsError, match=message):
        begin(home, swept if of.get("algorithm") != "pbt" else {"ask.rho": {"uniform": [0.2, 0.8]}}, of, settings)
    assert not [*home.glob("runs/*/trials")]


def test_a_line_is_named_where_one_setting_alone_cannot_work(home, ray_session):
    with pytest.raises(SettingsError, match=r"space\.yaml:\d+: ask.prototypes: is 65"):
        begin(home, {"ask.prototypes": {"grid": [8, 65]}}, GRID, {"ask": ASK})


def test_without_clips_to_compare_on_there_is_no_sweep(tmp_path, home, ray_session):
    data = {"soundscapes": {"train": 64, "validation": 0, "test": 20, "seconds": 1.0, "captions": 2}, "shard_clips": 64}
    with pytest.raises(SettingsError, match="the validation split is empty"):
        begin(tmp_path, RHO, GRID, {"data": {**data, "prepared": str(tmp_path / "prepared")}})


def test_a_name_of_a_run_or_of_another_sweep_is_refused(home, ray_session):
    runs = home / "runs"
    (runs / "run").mkdir(parents=True)
    (runs / "run/settings.yaml").write_text("{}")
    with pytest.raises(SettingsError, match=r"sweep.name: .*run is a run"):
        begin(home, RHO, {**GRID, "name": "run"})
    (runs / "other").mkdir()
    (runs / "other/space.yaml").write_text(yaml.safe_dump({"space": {"ask.beta": {"grid": [0.1]}}}))
    with pytest.raises(
        SettingsError, match=r"sweep.name: .*other is another sweep: space.ask.beta.grid \(\[0.1\] there, None here\)"
    ):
        begin(home, RHO, {**GRID, "name": "other"})


def test_a_sweep_that_is_under_way_is_not_driven_twice(home, ray_session, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    with (
        lease.held(Folder.at(str(home / "runs/driven")), "sweep.name"),
        pytest.raises(SettingsError, match=r"sweep\.name: .*driven is under way"),
    ):
        begin(home, RHO, {**GRID, "name": "driven"})


@pytest.mark.survival
def test_a_sweep_lives_on_object_storage_and_is_continued_there(ray_session, s3, tmp_path):
    place = Folder.at(s3.uri("bucket/sweeps")) / "far"
    settings = {
        "run": {"storage": s3.uri("bucket/sweeps")},
        "tracking": {"enabled": False},
        "training": {**QUICK["training"], "epochs": 1},
    }
    found = begin(tmp_path, RHO, {**GRID, "name": "far"}, settings)
    assert [row["status"] for row in found["trials"]] == ["finished", "finished"]
    assert place.read_json("sweep.json") == found
    assert {"best.yaml", "sweep.md", "pictures", "tune", "trials"} <= {*place.names()}
    files = {name: (place / "trials" / name).names() for name in (place / "trials").names()}
    assert all("result.json" in names for names in files.values())
    kept = [name for name, names in files.items() if any(file.startswith("checkpoint_") for file in names)]
    assert kept == [f"{found['best']['trial']}-seed-0"]
    ghost = {**found["trials"][0], "trial": "ghost", "status": "running"}  # begun a moment before a kill, unknown to Ray Tune
    place.write_json("sweep.json", {"trials": [*found["trials"], ghost]})
    (place / "trials/ghost-seed-0/checkpoint_1").write("model.safetensors", b"weights")
    again = begin(tmp_path, RHO, {**GRID, "name": "far"}, settings)
    assert again["trials"] == found["trials"]
    assert (place / "trials/ghost-seed-0").names() == []


def test_a_dry_run_tells_what_a_trial_takes_and_leaves_nothing(home, ray_session):
    found = begin(home, RHO, {**GRID, "name": "dry"}, {"run": {"storage": str(home / "runs"), "dry_run": True}})
    assert found["dry_run"]
    assert found["clips"] == 64
    assert not (home / "runs/dry").exists()


def test_a_sweep_is_not_continued_with_less_room_than_it_began_with(home, ray_session):
    place = Folder.at(str(home / "runs/roomy"))
    of = {**GRID, "name": "roomy"}
    begun = space.read(str(write_space(home, RHO, of)))
    checked = sweep._checked(load(begun.settings), SweepSettings.model_validate(of), begun.space, Console(quiet=True))
    sweep._begin(checked, SweepSettings.model_validate(of), Console(quiet=True))
    told = yaml.safe_load(place.read("space.yaml"))
    place.write("space.yaml", yaml.safe_dump({**told, "at_once": 100}).encode())
    with pytest.raises(SettingsError, match=r"sweep.name: .*begun with 100 trials at once, and here is room for \d+"):
        begin(home, RHO, of)


def test_a_sweep_that_was_killed_before_ray_tune_kept_anything_begins_anew(tmp_path):
    place = Folder.at(str(tmp_path))
    assert not sweep._begun(place / "tune")
    (place / "tune").write("tuner.pkl", b"")
    assert not sweep._begun(place / "tune")
    (place / "tune").write("experiment_state-2026.json", b"{}")
    assert sweep._begun(place / "tune")
