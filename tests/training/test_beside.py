"""Evaluation beside training: a saved checkpoint's figures, told to the journal; what cannot be read is told too."""

import signal
import threading
import time
from pathlib import Path

import pytest
import ray
import ray.train
import torch

from ask_ray.config import load
from ask_ray.journal import Journal
from ask_ray.models import registry
from ask_ray.storage import Folder
from ask_ray.training import beside, checkpoint, evaluation
from ask_ray.training.checkpoint import CheckpointError, Place
from ask_ray.training.step import Stepper

SETTINGS = load(
    {
        "data": {"sample_rate": 8000},
        "model": {"width": 0.1, "dim": 16, "dropout": 0.5},
        "knowledge": {"pool": {"batch_size": 4}},
        "training": {"evaluation": "beside", "evaluation_cpus": 0.3, "evaluation_timeout_seconds": 7.0},
    }
)


@pytest.fixture
def journal(ray_session):
    made, keeper = Journal.start()
    yield made
    ray.kill(keeper)


@pytest.fixture
def saved(small_corpus, tmp_path):
    """A checkpoint of a model that was never trained, and the model."""
    torch.manual_seed(3)
    model = registry.build(SETTINGS.model, small_corpus.sample_rate)
    stepper = Stepper(model, model, SETTINGS, 6, torch.device("cpu"))
    place = Place(2, 12, 0, str(small_corpus.folder))
    checkpoint.save(tmp_path, place, SETTINGS, model, stepper.optimizer, stepper.scheduler, [checkpoint.random_state()], {})
    return ray.train.Checkpoint.from_directory(tmp_path), model


def told(journal: Journal) -> dict:
    """The one event of a journal, as soon as it is in."""
    end = time.monotonic() + 30
    while not (events := journal.read()[0]):
        assert time.monotonic() < end
        time.sleep(0.02)
    (event,) = events
    return event


def test_a_checkpoint_has_the_figures_of_its_model(saved, small_corpus, journal):
    held, model = saved
    figures = beside.validate(held, str(Path(held.path).parent), journal.name)
    encoded = evaluation.encode_split(model, small_corpus, "validation", SETTINGS, torch.device("cpu"))
    assert figures == evaluation.flat_figures(evaluation.both_ways(encoded))
    assert figures["t2a_n"] == figures["a2t_n"] == small_corpus.clips("validation") == 7
    event = told(journal)
    assert (event["kind"], event["step"], event["epoch"]) == ("validated", 12, 2)
    assert event.items() >= figures.items()


def test_a_damaged_checkpoint_is_told_by_name(saved, journal):
    held, _ = saved
    with held.as_directory() as folder, open(f"{folder}/model.safetensors", "r+b") as file:  # noqa: PTH123
        file.truncate(100)
    with pytest.raises(CheckpointError):
        beside.validate(held, str(Path(held.path).parent), journal.name)
    event = told(journal)
    assert event["kind"] == "not validated"
    assert held.path in event["problem"]


def test_only_a_run_that_evaluates_beside_training_has_a_validation(journal):
    config = beside.validation_of(SETTINGS.training, Folder.at("/runs/one"), journal)
    assert config.ray_remote_kwargs == {"num_cpus": 0.3, "max_retries": -1}, "a task that dies is tried again"
    assert config.task_config.timeout_s == 7.0
    for never in ({"evaluation": "workers"}, {"evaluate_every": 0}, {"evaluate_every": 15}):
        assert beside.validation_of(SETTINGS.training.model_copy(update=never), Folder.at("/runs/one"), journal) is None


def test_an_evaluation_waits_for_storage_that_is_away(saved, s3, small_corpus, journal, tmp_path):
    held, model = saved
    run = s3.uri(f"bucket/{tmp_path.name}")
    (Folder.at(run) / "checkpoint_one").upload(Path(held.path))
    there = ray.train.Checkpoint((Folder.at(run) / "checkpoint_one").resolve()[1], Folder.at(run).resolve()[0])
    s3.process.send_signal(signal.SIGSTOP)
    back = threading.Thread(target=lambda: (told(journal), s3.process.send_signal(signal.SIGCONT)))
    back.start()
    try:
        figures = beside.validate(there, run, journal.name)
    finally:  # other tests use it too
        s3.process.send_signal(signal.SIGCONT)
    back.join()
    encoded = evaluation.encode_split(model, small_corpus, "validation", SETTINGS, torch.device("cpu"))
    assert figures == evaluation.flat_figures(evaluation.both_ways(encoded))
    assert "checkpoint_one" in journal.read()[0][0]["problem"]
