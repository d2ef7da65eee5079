"""Whole runs on a real Ray session: what `jobs/train.py` promises, and what it refuses before it starts."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import psutil
import pytest
import torch
import yaml
from picture_trees import coco_2017, save, scene
from rich.console import Console
from runs import quiet, settings_of
from safetensors.torch import save_file

from ask_ray import experiment, inspection, lease, report, tracking
from ask_ray.config import Settings, SettingsError, UserError, load
from ask_ray.data.batches import pad
from ask_ray.data.corpus import Corpus
from ask_ray.data.prepare import prepare
from ask_ray.data.schema import UnusableClip
from ask_ray.journal import Journal
from ask_ray.knowledge import snapshot
from ask_ray.knowledge.replica import Knowledge
from ask_ray.method.drift import rdm
from ask_ray.models.dual_encoder import scores
from ask_ray.models.weights import WeightsError
from ask_ray.storage import Folder, StorageError
from ask_ray.training import checkpoint, worker
from ask_ray.training.gauges import FIGURES
from ask_ray.training.trainer import RunPlace

ROOT = Path(__file__).parents[1]

REFRESH_KEYS = {
    "version", "encoder_step", "swap_step", "lag_steps", "encode_seconds", "build_seconds", "swap_ms", "entries"
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sync_run(ray_session: None, home: Path) -> dict:
    """A finished run of one worker in `sync` mode, with MLflow."""
    return experiment.run(settings_of(home, run={"name": "sync-a"}, tracking={"enabled": True}), quiet())


#: A refresh is asked for as soon as the entries have moved at all, 4 steps of the 8 of an epoch after the last or later.
DRIFT = {
    "refresh": {"policy": "adaptive", "threshold": 1e-6, "min_interval": 0.5, "poll_steps": 3},
    "corrections": {"write_back": False, "drift_map": False},
}


@pytest.fixture(scope="module")
def drift_run(ray_session: None, home: Path) -> dict:
    """A finished run that refreshes by the drift of its batches."""
    return experiment.run(settings_of(home, run={"name": "drift"}, knowledge=DRIFT), quiet())


@pytest.fixture(scope="module")
def plain_run(ray_session: None, home: Path) -> dict:
    """A finished run without the method."""
    return experiment.run(plain_settings(home, "plain"), quiet())


def plain_settings(home: Path, name: str, seed: int = 0) -> Settings:
    return settings_of(home, run={"name": name, "seed": seed}, ask={"enabled": False}, training={"epochs": 2})


@dataclass(frozen=True)
class Beside:
    """A run that was evaluated beside training: what it gave and told, and the task of evaluation that was killed."""

    result: dict
    told: str
    killed: int


@pytest.fixture(scope="module")
def beside_run(ray_session: None, home: Path) -> Beside:
    """As `sync_run`, but evaluated beside training, after every epoch, by a task that is killed once."""
    beside = {"evaluation": "beside", "evaluate_every": 1, "checkpoint_every": 3}
    settings = settings_of(home, run={"name": "beside"}, training=beside, tracking={"enabled": True})
    told = io.StringIO()
    with ThreadPoolExecutor() as saboteur:
        killed = saboteur.submit(kill_the_first, "ray::run_validation_fn", pause=0.05)  # it does not live long
        result = experiment.run(settings, Console(file=told, width=120))
    return Beside(result, told.getvalue(), killed.result())


def test_two_workers_train_while_the_knowledge_base_is_swapped_in(ray_session: None, home: Path) -> None:
    # How long a refresh takes beside training is up to the machine: where it is not in use for the last of 14 epochs, there are
    # more, in another run.
    for epochs in (14, 32):
        result = experiment.run(
            settings_of(
                home,
                run={"name": f"async-{epochs}"},
                knowledge={"refresh": {"mode": "async", "warmup_epochs": 0.5}},
                data={"soundscapes": {"train": 1024}},
                training={"workers": 2, "batch_size": 8, "epochs": epochs, "evaluate_every": 0},
                ask={"influence": True, "negatives": "none"},  # the loss of all epochs is then over the same candidates
            ),
            quiet(),
        )
        swapped = [row["swap_step"] for row in result["refreshes"]]
        if min(swapped) <= result["steps"] - 64:
            break
    folder = Path(result["folder"])
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["steps"] == epochs * 64
    assert result["world_size"] == 2
    assert len(result["refreshes"]) >= 2
    for row in result["refreshes"]:
        assert row.keys() >= REFRESH_KEYS
        assert row["entries"] == 1024
        assert row["ranks"] == 2
        assert row["lag_steps"] == row["swap_step"] - row["encoder_step"] >= 0
    assert min(swapped) <= result["steps"] - 64, "no swap while training went on, a whole epoch before its end"
    for ways in (result["final"], result["final_injected"]):
        for of in ways.values():
            assert of["n"] == 48
            assert 0 <= of["r1"] <= of["r5"] <= of["r10"] <= 1
    assert {path.name for path in (folder / "pictures").iterdir()} == {"curves.png", "drift.png", "refreshes.png"}
    told = [event for event in json.loads((folder / "history.json").read_text()) if event["kind"] == "epoch"]
    assert [event["epoch"] for event in told] == list(range(1, epochs + 1))
    assert told[0]["loss"] > told[-1]["loss"]
    assert told[-1]["influence"] > 0
    assert 0 < told[-1]["corrected_share"] <= 1
    assert told[-1]["corrected_age_steps"] > 0
    assert {"temperature", "consistency"} | FIGURES.keys() - {"swap_ms", "epoch", "step"} <= told[-1].keys()
    events = json.loads((folder / "history.json").read_text())
    begun, first = (next(n for n, event in enumerate(events) if event["kind"] == kind) for kind in ("started", "encoding"))
    assert any(event["kind"] == "step" for event in events[begun:first]), "training stood still until the pool was there"


@pytest.mark.parametrize(
    ("refresh", "told"),
    [
        ({"policy": "adaptive", "threshold": 1e-6, "min_interval": 0.75, "signal": "probe", "probe_steps": 3}, "RDM"),
        ({"policy": "continuous", "unit": "steps", "min_interval": 6}, "the last is in"),
    ],
)
def test_policies_refresh_by_what_they_see_and_say_why(ray_session: None, home: Path, refresh: dict, told: str) -> None:
    knowledge = {"refresh": refresh, "corrections": {"write_back": False, "drift_map": False}}
    settings = settings_of(home, run={"name": refresh["policy"]}, knowledge=knowledge, training={"epochs": 2})
    check_refreshes(experiment.run(settings, quiet()), told)


def test_policy_adaptive_refreshes_by_the_drift_of_batches_and_says_so(drift_run: dict) -> None:
    check_refreshes(drift_run, "RDM")


def check_refreshes(result: dict, told: str) -> None:
    """Every version but the first, after warm-up, and the last, by the final weights, has a reason that holds `told`."""
    first, *later, _ = [row["reason"] for row in result["refreshes"]]
    assert first == "warm-up is over"
    assert later
    assert all(told in reason for reason in later)
    gaps = np.diff([row["encoder_step"] for row in result["refreshes"][:-1]])
    assert (gaps >= 4).all(), "no sooner than the floor"


def test_drift_is_zero_with_a_fresh_knowledge_base_and_not_after_steps(sync_run: dict) -> None:
    events = json.loads((Path(sync_run["folder"]) / "history.json").read_text())
    by_epoch = {event["epoch"]: event for event in events if event["kind"] == "epoch"}
    assert by_epoch[3]["probe_rdm_audio"] > 0
    assert by_epoch[3]["probe_rdm_text"] > 0
    swaps = [event["step"] for event in events if event["kind"] == "swapped"]
    assert swaps == [8, 16, 24], "in sync mode every version is in use at the step that asked for it"
    drift = drift_by_version(sync_run)
    assert list(drift) == [8, 16, 24]
    assert max(drift[24].values()) < 1e-6, "the last version is by the final weights: what is left is rounding"
    assert min(*drift[8].values(), *drift[16].values()) > 1e-6


def drift_by_version(run: dict) -> dict[int, dict[str, float]]:
    """RDM of each stored version under the weights that a run ended with, by the step whose weights encoded the version."""
    opened, device = inspection.OpenedRun.at(run["folder"]), torch.device("cpu")
    corpus, tau, found = Corpus.open(opened.stood.corpus), float(opened.model.temperature), {}
    for version in snapshot.versions(opened.place.knowledge):
        stored = snapshot.open_snapshot(opened.place.knowledge, version, opened.place.name, opened.settings.model.dim)
        known = Knowledge(stored, device)
        now, then = worker.probe_rows(known, opened.model, corpus, opened.settings, device, 0)
        found[known.encoder_step] = {way: float(rdm(now[way], now[way], then[way], tau)) for way in then}
    return found


def test_a_fork_goes_on_from_another_runs_weights_with_settings_of_its_own(sync_run: dict, home: Path) -> None:
    begun_from, heard = sync_run["folder"], []
    settings = settings_of(home, run={"name": "fork", "fork": begun_from}, ask={"rho": 0.3}, training={"epochs": 4})
    result = experiment.run(settings, quiet(), listen=heard.append)
    began = next(event for event in heard if event["kind"] == "began")
    assert (began["epoch"], began["step"]) == (3, 24)
    assert [event["epoch"] for event in heard if event["kind"] == "epoch"] == [4]
    assert heard == json.loads((Path(result["folder"]) / "history.json").read_text())
    first = result["refreshes"][0]
    assert (first["encoder_step"], first["entries"]) == (24, 128)
    assert first["reason"] == f"begun from {begun_from}"
    assert result["steps"] == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"dim": 16}}, r"run.fork: the model of .* is another: model.dim \(32 there, 16 here\)"),
        ({"training": {"epochs": 1}, "knowledge": {"refresh": {"warmup_epochs": 0}}}, "has no checkpoint"),
        ({"run": {"name": "no", "fork": "nowhere"}}, "not a run's folder"),
    ],
)
def test_a_run_that_cannot_be_forked_is_refused(sync_run: dict, home: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment.run(settings_of(home, **{"run": {"name": "no", "fork": sync_run["folder"]}, **changes}), quiet())


def test_a_run_with_a_checkpoint_of_its_own_goes_on_though_what_it_forked_is_gone(tmp_path: Path, left_run) -> None:
    corpus, place = SimpleNamespace(folder=Folder.at(str(tmp_path))), RunPlace(Folder.at(str(tmp_path)), "fork")
    settings = load({"run": {"fork": str(tmp_path / "gone")}})
    with pytest.raises(UserError, match=r"gone: not a run's folder"):
        experiment._check_fork(settings, place)
    left_run("fork", settings, corpus)
    experiment._check_fork(settings, place)


def test_what_the_weights_of_a_fork_have_seen_of_the_evaluation_splits_is_told_before_training(recorded, left_run) -> None:
    first, cut, own = recorded("first", rain=3), recorded("cut", 2, dog=3), recorded("own", bell=1, test_rain=3, test_horn=1)
    donor = left_run("a", load({"ask": {"enabled": False}}), cut)
    knowledge = {"knowledge": {"sources": [first.folder.uri]}, "run": {"fork": donor}}
    said = io.StringIO()
    fork = load({"run": {"fork": left_run("b", load(knowledge), own)}})
    experiment._tell_seen(Console(file=said, width=100), fork, own)
    seen, cut_otherwise = said.getvalue().splitlines()
    assert "run.fork: 1 of the 2 test clips, such as 'test_rain.wav', were trained on, or in the knowledge base" in seen
    assert f"--data.held_out '[{own.folder}]'" in seen
    assert f"{cut.folder} keeps 2 s of a recording and {own.folder} 300 s" in cut_otherwise
    for settings in (load({}), load({"run": {"fork": left_run("c", load({}), own)}})):
        said = io.StringIO()
        experiment._tell_seen(Console(file=said), settings, own)
        assert said.getvalue() == ""


def test_same_settings_and_seed_give_the_same_numbers(sync_run: dict, beside_run: Beside) -> None:
    """Where a run is evaluated changes nothing of its training."""
    assert weights_of(beside_run.result) == weights_of(sync_run)
    for figures in ("final", "final_injected"):
        assert beside_run.result[figures] == sync_run[figures]


def test_another_seed_gives_other_numbers(plain_run: dict, home: Path) -> None:
    other = experiment.run(plain_settings(home, "plain-other", seed=1), quiet())
    assert weights_of(other) != weights_of(plain_run)
    assert other["final"] != plain_run["final"]


def test_a_killed_run_continues_by_name_with_the_version_of_its_checkpoint(
    sync_run: dict, home: Path, start_job: Callable
) -> None:
    settings = settings_of(home, run={"name": "killed"})
    file = home / "killed.yaml"
    file.write_text(settings.to_yaml())
    run = Folder(str(home / "runs" / "killed"))
    job = start_job("train", "--config", str(file))
    job.kill_when(lambda: checkpoint.pinned_versions(run), seconds=300)  # a checkpoint names a version of the knowledge base
    heard: list[dict] = []
    result = experiment.run(settings, quiet(), listen=heard.append)
    (began,) = (event for event in heard if event["kind"] == "began")
    assert began["step"] > 0, "it began anew"
    assert result["steps"] == 24
    assert result["epochs"] == 3
    assert result["final"] == sync_run["final"]
    assert result["final_injected"] == sync_run["final_injected"]
    assert weights_of(result) == weights_of(sync_run)


def weights_of(result: dict) -> bytes:
    """The model that a run ended with."""
    with checkpoint.newest(Folder(result["folder"])) as folder:
        return (folder / "model.safetensors").read_bytes()


def test_a_run_whose_worker_is_killed_decides_and_ends_as_an_unbroken_one_by_drift(drift_run: dict, home: Path) -> None:
    heard: list[dict] = []

    def listen(event: dict) -> None:
        heard.append(event)
        began = sum(told["kind"] == "began" for told in heard)
        if event["kind"] == "swapped" and event["step"] == 16 and began == 1:  # epoch 2 and its checkpoint are done
            kill_the_first("ray::RayTrainWorker")

    broken = experiment.run(settings_of(home, run={"name": "drift-killed"}, knowledge=DRIFT), quiet(), listen=listen)
    assert [event["step"] for event in heard if event["kind"] == "began"] == [0, 16]
    reasons = [{row["encoder_step"]: row["reason"] for row in result["refreshes"]} for result in (drift_run, broken)]
    assert "RDM" in reasons[0][16], "decided by steps before the checkpoint"
    assert reasons[0] == reasons[1]
    assert weights_of(broken) == weights_of(drift_run)


def test_evaluation_beside_training_gives_the_workers_figures_though_its_task_is_killed(
    sync_run: dict, beside_run: Beside
) -> None:
    result = beside_run.result
    assert beside_run.killed > 0
    assert result["steps"] == 24
    events = json.loads((Path(result["folder"]) / "history.json").read_text())
    points = report.validations(events)
    assert [(event["kind"], event["step"], event["epoch"]) for event in points] == [
        ("validated", 8, 1), ("validated", 16, 2), ("validated", 24, 3)
    ]  # fmt: skip
    (inline,) = report.validations(json.loads((Path(sync_run["folder"]) / "history.json").read_text()))
    names = {name for name in inline if name.startswith(("t2a_", "a2t_"))}
    assert {"t2a_r1", "a2t_map10", "a2t_n"} <= names
    assert {name: points[1][name] for name in names} == pytest.approx({name: inline[name] for name in names}, abs=1e-6)
    assert beside_run.told.count("evaluated  val R@1 t2a") == 3
    assert "Not evaluated" not in beside_run.told
    record = json.loads((Path(result["folder"]) / "mlflow.json").read_text())
    from mlflow import MlflowClient

    history = MlflowClient(record["uri"]).get_metric_history(record["run_id"], "t2a_r1")
    assert sorted(point.step for point in history) == [8, 16, 24]


def kill_the_first(title: str, pause: float = 0.1) -> int:
    """Kill −9 the first process of this session with a title, as soon as there is one, and tell which it was.

    Args:
        pause: seconds between looks, each of which asks every process.
    """
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    process.kill()
                    return process.pid
        time.sleep(pause)
    raise TimeoutError(f"no process {title} in two minutes")


def test_epochs_whose_evaluation_gave_no_figures_are_named(small_corpus, home: Path) -> None:
    settings = settings_of(home, training={"evaluation": "beside", "evaluate_every": 2, "epochs": 7})
    events = [
        {"kind": "epoch", "epoch": 2, "step": 20, "loss": 1.0},
        {"kind": "not validated", "problem": "took too long"},
        {"kind": "validated", "epoch": 4, "step": 40, "t2a_r1": 0.1},
    ]
    assert experiment._unevaluated(settings, small_corpus, events) == [2, 6]
    inline = [{"kind": "epoch", "epoch": epoch, "step": epoch, "t2a_r1": 0.1} for epoch in (2, 4, 6)]
    assert experiment._unevaluated(settings, small_corpus, inline) == []


def test_a_fork_owes_no_evaluations_of_the_run_that_it_began_from(home: Path) -> None:
    settings, corpus = settings_of(home, training={"evaluate_every": 1, "epochs": 4}), SimpleNamespace(clips=lambda split: 7)
    events = [
        {"kind": "began", "epoch": 2, "step": 20},
        {"kind": "epoch", "epoch": 3, "step": 30, "t2a_r1": 0.1},
        {"kind": "began", "epoch": 3, "step": 30},
    ]
    assert experiment._unevaluated(settings, cast(Corpus, corpus), events) == [4]
    assert experiment._unevaluated(settings, cast(Corpus, corpus), events[1:2]) == [1, 2, 4]


def test_why_figures_are_missing_is_told_by_who_evaluates(home: Path) -> None:
    assert "evaluation_timeout_seconds" in experiment._why_unevaluated(settings_of(home, training={"evaluation": "beside"}))
    assert "the workers evaluated them" in experiment._why_unevaluated(settings_of(home))


@pytest.mark.parametrize("kind", ["epoch", "validated", "not validated"])
def test_who_listens_hears_of_an_evaluation_when_it_is_saved(tmp_path: Path, kind: str) -> None:
    folder, saved = Folder.at(str(tmp_path)), []
    unread = cast(tracking.Recorder, SimpleNamespace(record=lambda event: None))
    monitor = experiment.Monitor(
        settings_of(tmp_path),
        Journal("none"),
        folder,
        unread,
        quiet(),
        lambda event: saved.append(folder.read_json("history.json")),
    )
    event = {"kind": kind, "epoch": 1, "step": 8, "loss": 1.0, "temperature": 0.1, "clips_per_second": 1.0, "problem": "it broke"}
    monitor._heed([event], over=False)
    assert saved == [[event]]


def test_problems_are_told_as_they_are_whatever_brackets_they_hold(tmp_path: Path) -> None:
    problem, console = "[/gloo/transport/tcp/pair.cc:538] Read error at [rank0]", Console(file=io.StringIO(), width=200)
    unread = cast(tracking.Recorder, SimpleNamespace(record=lambda event: None))
    folder = Folder.at(str(tmp_path))
    monitor = experiment.Monitor(settings_of(tmp_path), Journal("none"), folder, unread, console, lambda event: None)
    told = {"rank": 0, "problem": problem, "version": 1}
    monitor._heed([{"kind": kind, **told} for kind in ("not validated", "diverged", "failed", "refused")], over=False)
    assert cast(io.StringIO, console.file).getvalue().count(f": {problem}\n") == 4


def test_a_run_with_other_settings_is_not_overwritten(sync_run: dict, home: Path) -> None:
    with pytest.raises(SettingsError, match=r"run\.name.*ask\.rho"):
        experiment.run(settings_of(home, run={"name": "sync-a"}, ask={"rho": 0.3}, tracking={"enabled": True}), quiet())


def test_a_run_that_is_under_way_is_not_driven_twice(sync_run: dict, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    settings = settings_of(home, run={"name": "sync-a"}, tracking={"enabled": True})
    with (
        lease.held(Folder(sync_run["folder"]), "run.name"),
        pytest.raises(SettingsError, match=r"run\.name: .*sync-a is under way"),
    ):
        experiment.run(settings, quiet())


def test_plain_contrastive_training_keeps_no_knowledge_base(plain_run: dict) -> None:
    assert plain_run["refreshes"] == []
    assert plain_run["final_injected"] == {}
    assert not (Path(plain_run["folder"]) / "knowledge").exists()
    with pytest.raises(SettingsError, match="no knowledge base"):
        inspection.search("a dog barks", plain_run["folder"], "", 3, quiet())


def test_the_record_holds_settings_metrics_and_pictures(sync_run: dict) -> None:
    from mlflow import MlflowClient

    folder = Path(sync_run["folder"])
    told = json.loads((folder / "mlflow.json").read_text())
    client = MlflowClient(told["uri"])
    run = client.get_run(told["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["ask.rho"] == "0.8"
    assert [point.step for point in client.get_metric_history(told["run_id"], "loss")] == [8, 16, 24]
    assert run.data.metrics["final.t2a.r1"] == sync_run["final"]["t2a"]["r1"]
    assert [point.value for point in client.get_metric_history(told["run_id"], "swap_version")] == [1, 2, 3]
    assert {file.path for file in client.list_artifacts(told["run_id"], "pictures")} >= {"pictures/curves.png"}


def test_evaluating_the_checkpoint_gives_the_run_s_figures_in_every_form(sync_run: dict, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("figures.json", "figures.md", "figures.csv")]
    found = inspection.evaluate(sync_run["folder"], None, "test", [*map(str, files)], True, True, quiet())
    figures = json.loads(files[0].read_text())
    assert figures["final"] == json.loads(json.dumps(found["final"]))
    for way, of in figures["final"].items():  # another number of threads rounds differently: a near tie may fall the other way
        told = sync_run["final"][way]
        assert (of["n"], of["m"]) == (told["n"], told["m"]) == (48, 96)
        assert of["queries"] == {"t2a": 96, "a2t": 48}[way]
        assert all(abs(of[name] - told[name]) <= 0.05 for name in ("r1", "r5", "r10", "map10"))
        assert abs(of["median_rank"] - told["median_rank"]) <= 1
        low, high = of["intervals"]["r10"]
        assert low < of["r10"] < high
    assert figures["transductive"]["epsilon"] == 0.05
    assert sum(of["clips"] for of in figures["rare"]["buckets"]) == 48
    assert sum(of["t2a"]["queries"] for of in figures["rare"]["buckets"]) == 96
    assert figures["rare"]["training_clips"] == 128
    cosine, plan, rare = files[1].read_text().split("## ")[1:]
    assert "cosine" in cosine
    assert "transductive (Sinkhorn over the whole test set)" in plan
    assert "| training clips | clips | R@1 % text → audio | R@1 % audio → text |" in rare
    with files[2].open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["ranking"] for row in rows} == {"cosine", "transductive (Sinkhorn over the whole test set)"}
    assert float(rows[0]["r10"]) == figures["final"]["t2a"]["r10"]
    assert len(rows) == 4 + 2 * len(figures["rare"]["buckets"])


def test_clips_of_another_corpus_that_a_run_has_seen_are_told(sync_run: dict, tmp_path: Path) -> None:
    state = next(Path(sync_run["folder"]).glob("checkpoint_*/state.json"))
    other, said = tmp_path / "other", io.StringIO()
    shutil.copytree(json.loads(state.read_text())["place"]["corpus"], other)
    console = Console(file=said, width=200)
    assert inspection.evaluate(sync_run["folder"], str(other), "test", console=console)["seen"] == []
    assert "too high" not in said.getvalue()
    found = inspection.evaluate(sync_run["folder"], str(other), "train", [str(tmp_path / "t.md")], console=console)
    assert len(found["seen"]) == 128
    assert "The figures are too high: 128 of the 128 clips" in said.getvalue()
    assert "SEEN 128 clips" in (tmp_path / "t.md").read_text()


def test_labelled_sounds_are_classified_by_a_run(sync_run: dict, esc50: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("found.json", "found.csv")]
    said = io.StringIO()
    told = Console(file=said, width=400)
    found = inspection.classify(sync_run["folder"], str(esc50), ["the sound of {}"], [*map(str, files)], told)
    assert (found["n"], len(found["classes"])) == (6, 3)
    assert {one["reason"] for one in found["aside"]} == {"unreadable", "missing file", "no category"}
    assert all(one["source"] in said.getvalue() for one in found["aside"])
    assert json.loads(files[0].read_text())["accuracy"] == found["accuracy"]
    with files[1].open(encoding="utf-8") as stream:
        assert [row["category"] for row in csv.DictReader(stream)] == ["", "church_bells", "dog", "water_drops"]
    with pytest.raises(SettingsError, match=r"--template: 'a sound' has no \{\}"):
        inspection.classify(sync_run["folder"], str(esc50), ["a sound"], (), quiet())


def test_search_ranks_every_clip_once_by_falling_score(sync_run: dict) -> None:
    found = inspection.search("a dog barks", sync_run["folder"], "", 7, quiet())
    assert len(found) == 7
    assert len({clip for _, clip, _ in found}) == 7
    assert [score for score, _, _ in found] == sorted((score for score, _, _ in found), reverse=True)


def test_search_with_a_recording_ranks_captions(sync_run: dict, write_audio, tmp_path: Path) -> None:
    found = inspection.search(str(write_audio(tmp_path / "a.flac", rate=22050, seconds=1.0)), sync_run["folder"], "", 3, quiet())
    assert len(found) == 3
    assert all(caption for _, _, caption in found)


def test_a_run_whose_tokens_meet_trains_is_evaluated_and_ranks_its_shortlist_by_them(
    ray_session: None, home: Path, monkeypatch, write_audio, tmp_path: Path
) -> None:
    changes = {"model": {"interaction": "late"}, "training": {"epochs": 2, "workers": 2, "batch_size": 8, "evaluate_every": 1}}
    result = experiment.run(settings_of(home, run={"name": "late"}, **changes), quiet())
    opened = inspection.OpenedRun.at(result["folder"])
    assert opened.model.audio_tokens.weigh.weight.abs().sum() > 0, "the weights were not trained, or not kept"
    figures = inspection.evaluate(result["folder"], None, "test", transductive=True, console=quiet())
    assert figures["interaction"] == "late"
    for way, of in figures["final"].items():
        assert all(abs(of[name] - result["final"][way][name]) <= 0.05 for name in ("r1", "r10"))

    monkeypatch.setattr(inspection, "SHORTLIST", 6)
    ranked_token_by_token(opened, "a dog barks", write_audio(tmp_path / "a.flac", rate=16000, seconds=1.0))


def ranked_token_by_token(opened: inspection.OpenedRun, text: str, file: Path) -> None:
    """A text, which finds more than are ranked token by token too, and a file find what they score highest with one by one."""
    folder, corpus = str(opened.place.folder), Corpus.open(opened.stood.corpus)
    place = {clip: number for number, clip in enumerate(corpus.ids("train"))}
    with torch.inference_mode():
        asked = opened.model.text_encoding(*opened.model.tokenise([text]))
        perceived = inspection._perceived(file, opened)
        for query, most in ((text, 4), (str(file), 4), (text, 9)):
            found = inspection.search(query, folder, "", most, quiet())
            assert len({clip for _, clip, _ in found}) == len(found) == most
            assert [score for score, _, _ in found] == sorted((score for score, _, _ in found), reverse=True)
            for score, clip, caption in found:
                if query == text:
                    batch = pad([*corpus.signals("train", [place[clip]]).values()])
                    expected = scores(opened.model.audio_encoding(*batch), asked)
                else:
                    expected = scores(perceived, opened.model.text_encoding(*opened.model.tokenise([caption])))
                assert score == pytest.approx(float(expected), abs=1e-5)


def test_search_for_a_recording_that_is_not_there_says_so(sync_run: dict) -> None:
    with pytest.raises(SettingsError, match="is not there"):
        inspection.search("/nowhere/dog.wav", sync_run["folder"], "", 3, quiet())


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="not a run"):
        inspection.evaluate(str(tmp_path), None, "test", console=quiet())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ask": {"neighbours": 128}}, "ask.neighbours"),
        ({"ask": {"exclude": "batch", "neighbours": 113}}, "ask.neighbours"),
        ({"ask": {"prototypes": 129}}, "ask.prototypes"),
        ({"training": {"workers": 50}}, "training.workers"),
        ({"training": {"batch_size": 129}}, "training.batch_size"),
        ({"training": {"device": "cuda"}}, "training"),
        ({"knowledge": {"pool": {"node_labels": {"role": "nobody"}}}}, "knowledge.pool.node_labels"),
        ({"model": {"audio": "resnet38"}}, "data.sample_rate"),
        ({"data": {"corpus": "folder", "folder": {"path": "/nowhere"}}}, "data.folder.path"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(ray_session: None, home: Path, changes: dict, told: str) -> None:
    settings = settings_of(home, run={"name": "refused"}, **changes)
    with pytest.raises(SettingsError, match=told):
        experiment.run(settings, quiet())
    assert not (home / "runs" / "refused").exists()


def test_public_corpora_are_trained_on_once_what_is_evaluated_is_out_of_the_knowledge_base(
    ray_session: None, trees: dict[str, Path], tmp_path: Path
) -> None:
    """Clotho with WavCaps in the knowledge base, which has a sound that Clotho is evaluated on."""
    clotho = {"corpus": "clotho", "max_rejected": 0.3, "clotho": {"path": str(trees["clotho"])}}
    wavcaps = {"corpus": "wavcaps", "max_rejected": 0.3, "wavcaps": {"path": str(trees["wavcaps"])}}
    run = prepare(settings_of(tmp_path, data=clotho).data)
    leaking = prepare(settings_of(tmp_path, data=wavcaps).data)
    guarded = prepare(settings_of(tmp_path, data={**wavcaps, "held_out": [str(run.folder)]}).data)

    by_probe = {"policy": "adaptive", "signal": "probe", "probe_steps": 1, "threshold": 1e-6, "unit": "steps", "min_interval": 1}
    by_probe |= {"mode": "sync", "warmup_epochs": 0}

    def settings(source: Corpus) -> Settings:
        return settings_of(
            tmp_path,
            run={"name": "clotho"},
            data=clotho,
            ask={"neighbours": 3, "prototypes": 4},
            knowledge={"sources": ["train", str(source.folder)], "drift_probe": 4, "refresh": by_probe},
            training={"batch_size": 3, "epochs": 2, "evaluate_every": 1},
        )

    with pytest.raises(SettingsError, match=r"1 held out by source id\), such as 'FreeSound/3002'") as refusal:
        experiment.run(settings(leaking), quiet())
    assert f"--data.held_out '[{run.folder}]'" in str(refusal.value)
    assert leaking.clips("train") == guarded.clips("train") + 1
    result = experiment.run(settings(guarded), quiet())
    assert result["steps"] == 4
    assert result["final"]["t2a"]["n"] == 3
    assert {row["entries"] for row in result["refreshes"]} == {run.clips("train") + guarded.clips("train")}
    told = [one for one in json.loads((Path(result["folder"]) / "history.json").read_text()) if one["kind"] == "epoch"]
    by_source = {key: value for key, value in told[-1].items() if key.startswith(("share_", "reliability_"))}
    shares = [value for key, value in by_source.items() if key.startswith("share_")]
    assert len(by_source) == 2 * len(shares) == 4
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert any("RDM" in event["reason"] for event in result["refreshes"]), "the probe reads both sources"


@pytest.fixture(scope="module")
def seen_run(ray_session: None, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A finished run on pictures."""
    root = coco_2017(tmp_path_factory.mktemp("coco"), train=150, test=32)
    return experiment.run(image_settings(home, root), quiet())


