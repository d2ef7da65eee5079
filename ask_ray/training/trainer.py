"""Building and running the Ray Train job: the workers, the refiner beside them, failures, checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ask_ray.config import DataSettings, Settings, SettingsError, UserError
from ask_ray.data.batches import pad, steps_of
from ask_ray.data.corpus import Corpus
from ask_ray.journal import Journal
from ask_ray.knowledge.policy import Adaptive, Continuous, policy_of
from ask_ray.knowledge.refiner import Refiner, RefreshPlan
from ask_ray.knowledge.requests import AWAY
from ask_ray.knowledge.sources import Extent, Source, check_sources, entries_of, sources_of
from ask_ray.models import registry
from ask_ray.storage import Folder
from ask_ray.training.beside import validation_of
from ask_ray.training.checkpoint import CHECKPOINTS, PREFIX, tidy
from ask_ray.training.worker import WorkerPlan, encoding_plan, train_worker

#: Ray Train looks for reports this often; with its default of 2 s, short epochs would wait for it.
REPORT_INTERVAL = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")


#: An elastic run waits this long for the number of workers that the cluster held last: Ray counts its nodes every 20 s.
START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")

#: What a worker takes of `training.node_resource`: so little that it never bounds the workers of a node.
MARK = 0.001


#: What Ray says of a node where it ends processes, and CUDA where it finds no room.
OUT_OF_MEMORY = ("running low on memory", "out of memory")

#: How long a run that is over waits for the removal of old versions.
TIDYING_SECONDS = 30.0

#: The most neighbours that FAISS finds, and inverted lists that it searches, for a query on a GPU.
GPU_SEARCH = 2048


class TrainingFailed(UserError, RuntimeError):
    """Training that ended before its last epoch. The message holds the cause and how to continue."""


@dataclass(frozen=True)
class RunPlace:
    """Where a run keeps what it makes: <storage>/<name>."""

    storage: Folder
    name: str

    @property
    def folder(self) -> Folder:
        """The run's folder."""
        return self.storage / self.name

    @property
    def knowledge(self) -> Folder:
        """The versions of its knowledge base."""
        return self.folder / "knowledge"

    def forget(self) -> None:
        """Remove its checkpoints, those too that never came to its folder from this node, and its knowledge base; figures and
        pictures stay."""
        tidy()
        for name in self.folder.names() if self.folder.exists() else []:
            if name == CHECKPOINTS:
                self.folder.remove(name)
            elif name == self.knowledge.name or name.startswith(PREFIX):
                (self.folder / name).delete()


def workers_of(settings: Settings) -> int:
    """The number of workers of :func:`ask_ray.cluster.fitted` settings."""
    if settings.training.workers is None:
        raise SettingsError("training.workers: not filled in yet; fit the settings to the cluster first")
    return settings.training.workers


def _scaling(settings: Settings) -> ScalingConfig:
    """How many workers, or the least and the most of them, and what each reserves."""
    training, most = settings.training, workers_of(settings)
    shares = {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker, training.node_resource: MARK}
    return ScalingConfig(  # type: ignore[call-arg]
        num_workers=most if training.min_workers is None else (training.min_workers, most),  # type: ignore[arg-type]
        use_gpu=bool(training.gpus_per_worker),
        resources_per_worker={name: share for name, share in shares.items() if name and share},
        elastic_resize_monitor_interval_s=training.resize_seconds,
    )


class Towers(NamedTuple):
    """parameters: of both towers; frames: tokens of a picture or of `data.max_seconds`; 0 where only embeddings meet."""

    parameters: int
    frames: int


def check_towers(settings: Settings) -> Towers:
    """Refuse, before a corpus is prepared for them, towers that cannot be built.

    Raises:
        SettingsError, WeightsError: naming the field or the file.
    """
    model = registry.build(settings.model, settings.data.form.sample_rate).eval()
    parameters, frames = sum(parameter.numel() for parameter in model.parameters()), 0
    if settings.model.interaction == "late":
        with torch.inference_mode():
            tokens = model.audio_encoding(*pad([_largest(settings.data)])).tokens
        frames = 0 if tokens is None else tokens.mask.shape[1]
    return Towers(parameters, frames)


