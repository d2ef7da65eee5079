"""What a trial tells Ray Tune, and whom early stopping may stop for it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from ask_ray import experiment
from ask_ray.config import Settings, SweepSettings, load
from ask_ray.journal import Journal
from ask_ray.storage import Folder
from ask_ray.training.checkpoint import CheckpointError
from ask_ray.tuning import search, trial
from ask_ray.tuning.space import Dimension, Space
from ask_ray.tuning.trial import AGE, DONE, TrialPlan

SPACE = Space("space.yaml", (Dimension("training.epochs", "choice", (6, 12), 2),))


def run(settings: Settings, console: Console, listen: experiment.Listener, tags: dict[str, str]) -> None:
    """A run that does nothing but what it tells and leaves."""
    training = settings.training
    events = [
        {"kind": "epoch", "epoch": epoch, "step": epoch, "t2a_r1": 0.1, "mean_r1": epoch / 100}
        for epoch in range(1, training.epochs + 1)
        if training.evaluates(epoch)
    ]
    folder = Folder.at(settings.run.storage) / str(settings.run.name)
    folder.write_json("history.json", events)
    for event in events:
        listen(event)
    folder.write_json("result.json", {})


@pytest.fixture
def reports(monkeypatch) -> list[dict[str, Any]]:
    """What trials reported."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(tune, "report", lambda report, checkpoint=None: made.append(report))
    return made


def train(home: Path, name: str, sweep: SweepSettings, epochs: int, every: int) -> None:
    settings = load({"training": {"epochs": epochs, "evaluate_every": every}})
    trial._train(name, {}, TrialPlan(settings, sweep, Folder.at(str(home)), "", Journal("none")))


@pytest.mark.parametrize(
    ("sweep", "ages"),
    [
        ({}, [3, 6, 7]),
        ({"seeds": [0, 1]}, [3, 6, 9, 12, 13]),
        ({"early_stopping": True}, [3, 7]),
        ({"early_stopping": True, "seeds": [0, 1]}, [3, 6, 9, 13]),
        ({"algorithm": "pbt"}, [3, 6, 7]),
    ],
)
def test_every_evaluation_is_told_but_early_stopping_hears_of_the_last_only_when_all_is_done(tmp_path, reports, sweep, ages):
    train(tmp_path, "a", SweepSettings(**sweep), 6, 3)
    assert [report[AGE] for report in reports] == ages
    assert [report[DONE] for report in reports] == [False] * (len(ages) - 1) + [True]
    assert reports[-1]["mean_r1"] == 0.06


@pytest.mark.parametrize(("epochs", "every", "grace"), [([12, 12], 3, 10), ([6, 14], 1, 6), ([6, 14], 2, 5)])
def test_a_trial_whose_training_is_done_is_not_stopped_before_its_end(tmp_path, reports, epochs, every, grace):
    sweep = SweepSettings(early_stopping=True, grace_epochs=grace)
    scheduler = search.config(sweep, SPACE, [], 2, max(epochs))["tune_config"].scheduler
    scheduler.set_search_properties("mean_r1", "max")
    for number, of_trial in enumerate(reversed(epochs)):  # the shorter one comes later, and each is worse than that before it
        told = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, told)
        reports.clear()
        train(tmp_path, told.trial_id, sweep, of_trial, every)
        for report in reports:
            worse = {**report, "mean_r1": 1.0 - number / 10}
            if scheduler.on_trial_result(None, told, worse) == TrialScheduler.STOP:
                assert report[DONE], "stopped before its final refresh and evaluation"


@pytest.fixture
def leave(tmp_path, left_run) -> Callable[..., None]:
    """A function that leaves a run of a population: with a checkpoint or before its first, at its end or not."""

    def left(name: str, saved: bool, whole: bool = False, **of_run: str) -> None:
        settings, folder = load({"run": of_run}), Folder.at(str(tmp_path)) / name
        folder.write("settings.yaml", settings.to_yaml().encode())
        if saved:
            left_run(name, settings, SimpleNamespace(folder=folder))
        if whole:
            folder.write_json("result.json", {})

    return left


def part(home: Path, donor: str, **point: float) -> dict[str, Any]:
    """What trial `a` is told to take up that has a run with ρ = 0.8."""
    plan = TrialPlan(load({}), SweepSettings(algorithm="pbt"), Folder.at(str(home)), "", Journal("none"))
    return trial._part(plan, {"ask.rho": 0.8, **point}, "a", 0, donor)