def image_settings(home: Path, root: Path, **changes: dict[str, object]) -> Settings:
    data = {"corpus": "coco", "image_size": 32, "coco": {"path": str(root), "validation": 0.1}}
    return settings_of(home, **{"run": {"name": "seen"}, "data": data, "training": {"epochs": 2}, **changes})


def test_pictures_are_trained_on_evaluated_and_told_as_such(seen_run: dict, tmp_path: Path) -> None:
    folder = Path(seen_run["folder"])
    assert seen_run["modality"] == "image"
    assert len(seen_run["refreshes"]) >= 2
    assert seen_run["refreshes"][0]["entries"] == 135
    assert seen_run["final"]["t2a"]["n"] == 32
    assert seen_run["final_injected"]["a2t"]["m"] == 64
    epochs = [event for event in json.loads((folder / "history.json").read_text()) if event["kind"] == "epoch"]
    assert all(np.isfinite(epoch["loss"]) for epoch in epochs)
    assert (epochs[1]["t2a_n"], epochs[1]["a2t_m"]) == (15, 30)
    assert epochs[-1]["rdm_audio"] >= 0
    text = io.StringIO()
    file = tmp_path / "figures.md"
    found = inspection.evaluate(str(folder), None, "test", [str(file)], True, True, Console(file=text, width=200))
    assert {way: found["final"][way]["r1"] for way in ("t2a", "a2t")} == {
        way: seen_run["final"][way]["r1"] for way in ("t2a", "a2t")
    }
    for told in (text.getvalue(), file.read_text()):
        assert "text → image" in told
        assert "image → text" in told
        assert "N images" in told
        assert "audio" not in told
        assert "clip" not in told