def _largest(data: DataSettings) -> np.ndarray:
    """Silence as long as clips may be, or a black picture: towers make as many tokens of it as of any."""
    if data.form.sample_rate is None:
        return np.zeros((data.image_size, data.image_size, 3), np.uint8)
    return np.zeros(round(data.max_seconds * data.form.sample_rate), np.int16)


def check(settings: Settings, corpus: Corpus) -> None:
    """Refuse, before anything starts, what could not be trained on this corpus.

    Raises:
        SettingsError: naming the field or the sum.
    """
    _check_batches(settings, corpus)
    if settings.ask.enabled:
        _check_refreshing(settings, corpus)
        sources = sources_of(settings.knowledge.sources, corpus.folder.uri)
        extent = check_sources(sources, corpus, settings.data.held_out)
        entries = entries_of(settings.knowledge, corpus.folder.uri)
        _check_neighbours(settings, extent, entries)
        if _searches_on_gpu(settings):
            _check_gpu_search(settings, _fullest(settings, sources, extent), entries)


def _check_batches(settings: Settings, corpus: Corpus) -> None:
    training, clips = settings.training, corpus.clips("train")
    if steps_of(clips, workers_of(settings), training.batch_size) == 0:
        raise SettingsError(
            f"training.batch_size: {workers_of(settings)} workers x {training.batch_size} pairs are more than the {clips} clips "
            "of the training split: lower training.batch_size or training.workers"
        )


def _check_refreshing(settings: Settings, corpus: Corpus) -> None:
    """What is counted in steps against the steps that there will be: it would never come."""
    refresh, training = settings.knowledge.refresh, settings.training
    per_epoch = steps_of(corpus.clips("train"), workers_of(settings), training.batch_size)
    steps, policy = training.epochs * per_epoch, policy_of(refresh, per_epoch)
    if isinstance(policy, Adaptive | Continuous) and policy.first + policy.floor >= steps:
        raise SettingsError(
            f"knowledge.refresh.min_interval: {policy.floor} steps after the {policy.first} of warm-up are not below the {steps} "
            f"of the run: policy {refresh.policy} would never refresh; lower it, or use policy static"
        )
    probes = refresh.policy == "adaptive" and refresh.signal == "probe"
    if probes and refresh.probe_steps >= steps:
        raise SettingsError(
            f"knowledge.refresh.probe_steps is {refresh.probe_steps}, and the run has {steps} steps: drift would never be read, "
            "and knowledge.refresh.threshold never fire; lower it"
        )
    if refresh.mode == "async" and refresh.poll_steps >= steps:
        raise SettingsError(
            f"knowledge.refresh.poll_steps is {refresh.poll_steps}, and the run has {steps} steps: no version would be swapped "
            "in before its end; lower it"
        )


def _check_neighbours(settings: Settings, extent: Extent, entries: int) -> None:
    """K and Nc against what the knowledge base will hold."""
    ask = settings.ask
    barred = min(_excluded(settings), extent.own)
    left = extent.clips - barred
    if ask.fine and ask.neighbours > left:
        raise SettingsError(
            f"ask.neighbours is {ask.neighbours}, but of the knowledge base's {extent.clips} clips {left} are left after "
            f"excluding {barred} (ask.exclude={ask.exclude}): lower ask.neighbours or give more clips"
        )
    if ask.coarse and ask.prototypes > entries:
        raise SettingsError(f"ask.prototypes is {ask.prototypes}, but the knowledge base has {entries} entries: lower it")


def _excluded(settings: Settings) -> int:
    """The clips that a pair may not retrieve."""
    return {"none": 0, "self": 1, "batch": workers_of(settings) * settings.training.batch_size}[settings.ask.exclude]


def _searches_on_gpu(settings: Settings) -> bool:
    """Whether workers search the entries on their GPU: an index that is corrected between refreshes stays on the CPU."""
    corrections = settings.knowledge.corrections
    return settings.ask.fine and settings.training.device == "cuda" and not (corrections.write_back or corrections.drift_map)