def test_a_trial_waits_for_the_first_checkpoint_of_the_run_that_it_takes_over(tmp_path, leave, monkeypatch):
    leave("b-seed-0", saved=False)
    monkeypatch.setattr(trial.time, "sleep", lambda seconds: leave("b-seed-0", saved=True))
    assert part(tmp_path, "b-seed-0") == {"run.name": "a-seed-0-part-1", "run.fork": str(tmp_path / "b-seed-0")}
    assert (tmp_path / "b-seed-0/checkpoint_a").exists()


@pytest.mark.parametrize(("whole", "patience"), [(False, 0.0), (True, 300.0)], ids=["takes-too-long", "gone-for-good"])
def test_a_trial_that_finds_no_weights_to_take_over_says_which(tmp_path, leave, whole, patience, monkeypatch):
    leave("b-seed-0", saved=False, whole=whole)
    monkeypatch.setattr(trial, "PATIENCE", patience)
    monkeypatch.setattr(trial.time, "sleep", lambda seconds: pytest.fail("it waits for what cannot come"))
    with pytest.raises(CheckpointError, match=r"/b-seed-0: no checkpoint of before epoch 14 is there to take over"):
        part(tmp_path, "b-seed-0")


def test_of_a_run_that_itself_forked_another_just_before_its_end_that_other_is_forked(tmp_path, leave):
    leave("c-seed-0", saved=True)
    leave("b-seed-0-part-1", saved=False, whole=True, fork=str(tmp_path / "c-seed-0"))
    assert part(tmp_path, "b-seed-0-part-1")["run.fork"] == str(tmp_path / "c-seed-0")


def test_a_part_goes_on_as_it_was_begun_while_its_settings_are_its_own(tmp_path, leave):
    leave("b-seed-0", saved=True)
    leave("a-seed-0-part-1", saved=True, fork=str(tmp_path / "b-seed-0"))
    assert part(tmp_path, "a-seed-0-part-1") == {"run.name": "a-seed-0-part-1", "run.fork": str(tmp_path / "b-seed-0")}
    changed = part(tmp_path, "a-seed-0-part-1", **{"ask.rho": 0.5})
    assert changed == {"run.name": "a-seed-0-part-2", "run.fork": str(tmp_path / "a-seed-0-part-1")}


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_run_without_its_last_evaluation_is_not_judged_by_an_earlier_one_and_is_trained_again(
    tmp_path, reports, monkeypatch, seeds
):
    def unevaluated(settings: Settings, *rest: Any) -> None:
        run(settings, *rest)
        folder = Folder.at(settings.run.storage) / str(settings.run.name)
        if settings.run.seed == seeds[-1]:
            folder.write_json("history.json", folder.read_json("history.json")[:-1])

    monkeypatch.setattr(experiment, "run", unevaluated)
    with pytest.raises(trial.NotEvaluated, match=f"^a-seed-{seeds[-1]}: there is no mean_r1 of its last epoch, 6: the eval"):
        train(tmp_path, "a", SweepSettings(seeds=seeds), 6, 3)
    assert not any(report[DONE] for report in reports)
    checkpoint = tmp_path / f"a-seed-{seeds[-1]}/checkpoint_a/state.json"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    trained = []

    def again(settings: Settings, *rest: Any) -> None:
        trained.append(settings.run.seed)
        assert not checkpoint.exists()  # else it would be at its end again, and not be evaluated
        run(settings, *rest)

    monkeypatch.setattr(experiment, "run", again)
    train(tmp_path, "a", SweepSettings(seeds=seeds), 6, 3)
    assert trained == seeds[-1:]
    assert reports[-1][DONE]


def test_the_schedule_of_a_run_goes_back_over_those_that_it_was_forked_from(tmp_path):
    trials, fork = Folder.at(str(tmp_path)), None
    for name, rho in (("a-seed-0", 0.4), ("b-seed-0-part-1", 0.5), ("b-seed-0-part-2", 0.6)):
        settings = load({"run": {"name": name, "storage": trials.uri, "fork": fork}, "ask": {"rho": rho}})
        (trials / name).write("settings.yaml", settings.to_yaml().encode())
        fork = (trials / name).uri
    told = "ask.rho 0.4 (a-seed-0), then ask.rho 0.5 (b-seed-0-part-1), then ask.rho 0.6 (b-seed-0-part-2)"
    assert trial.schedule(trials / "b-seed-0-part-2", ["ask.rho"]) == told