def test_search_takes_a_picture_or_a_text(seen_run: dict, tmp_path: Path) -> None:
    image, _ = scene(5)
    path = save(image, tmp_path / "query é.png")
    for query, title in ((str(path), "Captions nearest to"), ("a red circle left of a blue square", "Images nearest to")):
        text = io.StringIO()
        found = inspection.search(query, seen_run["folder"], "", 5, Console(file=text, width=200))
        assert len({name for _, name, _ in found}) == 5
        assert [score for score, *_ in found] == sorted((score for score, *_ in found), reverse=True)
        assert title in text.getvalue()
        assert "image" in text.getvalue()
    with pytest.raises(SettingsError, match=r"query: .* is not there"):
        inspection.search("gone.jpg", seen_run["folder"], "", 5, quiet())


def test_pictures_whose_patches_meet_words_are_ranked_by_them(seen_run: dict, home: Path, monkeypatch, tmp_path: Path) -> None:
    root = Path(yaml.safe_load((Path(seen_run["folder"]) / "settings.yaml").read_text())["data"]["coco"]["path"])
    result = experiment.run(image_settings(home, root, run={"name": "seen-late"}, model={"interaction": "late"}), quiet())
    opened = inspection.OpenedRun.at(result["folder"])
    assert opened.model.audio_tokens.weigh.weight.abs().sum() > 0, "the weights were not trained, or not kept"
    figures = inspection.evaluate(result["folder"], None, "test", console=quiet())
    assert figures["interaction"] == "late"
    for way, of in figures["final"].items():
        assert all(abs(of[name] - result["final"][way][name]) <= 0.05 for name in ("r1", "r10"))
    monkeypatch.setattr(inspection, "SHORTLIST", 6)
    ranked_token_by_token(opened, "a red circle left of a blue square", save(scene(5)[0], tmp_path / "query.png"))


