"""What a Ray Train worker does: the step loop, the agreed swap of the knowledge base, the report of an epoch."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointUploadMode
from torch import Tensor, nn

from ask_ray.config import Settings
from ask_ray.data.batches import Batch, TrainingBatches
from ask_ray.data.corpus import Corpus
from ask_ray.journal import Journal
from ask_ray.knowledge.cache import Cache
from ask_ray.knowledge.encoding import EncodingPlan, encode_rows, probe_units
from ask_ray.knowledge.policy import Clock
from ask_ray.knowledge.replica import Knowledge, Replica
from ask_ray.knowledge.sources import sources_of
from ask_ray.method.drift import rdm
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.models.weights import not_finite
from ask_ray.storage import Folder, Tell, masked, patiently
from ask_ray.training import checkpoint, evaluation
from ask_ray.training.checkpoint import Place
from ask_ray.training.gather import gather_objects, share_buffers, tell_all, world_size
from ask_ray.training.gauges import Gauges
from ask_ray.training.means import Means
from ask_ray.training.pins import Pins
from ask_ray.training.step import Stepper, TrainingDiverged
from ask_ray.training.upkeep import Upkeep, part_of

#: Steps between those that are told to the journal one by one.
STEPS_TOLD = 10

#: What of a checkpoint's memory is the cross-batch queue.
QUEUE = "queue."


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


class Worker:
    """One rank of a run."""

    def __init__(self, plan: WorkerPlan) -> None:
        self.plan, self.settings = plan, plan.settings
        self.rank = ray.train.get_context().get_world_rank()
        self.device = ray.train.torch.get_device()
        self.corpus = self._opened()
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
        self.means = Means()
        self.warned = False
        self.gauges = Gauges(plan.run)
        self.pins = Pins(plan.folder, plan.refiner, plan.journal, training.keep_checkpoints) if plan.refiner is not None else None
        self.place = Place(0, 0, 0, plan.corpus)
        self.spent, self.began = 0.0, time.time()
        self.upkeep = self._upkeep()

    def _opened(self) -> Corpus:
        """The run's corpus. Only a restart waits for storage that is away: where a run begins, the place may be a wrong one."""
        if ray.train.get_checkpoint() is None:
            return Corpus.open(self.plan.corpus)
        return patiently(lambda: Corpus.open(self.plan.corpus), self._away("not opened"))

    def _upkeep(self) -> Upkeep | None:
        plan, knowledge = self.plan, self.settings.knowledge
        if plan.refiner is None:
            return None
        corrected = knowledge.corrections.write_back or knowledge.corrections.drift_map
        cache = Cache.of(knowledge)
        if plan.home.local is None:  # the driver has looked at its own node alone
            Folder(str(cache.root)).check_writable("knowledge.cache")
        replica = Replica(
            plan.refiner,
            plan.home,
            plan.run,
            self.settings.model.dim,
            self.device,
            plan.journal,
            self.rank,
            corrected,
            cache,
        )
        return Upkeep(
            knowledge, replica, plan.refiner, plan.journal, self.gauges, self.model, self.steps, self.rank, self.device
        )  # fmt: skip

    # --- the run ---

    def run(self) -> dict[str, Any]:
        """All epochs, then the final refresh and evaluation."""
        self._resume()
        self.began = time.time()
        while self.place.epoch < self.settings.training.epochs:
            self._epoch(self.place.epoch)
        seconds = self._seconds()
        if self.upkeep is not None:
            self.upkeep.finish(self.place.step)
        final = self._evaluate("test", with_injection=True)
        return {
            **final,
            "steps": self.place.step,
            "epochs": self.place.epoch,
            "knowledge_version": self.upkeep.version if self.upkeep is not None else 0,
            "training_seconds": seconds,
            "steps_per_second": (self.place.step - self.place.start) / seconds,
            "world_size": world_size(),
            "device": str(self.device),
        }

    def _seconds(self) -> float:
        """Spent training so far, by this worker and by those before it."""
        return self.spent + time.time() - self.began

    def _resume(self) -> None:
        """Continue from the newest checkpoint, if there is one, with the knowledge base that it names; begin from that of the
        run to fork, if one is named, with a knowledge base by its weights."""
        found, fork = ray.train.get_checkpoint(), self.settings.run.fork
        memory, forked = {}, False
        if found is not None:
            name = PurePosixPath(found.path).name
            with checkpoint.fetched(self.plan.folder / name, self._away("not fetched")) as path:
                memory = self._restore(path)
        elif fork is not None:
            name = self._to_fork(Folder.at(fork))
            with checkpoint.fetched(Folder.at(fork) / name, self._away("not fetched")) as path:
                memory = {name: value for name, value in self._restore(path, fork=True).items() if name.startswith(QUEUE)}
            forked = self.place.knowledge_version > 0
            self._move(knowledge_version=0, asked=None, start=self.place.step, seconds=0.0)
        pace = self.steps / (self.place.steps or self.steps)
        self.place = replace(self.place.among(self.steps), corpus=self.plan.corpus)  # which may have moved
        self.spent = self.place.seconds
        position = self.place.epoch * self.steps + self.place.batch
        self.stepper.stand_at(position)
        self.stepper.remember(part_of(memory, QUEUE))
        if self.upkeep is not None:
            clock = Clock(self.place.step, position, pace)
            self.upkeep.begin(self.place.knowledge_version, self.place.asked, clock, memory)
            if forked:
                self.upkeep.refresh(self.place.step, f"begun from {masked(str(fork))}", wait=True)
        if self.rank == 0:
            self.plan.journal.tell(
                "began",
                step=self.place.step,
                epoch=self.place.epoch,
                version=self.place.knowledge_version,
                world_size=world_size(),
            )

    def _to_fork(self, run: Folder) -> str:
        """The checkpoint of the run to fork, the same on every rank: that run may be saving another at this moment."""
        name: str = tell_all(checkpoint.newest_name(run, self.settings.training.epochs) if self.rank == 0 else None)
        return name

    def _restore(self, folder: Path, fork: bool = False) -> dict[str, Tensor]:
        """Take up a checkpoint; returns its memory."""
        self.place = checkpoint.restore(folder, self.model, self.stepper.optimizer, self.stepper.scheduler, self.rank, fork)
        return checkpoint.memory(folder)

    def _away(self, kind: str) -> Tell:
        """What tells the journal that storage was away, as an event of this kind."""
        return lambda error: self.plan.journal.tell(kind, rank=self.rank, problem=str(error))

    def _epoch(self, epoch: int) -> None:
        started, first = time.time(), self.place.batch
        self.model.train()
        for batch in self.batches.epoch(epoch, first):
            if self.upkeep is not None:
                if self.upkeep.probe_due(self.place.step):
                    self.upkeep.probed(sum(self._probe().values()) / 2)
                self.upkeep.before_step(self.place.step, epoch_starts=self.place.batch == 0)
            self._step(batch.to(self.device))
            self._heed_preemption()
        self._move(epoch=epoch + 1, batch=0)
        share_buffers(self.model)  # each rank's last step moved its own running statistics
        self._report((self.steps - first) / (time.time() - started))

    def _move(self, **to: Any) -> None:
        self.place = replace(self.place, **to)

    def _step(self, batch: Batch) -> None:
        known = self.upkeep.known if self.upkeep is not None else None
        watch = self.settings.ask.influence and self.place.batch == 0
        try:
            taken = self.stepper.take(batch, known, watch)
        except TrainingDiverged as error:
            self.plan.journal.tell("diverged", step=self.place.step, rank=self.rank, problem=str(error))
            raise
        self._move(step=self.place.step + 1, batch=self.place.batch + 1)
        self.means.add(**taken.figures)
        if self.upkeep is not None:
            self.upkeep.after_step(taken, self.place.step)
        if self.rank == 0 and (self.place.step - 1) % STEPS_TOLD == 0:
            read = {name: float(taken.figures[name]) for name in ("loss", "rdm_audio", "rdm_text") if name in taken.figures}
            seen = {name: value for name, value in read.items() if math.isfinite(value)}  # JSON has no NaN
            version = known.version if known is not None else 0
            self.plan.journal.tell("step", step=self.place.step - 1, version=version, **seen)

    def _heed_preemption(self) -> None:
        """Save a checkpoint, once, when a node of the run is about to be taken away."""
        every = self.settings.training.preemption_steps
        if self.warned or not every or self.place.step % every or self.place.batch == self.steps:
            return
        notice = ray.train.get_preemption_info()
        if notice is not None:
            self.warned = True
            stands = {"epoch": self.place.epoch, "step": self.place.step, "preempted": 1}
            self._save(stands, due=True, upload="sync")  # the node may soon be gone
            if self.rank == 0:
                self.plan.journal.tell("preempted", step=self.place.step, deadline_ms=notice.deadline_ms)

    # --- the end of an epoch ---

    def _report(self, steps_per_second: float) -> None:
        training, epoch = self.settings.training, self.place.epoch
        metrics: dict[str, Any] = {
            "epoch": epoch,
            "step": self.place.step,
            **self.means.take(),
            "clips_per_second": steps_per_second * training.batch_size * world_size(),
            "learning_rate": self.stepper.optimizer.param_groups[0]["lr"],
            "knowledge_version": self.upkeep.version if self.upkeep is not None else 0,
            **self._probe(),
            **(self.upkeep.facts(self.place.step) if self.upkeep is not None else {}),
        }
        evaluates = training.evaluates(epoch) and self.corpus.clips("validation") > 0
        beside = evaluates and training.evaluates_beside
        if evaluates and not beside:
            metrics |= evaluation.flat_figures(self._evaluate("validation", with_injection=False)["final"])
        if self.rank == 0:
            self.plan.journal.tell("epoch", **metrics)
            self.gauges.set(**metrics)
        last = epoch == training.epochs
        due = last or beside or epoch % training.checkpoint_every == 0
        self._save(metrics, due, training.upload, validation=beside)

    def _save(self, metrics: dict[str, Any], due: bool, upload: str, validation: bool = False) -> None:
        """Report to Ray Train, with a checkpoint if one is due, to be evaluated if asked for. Rank 0 writes it; all call.

        Raises:
            TrainingDiverged: instead of saving weights that are not finite, which would push out the good checkpoints.
        """
        if name := not_finite(self.model.state_dict()):
            raise TrainingDiverged.at(self.place.step, f"the weight {name}")
        self._move(seconds=self._seconds())
        if self.upkeep is not None:
            self._move(knowledge_version=self.upkeep.version, asked=self.upkeep.asked)
        states = gather_objects(checkpoint.random_state())
        saved = self._checkpoint(states) if due and self.rank == 0 else None
        mode = CheckpointUploadMode(upload.upper())
        ray.train.report(
            metrics,
            checkpoint=saved,
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=checkpoint.uploading(self.plan.folder, self._away("not uploaded")),
            validation=validation and saved is not None,  # asked for by the rank that has the checkpoint alone
        )
        if self.rank == 0 and self.pins is not None:
            self.pins.renew(self.place.knowledge_version if saved is not None else None)

    def _checkpoint(self, states: list[dict[str, Tensor]]) -> ray.train.Checkpoint:
        """A checkpoint in a temporary folder, which Ray Train removes when it has copied it."""
        folder = tempfile.mkdtemp(dir=checkpoint.staging())
        optimizer, scheduler = self.stepper.optimizer, self.stepper.scheduler
        checkpoint.save(Path(folder), self.place, self.settings, self.model, optimizer, scheduler, states, self._memory())
        return ray.train.Checkpoint.from_directory(folder)

    def _memory(self) -> dict[str, Tensor]:
        queue = {f"{QUEUE}{name}": value for name, value in self.stepper.memory().items()}
        return queue | (self.upkeep.memory() if self.upkeep is not None else {})

    def _evaluate(self, split: str, with_injection: bool) -> dict[str, Any]:
        """Figures of a split, the same on every rank; `final_injected` beside `final` where there is knowledge."""
        if self.corpus.clips(split) == 0:
            return {}
        encoded = evaluation.encode_split(self.model, self.corpus, split, self.settings, self.device, self.rank)
        figures: dict[str, Any] = {"final": evaluation.both_ways(encoded)}
        known = self.upkeep.known if self.upkeep is not None else None
        if with_injection and known is not None:
            figures["final_injected"] = evaluation.both_ways(evaluation.injected(encoded, known, self.settings.ask))
        return figures

    def _probe(self) -> dict[str, float]:
        """Drift of stored entries, re-encoded now without augmentation: exact, at the cost of encoding a few row groups."""
        known = self.upkeep.known if self.upkeep is not None else None
        clips = self.settings.knowledge.drift_probe
        if known is None or clips == 0:
            return {}
        fresh, stored = probe_rows(known, self.model, self.corpus, self.settings, self.device, self.rank)
        tau = float(self.model.temperature)
        return {f"probe_rdm_{way}": float(rdm(fresh[way], fresh[way], stored[way], tau)) for way in ("audio", "text")}


