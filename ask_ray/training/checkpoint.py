"""Checkpoints as plain files: safetensors and JSON, nothing that runs code when it is opened.

``model.safetensors`` · ``optimizer.safetensors`` · ``random.safetensors`` (states of each rank) · ``memory.safetensors`` (the
cross-batch memory, the corrected entries and the drift read since the last decision, where there are any) · ``state.json``
(where the run stands, scheduler, optimizer groups) · ``settings.yaml``.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, Result
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ask_ray import config, scratch
from ask_ray.config import Settings, UserError
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.storage import Folder, StorageError, Tell, digest_file, patiently

PREFIX = "checkpoint_"

#: Ray Train's list of them.
CHECKPOINTS = "checkpoint_manager_snapshot.json"
MEMORY = "memory.safetensors"

#: What the folders of checkpoints on their way are called.
STAGING = "checkpoints"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing or damaged. The message names the folder and what to do."""


@dataclass(frozen=True)
class Place:
    """Where a run stands.

    epoch, batch: whole epochs done, and steps done in the one begun; steps: of an epoch, by the number of workers; step: steps
    done in all; knowledge_version: in use, 0 for none; corpus: the prepared corpus; asked: step of the last refresh asked for,
    None before the first; start: the step where the run began, of a fork that of its first checkpoint; seconds: spent training.
    """

    epoch: int
    step: int
    knowledge_version: int
    corpus: str
    batch: int = 0
    steps: int = 0
    asked: int | None = None
    start: int = 0
    seconds: float = 0.0

    def among(self, steps: int) -> Place:
        """The same share of an epoch that has so many steps."""
        return replace(self, batch=self.batch * steps // (self.steps or steps), steps=steps)


def save(
    folder: Path,
    place: Place,
    settings: Settings,
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    random_states: list[dict[str, Tensor]],
    memory: dict[str, Tensor],
) -> None:
    """Write a checkpoint into an empty local folder."""
    held = optimizer.state_dict()
    tensors = {f"{parameter}.{name}": value.contiguous() for parameter, of in held["state"].items() for name, value in of.items()}
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    save_file(tensors, folder / "optimizer.safetensors")
    states = {f"rank{rank}.{name}": state for rank, of in enumerate(random_states) for name, state in of.items()}
    save_file(states, folder / "random.safetensors")
    if memory:
        save_file({name: value.contiguous() for name, value in memory.items()}, folder / MEMORY)
    (folder / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    digests = {file.name: digest_file(file) for file in sorted(folder.glob("*.safetensors"))}
    told = {"place": asdict(place), "digests": digests}
    state = {**told, "groups": held["param_groups"], "scheduler": _plain(scheduler.state_dict())}
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a scheduler's state is data; its functions are made anew from the settings."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"}


def place_of(folder: Path) -> Place:
    """Where the run stood.

    Raises:
        CheckpointError: if the folder is no checkpoint.
    """
    try:
        return Place(**json.loads((folder / "state.json").read_text(encoding="utf-8"))["place"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no whole checkpoint ({error}); choose another run or checkpoint") from error


def restore(
    folder: Path,
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    rank: int,
    fork: bool = False,
) -> Place:
    """Put everything back as :func:`save` found it and return where the run stood. Tensors go where the model's are.

    Random states are restored for the ranks that saved one; a rank that is new keeps the state it was seeded with. A `fork`
    takes up the optimizer's moments alone: its rates are of its own settings.

    Raises:
        CheckpointError: if files are missing or damaged.
    """
    place = place_of(folder)
    with _whole(folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        model.load_state_dict(_tensors(folder, "model.safetensors"))
        held: dict[int, dict[str, Tensor]] = {}
        for key, value in _tensors(folder, "optimizer.safetensors").items():
            parameter, name = key.split(".", 1)
            held.setdefault(int(parameter), {})[name] = value
        groups = optimizer.state_dict()["param_groups"] if fork else state["groups"]
        optimizer.load_state_dict({"state": held, "param_groups": groups})
        if not fork:
            scheduler.load_state_dict({**scheduler.state_dict(), **state["scheduler"]})
        states = _tensors(folder, "random.safetensors")
        own = {name.split(".", 1)[1]: state for name, state in states.items() if name.startswith(f"rank{rank}.")}
        if own:
            set_random_state(own)
    return place


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A file of tensors by name.

    Raises:
        ValueError: if it is not the one that was saved.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    saved = state.get("digests", {}).get(name)  # checkpoints of before have none
    if saved is not None and digest_file(folder / name) != saved:
        raise ValueError(f"{name} is not what was saved: its digest is another")
    return load_file(folder / name)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """What reading a missing or damaged file raises, as a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({error}); choose another run or checkpoint") from error


def memory(folder: Path) -> dict[str, Tensor]:
    """What :func:`save` was given as memory; empty if nothing.

    Raises:
        CheckpointError: if the file is damaged.
    """
    if not (folder / MEMORY).exists():
        return {}
    with _whole(folder):
        return _tensors(folder, MEMORY)


def random_state() -> dict[str, Tensor]:
    """PyTorch's generator states of this process, (n,) uint8: `cpu`, and `cuda` if it uses a GPU. Data order and augmentation
    of waveforms need none: they follow from seed, epoch and step."""
    on_gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int, rank: int) -> None:
    """Seed all generators of this process; ranks get different ones for dropout and augmentation."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 (for libraries that use the global one)
    torch.manual_seed(mixed)


def open_model(folder: Path) -> tuple[DualEncoder, Settings, Place]:
    """The model of a checkpoint, in evaluation mode on the CPU, with its settings.

    Raises:
        CheckpointError: if files are missing or damaged.
    """
    place = place_of(folder)
    with _whole(folder):
        document = (folder / "settings.yaml").read_text(encoding="utf-8")
    settings = config.load(document, str(folder / "settings.yaml"))
    model = registry.build(settings.model, settings.data.form.sample_rate, read=False)
    with _whole(folder):
        model.load_state_dict(_tensors(folder, "model.safetensors"))
    return model.eval(), settings, place


def read_settings(run: Folder) -> tuple[Settings, Place]:
    """The settings of a run's newest checkpoint and where it stood, without its weights.

    Raises:
        CheckpointError: if it has none, or one that is damaged.
    """
    saved = run / newest_name(run)
    try:
        place = Place(**saved.read_json("state.json")["place"])
        document = saved.read("settings.yaml").decode()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{saved}: no whole checkpoint ({error}); choose another run or checkpoint") from error
    return config.load(document, str(saved / "settings.yaml")), place


@contextlib.contextmanager
def newest(run: Folder, below: float = math.inf) -> Iterator[Path]:
    """The newest whole checkpoint of a run that has done fewer than `below` epochs, as a local folder.

    Raises:
        CheckpointError: if the run has none.
    """
    filesystem, path = run.resolve()
    with Checkpoint(f"{path}/{newest_name(run, below)}", filesystem).as_directory() as folder:
        yield Path(folder)


def newest_name(run: Folder, below: float = math.inf) -> str:
    """The name of the folder of that checkpoint, in the run's.

    Raises:
        CheckpointError: if the run has none.
    """
    try:
        filesystem, path = run.resolve()
        kept = Result.from_path(path, filesystem).best_checkpoints or []
    except Exception as error:  # what Ray raises for a damaged snapshot, or one of another version, has no public name
        raise CheckpointError(f"{run}: not a run's folder ({error}); give <storage>/<name> of a run") from error
    found = [saved for saved, metrics in kept if metrics.get("epoch", 0) < below]  # in the order they were saved
    if not found:
        wanted = "yet; wait for its first epoch" if below == math.inf else f"of fewer than {below} epochs"
        raise CheckpointError(f"{run}: the run has no checkpoint {wanted}")
    return PurePosixPath(found[-1].path).name


def has_any(run: Folder, below: float = math.inf) -> bool:
    """Whether a run has a checkpoint of fewer than `below` epochs."""
    try:
        newest_name(run, below)
    except CheckpointError:
        return False
    return True


def staging() -> Path:
    """The local folder of this process for checkpoints on their way to or from storage. It is the process's alone, and
    :func:`tidy` leaves it as long as the process lives."""
    made = _staging()
    if not made.is_dir():  # systems clear their temporary folder of what is old
        _staging.cache_clear()
        made = _staging()
    return made


@lru_cache(maxsize=1)
def _staging() -> Path:
    return scratch.make(STAGING)[0]  # held until the process ends


def tidy() -> None:
    """Remove from this node the checkpoints that were on their way when their process was ended."""
    scratch.tidy(STAGING)


def uploading(run: Folder, tell: Tell) -> Callable[[Checkpoint, str], Checkpoint]:
    """How Ray Train's worker copies a checkpoint to the run's folder: as it does by itself, but :func:`patiently`."""

    def upload(saved: Checkpoint, name: str) -> Checkpoint:
        def copy() -> Checkpoint:
            try:
                copied: Checkpoint = ray.train.get_context().get_storage().persist_current_checkpoint(saved, name)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise StorageError(f"{run / name}: {error}") from error
            return copied

        return patiently(copy, tell)

    return upload


@contextlib.contextmanager
def fetched(saved: Folder, tell: Tell) -> Iterator[Path]:
    """A checkpoint as a local folder, as long as the context lasts; from remote storage a copy, made :func:`patiently`.

    Each process makes its own. What :meth:`ray.train.Checkpoint.as_directory` shares between those of a node, it also shares
    when it could not be fetched whole.
    """
    if saved.local is not None:
        yield saved.local
        return
    with tempfile.TemporaryDirectory(dir=staging()) as made:
        patiently(lambda: saved.download(Path(made)), tell)
        yield Path(made)


def pinned_versions(run: Folder) -> list[int]:
    """The knowledge-base versions that the run's checkpoints name; one that is being written or removed meanwhile names none."""
    found = set()
    for name in run.names():
        if name.startswith(PREFIX) and (run / name).exists("state.json"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.add(int((run / name).read_json("state.json")["place"]["knowledge_version"]))
    return sorted(found - {0})