def test_a_run_on_pictures_refuses_sounds(
    seen_run: dict, small_corpus: Corpus, esc50: Path, write_audio, tmp_path: Path, home: Path
) -> None:
    with pytest.raises(SettingsError, match=r"was trained on images, and cannot classify sounds"):
        inspection.classify(seen_run["folder"], str(esc50))
    with pytest.raises(SettingsError, match=r"--corpus: .* has 8000 Hz, the run's own corpus images of 32 pixels"):
        inspection.evaluate(seen_run["folder"], small_corpus.folder.uri, "test")
    with pytest.raises(UnusableClip, match="cannot identify"):
        inspection.search(str(write_audio(tmp_path / "a.wav")), seen_run["folder"], "", 5, quiet())
    there = str(Path(checkpoint_corpus(seen_run)))
    with pytest.raises(SettingsError, match=r"knowledge\.sources: .* has images of 32 pixels, the run's corpus 16000 Hz"):
        experiment.run(settings_of(home, knowledge={"sources": ["train", there]}), quiet())


def checkpoint_corpus(run: dict) -> str:
    """The prepared corpus that a run was trained on."""
    return inspection.OpenedRun.at(run["folder"]).stood.corpus


def test_a_dry_run_on_pictures_tells_their_tower(seen_run: dict, home: Path, models: dict[str, Path]) -> None:
    root = Path(yaml.safe_load((Path(seen_run["folder"]) / "settings.yaml").read_text())["data"]["coco"]["path"])
    text = io.StringIO()
    dry = image_settings(home, root, run={"name": "dry", "dry_run": True}, model={"image": f"hf:{models['vit']}"})
    takes = experiment.run(dry, Console(file=text, width=200))
    assert takes["clips"] == 135
    assert takes["worker_bytes"] >= 135 * 32 * 43 * 3
    assert "135 images" in text.getvalue()
    assert f"hf:{models['vit']} + tiny" in text.getvalue()


