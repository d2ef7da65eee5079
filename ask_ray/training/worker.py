"""What a Ray Train worker does: the step loop, the agreed swap of the knowledge base, the report of an epoch."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from torch import Tensor, nn

from ask_ray.config import Settings
from ask_ray.data.batches import Batch, TrainingBatches
from ask_ray.data.corpus import Corpus
from ask_ray.journal import Journal
from ask_ray.knowledge.encoding import EncodingPlan, encode_rows
from ask_ray.knowledge.policy import schedule_of
from ask_ray.knowledge.replica import Knowledge, Replica
from ask_ray.method.drift import rdm
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.storage import Folder
from ask_ray.training import checkpoint, evaluation
from ask_ray.training.checkpoint import Place
from ask_ray.training.gather import agree_on_least, gather_objects, tell_all, world_size
from ask_ray.training.step import Stepper

#: Steps between those that are told to the journal one by one.
STEPS_TOLD = 10


@dataclass(frozen=True)
class WorkerPlan:
    """What the trainer hands to every worker.

    corpus, home: places of the prepared corpus and of the knowledge base's versions; run: the run's identity;
    folder: of the run, where its checkpoints are.
    """

    settings: Settings
    corpus: str
    home: Folder
    run: str
    folder: Folder
    refiner: ActorHandle | None
    journal: Journal


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry: train from the start or the newest checkpoint, evaluate, and return the final figures."""
    return Worker(config["plan"]).run()


@dataclass
class Means:
    """Running means of scalars over an epoch, kept on the device: no step waits for a number. NaN is left out."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor | None) -> None:
        """Add a step's values; None is left out."""
        for name, value in values.items():
            if value is not None:
                known = torch.isfinite(value)
                self.sums[name] = self.sums.get(name, 0.0) + torch.where(known, value.detach().double(), 0.0)
                self.counts[name] = self.counts.get(name, 0.0) + known.double()

    def take(self) -> dict[str, float]:
        """The means so far, and start over. A scalar that was never finite has none."""
        means = {name: float(total / self.counts[name]) for name, total in self.sums.items() if self.counts[name] > 0}
        self.sums, self.counts = {}, {}
        return means


