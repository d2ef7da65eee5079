"""Evaluation beside training: Ray Train's validation of a reported checkpoint, in a task of its own."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import torch
from ray.train import Checkpoint, ValidationConfig, ValidationTaskConfig

from ask_ray.config import TrainingSettings
from ask_ray.data.corpus import Corpus
from ask_ray.journal import Journal
from ask_ray.storage import Folder, StorageError, patiently
from ask_ray.training import checkpoint, evaluation


def validation_of(training: TrainingSettings, run: Folder, journal: Journal) -> ValidationConfig | None:
    """How Ray Train validates the checkpoints in a run's folder, None if it is not to.

    A task whose process dies is tried again: Ray Train would otherwise fail the run for it. One that cannot be scheduled
    ends by its timeout: Ray Train would otherwise wait for it for ever.
    """
    if not training.evaluates_beside:
        return None
    return ValidationConfig(
        validate,  # type: ignore[arg-type]
        ValidationTaskConfig(fn_kwargs={"run": run.uri, "journal": journal.name}, timeout_s=training.evaluation_timeout_seconds),
        {"num_cpus": training.evaluation_cpus, "max_retries": -1},
    )


def validate(saved: Checkpoint, run: str, journal: str) -> dict[str, Any]:
    """Evaluate a run's checkpoint on its corpus's validation split and tell the journal of that name, as an event `validated`.
    Storage that is away meanwhile is tried again for a while.

    Returns:
        the figures, as an event `epoch` holds them after evaluation by the workers.

    Raises:
        CheckpointError, SettingsError: if the checkpoint or its corpus cannot be read. Whatever goes wrong is told as an event
            `not validated` too, for Ray Train goes on without the figures.
    """

    def away(error: StorageError) -> None:
        Journal(journal).tell("not fetched", place=saved.path, problem=str(error))

    try:
        with checkpoint.fetched(Folder.at(run) / PurePosixPath(saved.path).name, away) as folder:
            model, settings, place = checkpoint.open_model(folder)
        corpus = patiently(lambda: Corpus.open(place.corpus), away)
        encoded = evaluation.encode_split(model, corpus, "validation", settings, torch.device("cpu"))
        figures = evaluation.flat_figures(evaluation.both_ways(encoded))
    except Exception as error:
        Journal(journal).tell("not validated", problem=f"{type(error).__name__}: {error}")
        raise
    Journal(journal).tell("validated", step=place.step, epoch=place.epoch, **figures)
    return figures