def test_a_dry_run_tells_what_the_run_takes_and_makes_nothing(ray_session: None, home: Path) -> None:
    told = io.StringIO()
    settings = settings_of(home, run={"name": "dry", "dry_run": True})
    result = experiment.run(settings, Console(file=told, width=120))
    assert (result["steps"], result["entries"]) == (24, 128)
    assert "24 (3 epochs of 8, 128 clips)" in told.getvalue()
    assert not (home / "runs" / "dry").exists()


@pytest.mark.parametrize(
    ("refresh", "told"),
    [
        ({"interval": 2.5, "warmup_epochs": 1}, True),
        ({"interval": 14, "unit": "steps", "warmup_epochs": 1}, True),
        ({"interval": 13, "unit": "steps", "warmup_epochs": 1}, False),
        ({"interval": 1.5, "warmup_epochs": 1}, False),
        ({"policy": "static", "warmup_epochs": 1}, False),
    ],
)
def test_an_interval_that_outlasts_training_is_told(refresh: dict, told: bool) -> None:
    console = Console(file=io.StringIO(), width=200)
    settings = load({"training": {"epochs": 3}, "knowledge": {"refresh": refresh}})
    experiment._tell_unrefreshed(console, settings, steps_per_epoch=7)
    assert ("No refresh" in console.file.getvalue()) == told