def probe_rows(
    known: Knowledge, model: DualEncoder, corpus: Corpus, settings: Settings, device: torch.device, rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fresh and stored rows of `knowledge.drift_probe` entries of all sources (rounded up to row groups), over all ranks."""
    training = model.training
    model.eval()
    plan = encoding_plan(settings, corpus.folder.uri)
    mine = probe_units(plan, settings.knowledge.drift_probe)[rank :: world_size()]
    parts = [(unit.source.name, encode_rows(model, unit.read(), plan, corpus.sample_rate, device)) for unit in mine]
    model.train(training)
    named = [part for of_rank in gather_objects(parts) for part in of_rank]
    every = [part for _, part in named]
    entry = torch.cat(
        [known.locate(torch.from_numpy(part["number"]), torch.from_numpy(part["which"]), source) for source, part in named]
    )
    there = entry >= 0
    stored = dict(zip(("audio", "text"), known.rows(entry[there].to(device)), strict=True))
    fresh = {name: torch.cat([torch.from_numpy(part[name]) for part in every])[there].to(device) for name in stored}
    return fresh, stored


def encoding_plan(settings: Settings, corpus: str) -> EncodingPlan:
    """How the knowledge sources of these settings are encoded. corpus: place of the run's."""
    knowledge = settings.knowledge
    sources = sources_of(knowledge.sources, corpus)
    return EncodingPlan(sources, knowledge.captions_per_clip, settings.data.max_seconds, settings.model, knowledge.pool)
