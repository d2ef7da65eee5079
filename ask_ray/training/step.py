"""An optimiser step: forward, the ASK loss over the global batch, backward, update, and what is told of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ask_ray.config import Settings
from ask_ray.data.batches import Batch
from ask_ray.knowledge.replica import Knowledge, Reading
from ask_ray.method import reliability
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.training import ask
from ask_ray.training.by_source import by_source, source_totals
from ask_ray.training.gather import gather, rank, world_size


@dataclass(frozen=True)
class Pairs:
    """The global batch's pairs that are entries of the knowledge base in use.

    entry: (n,) int64; audio, text: (n, d) float32, their fresh rows, detached.
    """

    entry: Tensor
    audio: Tensor
    text: Tensor


@dataclass(frozen=True)
class Taken:
    """What a step told. figures: scalars by name, detached; pairs: None without knowledge."""

    figures: dict[str, Tensor]
    pairs: Pairs | None


class TrainingDiverged(RuntimeError):
    """Numbers that are not finite. The message names the step and what to do."""

    @classmethod
    def at(cls, step: int, what: str) -> TrainingDiverged:
        """What is to be raised when `what` is not finite at a step."""
        return cls(
            f"{what} of step {step} is not finite, and nothing of it is kept. If it happens again after the restart from the "
            "last checkpoint, lower training.learning_rate or training.clip_norm"
        )


class Stepper:
    """The model with its optimiser, its schedule and, if the settings want one, its cross-batch memory."""

    def __init__(
        self, wrapped: nn.Module, model: DualEncoder, settings: Settings, steps_per_epoch: int, device: torch.device
    ) -> None:
        """`wrapped` is `model`, or `model` made data-parallel."""
        self._wrapped, self._model, self._settings = wrapped, model, settings
        training, total = settings.training, settings.training.epochs * steps_per_epoch
        self._device = device
        self._autocast = _autocast(training.precision, device)
        self.optimizer = make_optimizer(model, training.learning_rate, training.weight_decay)
        self.scheduler = make_scheduler(self.optimizer, total, round(total * training.warmup_share))
        remembers = settings.ask.enabled and settings.ask.negatives == "queue"
        self.queue = ask.Queue(settings.ask.queue) if remembers else None

    def stand_at(self, step: int) -> None:
        """Set the schedule to a step: after a change of the number of workers, epochs have another number of them."""
        if self.scheduler.last_epoch != step:
            self.scheduler.last_epoch = step - 1
            self.scheduler.step()

    def memory(self) -> dict[str, Tensor]:
        """What later steps need and no optimizer holds, for a checkpoint: the cross-batch memory."""
        return self.queue.state() if self.queue is not None else {}

    def remember(self, held: dict[str, Tensor]) -> None:
        """Take up what :meth:`memory` told of."""
        if self.queue is not None and held:
            self.queue.push(**{name: value.to(self._device) for name, value in held.items()})

    def take(self, batch: Batch, known: Knowledge | None, watch: bool = False) -> Taken:
        """Take a step on a batch that lies on the device.

        Args:
            known: the knowledge base in use, or None: then the loss is that of the batch alone.
            watch: also measure the out-of-batch influence.

        Returns:
            of the global batch: loss, loss_a2t, loss_t2a, temperature, gradient_norm, and with knowledge consistency,
            rdm_audio, rdm_text (NaN where fewer than two pairs are stored), influence, what each source gives, and the
            pairs it shares with it.

        Raises:
            TrainingDiverged: before the weights change, if the gradient is not finite.
        """
        with self._autocast:
            audio, text, scale = self._wrapped(batch.inputs, batch.sizes, batch.words, batch.mask)
        u, v = audio.vectors, text.vectors
        tokens = None if audio.tokens is None else (audio.tokens, text.tokens)
        ids = gather(batch.ids)
        readings = known.read(u.detach(), v.detach(), batch.ids, ids, self._settings.ask) if known is not None else {}
        leaves: list[Tensor] = []
        if watch:
            readings, leaves = ask.watched(readings, ids)
        made = ask.step(u, v, scale, ids, readings, self.queue, self._settings.ask, tokens)
        figures = {"influence": ask.measured_influence(made.loss, leaves)} if watch else {}
        self.optimizer.zero_grad(set_to_none=True)
        made.loss.backward()
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.training.clip_norm)
        if not bool(norm.isfinite()):
            raise TrainingDiverged.at(self.scheduler.last_epoch, "the gradient")
        self.optimizer.step()
        self.scheduler.step()
        if self.queue is not None:
            self.queue.push(made.audio, made.text, ids)
        figures |= {"loss": made.loss.detach(), "loss_a2t": made.audio_to_text, "loss_t2a": made.text_to_audio}
        figures |= {"temperature": 1 / scale.detach(), "gradient_norm": norm}
        if made.consistency is None or known is None:
            return Taken(figures, None)
        pairs = shared_pairs(made, known, ids, gather(batch.captions))
        figures |= {"consistency": made.consistency.mean(), **drift_of(pairs, known, float(1 / scale.detach()))}
        if "fine" in readings:
            figures |= self._by_source(readings["fine"], made.consistency, known.entries.sources)
        return Taken(figures, pairs)

    def _by_source(self, fine: Reading, consistency: Tensor, sources: Sequence[str]) -> dict[str, Tensor]:
        """What each source gives, over the global batch: its share among the neighbours, and their pairs' mean Ψ."""
        potential = reliability.potential(consistency, self._settings.ask.tau_reliability)
        mine = potential.chunk(world_size())[rank()]
        return by_source(gather(source_totals(fine, len(sources), mine)[None]).sum(dim=0), sources)


def shared_pairs(made: ask.Step, known: Knowledge, ids: Tensor, captions: Tensor) -> Pairs:
    """The pairs of a global batch that are entries: `ids` are its clip numbers, `captions` which of a clip's captions."""
    entry = known.locate(ids, captions)
    there = entry >= 0
    return Pairs(entry[there], made.audio[there], made.text[there])


def drift_of(pairs: Pairs, known: Knowledge, temperature: float) -> dict[str, Tensor]:
    """The free drift reading: fresh rows against stored ones."""
    stored_audio, stored_text = known.rows(pairs.entry)
    return {
        "rdm_audio": ask.batch_drift(pairs.audio, stored_audio, temperature),
        "rdm_text": ask.batch_drift(pairs.text, stored_text, temperature),
    }


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where it is asked for, or where `auto` finds a GPU that has it."""
    can = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bfloat16" or (precision == "auto" and can):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not biases, norms or the temperature."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def make_scheduler(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over `warmup` steps, then a cosine to zero at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