def test_storage_that_cannot_be_written_is_refused(ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = settings_of(tmp_path, run={"storage": str(tmp_path / "file" / "runs")})
    with pytest.raises(StorageError, match=r"run\.storage"):
        experiment.run(settings, quiet())


def test_a_corpus_without_a_test_split_is_trained_on_and_the_run_says_that_it_has_no_test_figures(
    ray_session: None, home: Path, trees: dict[str, Path]
) -> None:
    """WavCaps as it is by default: all of it is the training split."""
    console = Console(file=io.StringIO(), width=200)
    settings = settings_of(
        home,
        run={"name": "untested"},
        data={"corpus": "wavcaps", "max_rejected": 0.3, "wavcaps": {"path": str(trees["wavcaps"])}},
        ask={"prototypes": 4, "neighbours": 3},
        training={"epochs": 2, "batch_size": 4},
        tracking={"enabled": True},
    )
    result = experiment.run(settings, console)
    assert (result["epochs"], result["final"], result["final_injected"]) == (2, {}, {})
    assert json.loads((Path(result["folder"]) / "result.json").read_text()) == result
    told = console.file.getvalue()
    before, after = told.split("epoch   1/2")
    assert "the run will end without test figures; hold clips out with data.wavcaps.test, or" in before
    assert "No test figures: the corpus has no test split" in after
    assert "retrieval on the test split" not in told


def test_weights_that_do_not_fit_are_refused_before_a_corpus_is_prepared(ray_session: None, tmp_path: Path) -> None:
    save_file({"conv9.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    settings = settings_of(
        tmp_path,
        run={"name": "refused"},
        model={"audio": "resnet38", "audio_weights": str(tmp_path / "other.safetensors")},
        data={"sample_rate": 32000},
    )
    with pytest.raises(WeightsError, match=r"model\.audio_weights.*conv9\.weight"):
        experiment.run(settings, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("job", ["train", "tune", "evaluate", "classify", "search"])
def test_help_teaches(job: str) -> None:
    told = subprocess.run([sys.executable, str(ROOT / f"jobs/{job}.py"), "--help"], capture_output=True, text=True, check=True)
    assert f"python jobs/{job}.py" in told.stdout