class Worker:
    """One rank of a run."""

    def __init__(self, plan: WorkerPlan) -> None:
        self.plan, self.settings = plan, plan.settings
        self.rank = ray.train.get_context().get_world_rank()
        self.device = ray.train.torch.get_device()
        self.corpus = Corpus.open(plan.corpus)
        checkpoint.seed_everything(self.settings.run.seed, 0)  # the same initial weights on every rank
        model = registry.build(self.settings.model, self.corpus.sample_rate)
        checkpoint.seed_everything(self.settings.run.seed, self.rank + 1)
        if self.device.type == "cuda" and world_size() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        training = self.settings.training
        self.batches = TrainingBatches(
            self.corpus,
            self.settings.data,
            model.tokenise,
            training.batch_size,
            self.settings.run.seed,
            self.rank,
            world_size(),
        )
        self.steps = self.batches.steps
        wrapped = ray.train.torch.prepare_model(model)
        self.stepper = Stepper(wrapped, model, self.settings, self.steps, self.device)
        self.schedule = schedule_of(self.settings.knowledge.refresh, self.steps)
        self.means = Means()
        self.place = Place(0, 0, 0, plan.corpus)
        self.replica = self._replica()

    def _replica(self) -> Replica | None:
        plan = self.plan
        if plan.refiner is None:
            return None
        return Replica(plan.refiner, plan.home, plan.run, self.settings.model.dim, self.device, plan.journal, self.rank)

    # --- the run ---

    def run(self) -> dict[str, Any]:
        """All epochs, then the final refresh and evaluation."""
        self._resume()
        started, first = time.time(), self.place.step
        while self.place.epoch < self.settings.training.epochs:
            self._epoch(self.place.epoch)
        seconds = time.time() - started
        if self.replica is not None:
            self._refresh("a knowledge base by the final weights", wait=True, urgent=True)
            self.replica.stop()
        final = self._evaluate("test", with_injection=True)
        done = self.place.step - first
        return {
            **final,
            "steps": self.place.step,
            "epochs": self.place.epoch,
            "knowledge_version": self.place.knowledge_version,
            "training_seconds": seconds,
            "steps_per_second": done / seconds if done else 0.0,
            "world_size": world_size(),
            "device": str(self.device),
        }

    def _resume(self) -> None:
        """Continue from the newest checkpoint, if there is one, with the knowledge base that it names."""
        found = ray.train.get_checkpoint()
        if found is not None:
            with found.as_directory() as folder:
                self.place = checkpoint.restore(
                    Path(folder), self.model, self.stepper.optimizer, self.stepper.scheduler, self.rank
                )
        if self.replica is not None:
            if self.rank == 0:
                ray.get(self.plan.refiner.start_from.remote(self.place.knowledge_version))  # type: ignore[union-attr]
            tell_all(None)  # no rank asks for later versions before the refiner has forgotten them
            self.replica.start(self.place.knowledge_version)
        if self.rank == 0:
            self.plan.journal.tell("began", step=self.place.step, epoch=self.place.epoch, world_size=world_size())

    def _epoch(self, epoch: int) -> None:
        started = time.time()
        self.model.train()
        for batch in self.batches.epoch(epoch):
            self._before_step(epoch_starts=self.place.step == epoch * self.steps)
            self._step(batch.to(self.device))
            self._move(step=self.place.step + 1)
        self._move(epoch=epoch + 1)
        self._report(time.time() - started)

    def _move(self, **to: int) -> None:
        self.place = Place(**{**vars(self.place), **to})

    # --- the knowledge base ---

    def _before_step(self, epoch_starts: bool) -> None:
        """At a poll step, swap to the newest version that every rank has loaded; then ask for a refresh if one is due."""
        if self.replica is None:
            return
        step, refresh = self.place.step, self.settings.knowledge.refresh
        if step % refresh.poll_steps == 0:
            self._swap()
        reason = self.schedule.reason(step, self.replica.version > 0, epoch_starts)
        if reason is not None:
            self._refresh(reason, wait=refresh.mode == "sync")

    def _refresh(self, reason: str, wait: bool, urgent: bool = False) -> None:
        """Hand the refiner this step's weights and, if asked to, wait until the version is in.

        An urgent refresh does not queue behind one that is under way: that one is given up.
        """
        ticket: Any = None
        if self.rank == 0:
            assert self.plan.refiner is not None
            if urgent:
                ray.get(self.plan.refiner.stop.remote())
            weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            # Before the first version is in, asking again would only throw away what is half done.
            first = self.replica is not None and self.replica.version == 0 and not urgent
            ticket = ray.get(self.plan.refiner.request.remote(self.place.step, reason, [ray.put(weights)], first))
        if wait:
            self._wait(tell_all(ticket))

    def _wait(self, ticket: int) -> None:
        assert self.replica is not None
        version: Any = None
        if self.rank == 0:
            assert self.plan.refiner is not None
            over = False
            while not over:
                over, version = ray.get(self.plan.refiner.settled.remote(ticket, 5.0))
        version = tell_all(version)
        if version is not None:
            self.replica.wait_until_seen(version)
        self._swap()

    def _swap(self) -> None:
        """Use the newest version that all ranks have, from this step on (one tiny all-reduce, no barrier besides)."""
        assert self.replica is not None
        started = time.perf_counter()
        version = agree_on_least(self.replica.newest, self.device)
        if version <= self.replica.version or not agree_on_least(int(self.replica.has(version)), self.device):
            return
        self.replica.swap(version)
        known = self.replica.current
        assert known is not None
        self._move(knowledge_version=version)
        self.plan.journal.tell(
            "swapped", rank=self.rank, version=version, step=self.place.step,
            lag_steps=self.place.step - known.encoder_step, swap_ms=1000 * (time.perf_counter() - started),
        )  # fmt: skip
        if self.rank == 0:
            self.plan.refiner.swapped.remote(version)  # type: ignore[union-attr]

    def _step(self, batch: Batch) -> None:
        known = self.replica.current if self.replica is not None else None
        watch = self.settings.ask.influence and self.place.step % self.steps == 0
        figures = self.stepper.take(batch, known, watch)
        self.means.add(**figures)
        if self.rank == 0 and self.place.step % STEPS_TOLD == 0:
            seen = {name: float(figures[name]) for name in ("loss", "rdm_audio", "rdm_text") if name in figures}
            self.plan.journal.tell("step", step=self.place.step, version=self.place.knowledge_version, **seen)

    # --- the end of an epoch ---

    def _report(self, seconds: float) -> None:
        training, epoch = self.settings.training, self.place.epoch
        metrics: dict[str, Any] = {
            "epoch": epoch,
            "step": self.place.step,
            **self.means.take(),
            "clips_per_second": self.steps * training.batch_size * world_size() / seconds,
            "learning_rate": self.stepper.optimizer.param_groups[0]["lr"],
            "knowledge_version": self.place.knowledge_version,
            **self._probe(),
        }
        if self.replica is not None and self.replica.current is not None:
            metrics["lag_steps"] = self.place.step - self.replica.current.encoder_step
        if training.evaluate_every and epoch % training.evaluate_every == 0 and self.corpus.clips("validation"):
            figures = self._evaluate("validation", with_injection=False)["final"]
            metrics |= {f"{way}_{name}": value for way, of in figures.items() for name, value in of.items()}
        last = epoch == training.epochs
        states = gather_objects(checkpoint.random_state())
        with self._checkpoint(states, last or epoch % training.checkpoint_every == 0) as saved:
            if self.rank == 0:
                self.plan.journal.tell("epoch", **metrics)
            ray.train.report(metrics, checkpoint=saved)
        if self.rank == 0 and self.replica is not None:
            self.plan.refiner.pin.remote(checkpoint.pinned_versions(self.plan.folder))  # type: ignore[union-attr]

    @contextlib.contextmanager
    def _checkpoint(self, states: list[Tensor], due: bool) -> Iterator[ray.train.Checkpoint | None]:
        if self.rank != 0 or not due:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="ask_ray-checkpoint-") as folder:
            checkpoint.save(
                Path(folder), self.place, self.settings, self.model, self.stepper.optimizer, self.stepper.scheduler, states
            )  # fmt: skip
            yield ray.train.Checkpoint.from_directory(folder)

    def _evaluate(self, split: str, with_injection: bool) -> dict[str, Any]:
        """Figures of a split, the same on every rank; `final_injected` beside `final` where there is knowledge."""
        if self.corpus.clips(split) == 0:
            return {}
        encoded = evaluation.encode_split(self.model, self.corpus, split, self.settings, self.device, self.rank)
        figures: dict[str, Any] = {"final": evaluation.both_ways(encoded)}
        known = self.replica.current if self.replica is not None else None
        if with_injection and known is not None:
            figures["final_injected"] = evaluation.both_ways(evaluation.injected(encoded, known, self.settings.ask))
        return figures

    def _probe(self) -> dict[str, float]:
        """Drift of stored entries, re-encoded now without augmentation: exact, at the cost of encoding a few row groups."""
        known = self.replica.current if self.replica is not None else None
        clips = self.settings.knowledge.drift_probe
        if known is None or clips == 0:
            return {}
        fresh, stored = probe_rows(known, self.model, self.corpus, self.settings, self.device, self.rank)
        tau = float(self.model.temperature)
        return {f"probe_rdm_{way}": float(rdm(fresh[way], fresh[way], stored[way], tau)) for way in ("audio", "text")}


