"""Published weights: read without running anything that a file may hold, loaded only if they fit."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ask_ray.config import SettingsError
from ask_ray.storage import expanded, is_file, is_folder

#: Endings of PyTorch's own checkpoints.
CHECKPOINTS = (".pth", ".pt", ".bin")
#: What a model on the Hugging Face hub is called.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
#: The files of a model that are read: never code, pickles, or other frameworks' weights.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
#: Seconds that the hub may take to say whether it has a model.
HUB_PATIENCE = 5.0


class WeightsError(SettingsError):
    """Published weights that cannot be read or do not fit. The message names them and what to do."""


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinite values, or None."""
    return next((name for name, of in state.items() if of.is_floating_point() and not bool(torch.isfinite(of).all())), None)


def folder_of(weights: str, setting: str) -> Path:
    """The local folder of published weights: `weights` itself, or its copy of a model on the Hugging Face hub.

    Where the hub does not answer, the copy made before is taken.

    Raises:
        WeightsError: if there is neither; `setting` is what named them.
    """
    folder = expanded(weights)
    if is_folder(folder):
        return folder
    if not HUB_ID.fullmatch(weights):
        raise WeightsError(f"{setting}: {weights} is neither a folder nor the id of a model on the hub; give a local folder")
    from huggingface_hub.errors import HTTPError  # takes a second to import, which every Ray worker would pay

    try:
        return _from_hub(weights)
    except (HTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"{setting}: {weights} is no folder, and could not be had from the hub ({first_line(error)}); where the hub "
            "cannot be reached, give a local folder with the model's config.json and safetensors (and a tokeniser's files)"
        ) from error


def _from_hub(name: str) -> Path:
    """The newest version of a model, or the copy made before where the hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(name, timeout=HUB_PATIENCE)
    except (HTTPError, OfflineModeIsEnabled):
        with contextlib.suppress(OSError, ValueError):
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
        raise
    return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))


def published_tensors(weights: str, setting: str = "model.audio_weights") -> dict[str, Tensor]:
    """Tensors by name of a file, of a local folder's `model.safetensors` or `pytorch_model.bin`, or of a model on the hub.

    Raises:
        WeightsError: as :func:`load_tensors` and :func:`folder_of`.
    """
    path = expanded(weights)
    if is_file(path) or path.suffix in CHECKPOINTS:
        return load_tensors(path, setting)
    folder = folder_of(weights, setting)
    names = ("model.safetensors", "pytorch_model.bin")
    found = [folder / name for name in names if is_file(folder / name)]
    if not found:
        raise WeightsError(f"{setting}: {folder} holds neither {' nor '.join(names)}; give the folder of published weights")
    return load_tensors(found[0], setting)


def load_tensors(path: str | Path, setting: str = "model.audio_weights") -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a PyTorch checkpoint (.pth, .pt, .bin), on the CPU.

    Checkpoints are unpickled with ``weights_only``, which refuses code. One that keeps its tensors under `model` or
    `state_dict` is unwrapped.

    Raises:
        WeightsError: if the file is missing, of another kind, damaged or unsafe; `setting` is what named it.
    """
    path = expanded(path)
    if not is_file(path):
        raise WeightsError(f"{setting}: {path} is not a file; download the weights and give the file's path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in CHECKPOINTS:
            raise WeightsError(f"{setting}: {path} is no weights file; give a .safetensors, .pth, .pt or .bin file")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, BadZipFile, KeyError) as error:
        raise WeightsError(
            f"{setting}: {path} cannot be read as plain tensors ({first_line(error)}); download it again, "
            "or convert it to .safetensors if it comes from a source you trust"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{setting}: {path} holds something else than tensors by name; give a state dict")
    return dict(found)


def fit(module: nn.Module, tensors: Mapping[str, Tensor], ignore: Sequence[str], origin: str) -> None:
    """Load `tensors` into `module`, leaving out names that start with one of `ignore` on either side.

    Raises:
        WeightsError: unless every other name is on both sides with the same shape; `origin` says where they came from.
    """
    skip = tuple(ignore)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(skip)}
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(skip)}
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "differently shaped": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in sorted(given.keys() & wanted.keys())
            if given[name].shape != wanted[name].shape
        ],
    }
    if any(problems.values()):
        rows = [f"{len(names)} {what}: {few(names)}" for what, names in problems.items() if names]
        raise WeightsError(f"{origin} does not fit {type(module).__name__}: {'; '.join(rows)}. Give this tower's weights")
    module.load_state_dict(given, strict=False)


def few(names: Sequence[str], most: int = 4) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries append, such as PyTorch's on loading the file unsafely."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