def _fullest(settings: Settings, sources: Sequence[Source], extent: Extent) -> int:
    """The most entries that one clip has: where sources share clips, at most those of all together."""
    opened = [(Corpus.open(source.corpus), source.split) for source in sources]
    most = [one.entries(split, settings.knowledge.captions_per_clip) // one.clips(split) for one, split in opened]
    return sum(most) if extent.clips < sum(one.clips(split) for one, split in opened) else max(most)


def _check_gpu_search(settings: Settings, fullest: int, entries: int) -> None:
    """What :func:`ask_ray.knowledge.index.retrieve` asks for against what FAISS does on a GPU: workers would fail at their first
    search."""
    ask, knowledge = settings.ask, settings.knowledge
    excluded = _excluded(settings)
    asked = min(ask.neighbours + excluded * fullest, entries)
    if asked > GPU_SEARCH:
        smaller = ", training.batch_size" if ask.exclude == "batch" else ""
        other = ", or set ask.exclude to self" if ask.exclude == "batch" else ""
        raise SettingsError(
            f"ask.neighbours: {ask.neighbours} are asked for beside {excluded} excluded clips (ask.exclude={ask.exclude}) of up "
            f"to {fullest} entries, {asked} in all, and on a GPU FAISS finds {GPU_SEARCH} at most: lower "
            f"ask.neighbours{smaller} or knowledge.captions_per_clip{other}"
        )
    if knowledge.probes > GPU_SEARCH and entries >= knowledge.exact_below:
        raise SettingsError(
            f"knowledge.probes: {knowledge.probes} inverted lists are asked for, and on a GPU FAISS searches {GPU_SEARCH} at "
            "most: lower knowledge.probes"
        )


def start_refiner(settings: Settings, corpus: Corpus, place: RunPlace, journal: Journal) -> ActorHandle:
    """The run's refiner actor, on this node: no other's loss takes it along."""
    plan = RefreshPlan(
        place.knowledge,
        place.name,
        encoding_plan(settings, corpus.folder.uri),
        settings.knowledge,
        settings.ask.prototypes if settings.ask.coarse else 0,
        settings.run.seed,
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Refiner.options(scheduling_strategy=here).remote(plan, journal)  # type: ignore[attr-defined]


def train(settings: Settings, corpus: Corpus, place: RunPlace, journal: Journal) -> Result:
    """Run the job to its end, from its newest checkpoint if the run already has one.

    Raises:
        TrainingFailed: if it fails more often than `training.max_failures` allows.
    """
    training = settings.training
    refiner = start_refiner(settings, corpus, place, journal) if settings.ask.enabled else None
    plan = WorkerPlan(settings, corpus.folder.uri, place.knowledge, place.name, place.folder, refiner, journal)
    os.environ.setdefault(*REPORT_INTERVAL)
    if training.min_workers is not None:
        os.environ.setdefault(*START_TIMEOUT)
    filesystem, path = place.storage.resolve()
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"plan": plan},
        scaling_config=_scaling(settings),
        run_config=RunConfig(
            name=place.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=training.keep_checkpoints),
        ),
        validation_config=validation_of(training, place.folder, journal),  # type: ignore[call-arg]
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingFailed(
            f"{_cause(error)}\nWhat was saved is kept in {place.folder}; the same command with "
            f"--run.name {place.name} continues from the newest checkpoint."
        ) from error
    finally:
        if refiner is not None:
            with contextlib.suppress(*AWAY):
                ray.get(refiner.tidied.remote(), timeout=TIDYING_SECONDS)
            ray.kill(refiner)
        tidy()


def _cause(error: BaseException) -> str:
    """The innermost message of a failed job."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = next(iter(failures.items()))
        return f"training failed on rank {rank}: {_line(failure)}"
    return f"training failed: {_line(error)}"


def _line(error: BaseException) -> str:
    """The line of an error that tells most: the last, but where memory ran out the one that says so. Without a line, its name."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return next((line for line in lines if any(words in line for words in OUT_OF_MEMORY)), lines[-1])


def final_facts(result: Result) -> dict[str, Any]:
    """What rank 0 returned."""
    return dict(result.return_value or {})  # type: ignore[attr-defined]