def probe_rows(
    known: Knowledge, model: DualEncoder, corpus: Corpus, settings: Settings, device: torch.device, rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fresh and stored rows of `knowledge.drift_probe` entries (rounded up to row groups), gathered over ranks."""
    training = model.training
    model.eval()
    plan = encoding_plan(settings, str(corpus.folder))
    groups = corpus.groups("train")
    count = min(len(groups), math.ceil(settings.knowledge.drift_probe / max(group.clips for group in groups)))
    chosen = [groups[place] for place in torch.linspace(0, len(groups) - 1, count).round().int().tolist()]
    parts = [
        encode_rows(model, corpus.read(group), plan, corpus.sample_rate, device)
        for place, group in enumerate(chosen)
        if place % world_size() == rank
    ]
    model.train(training)
    every = [part for of_rank in gather_objects(parts) for part in of_rank]
    numbers, which = (torch.cat([torch.from_numpy(part[name]) for part in every]) for name in ("number", "which"))
    entry = known.locate(numbers, which)
    there = entry >= 0
    stored = dict(zip(("audio", "text"), known.rows(entry[there].to(device)), strict=True))
    fresh = {name: torch.cat([torch.from_numpy(part[name]) for part in every])[there].to(device) for name in stored}
    return fresh, stored


def encoding_plan(settings: Settings, corpus: str) -> EncodingPlan:
    """How the knowledge source of these settings is encoded."""
    knowledge = settings.knowledge
    return EncodingPlan(
        corpus, "train", knowledge.captions_per_clip, settings.data.max_seconds, settings.model, knowledge.pool
    )  # fmt: skip
