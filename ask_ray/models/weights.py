"""Published weights: read without running anything that a file may hold, loaded only if they fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class WeightsError(ValueError):
    """Published weights that cannot be read or do not fit. The message names them and what to do."""


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinite values, or None."""
    return next((name for name, of in state.items() if of.is_floating_point() and not bool(torch.isfinite(of).all())), None)


def load_tensors(path: str | Path, setting: str = "model.audio_weights") -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a PyTorch checkpoint (.pth, .pt, .bin), on the CPU.

    Checkpoints are unpickled with ``weights_only``, which refuses code. One that keeps its tensors under `model` or
    `state_dict` is unwrapped.

    Raises:
        WeightsError: if the file is missing, of another kind, damaged or unsafe; `setting` is what named it.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{setting}: {path} is not a file; download the weights and give the file's path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in (".pth", ".pt", ".bin"):
            raise WeightsError(f"{setting}: {path} is no weights file; give a .safetensors, .pth, .pt or .bin file")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, BadZipFile, KeyError) as error:
        raise WeightsError(
            f"{setting}: {path} cannot be read as plain tensors ({_first_line(error)}); download it again, "
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


def _first_line(error: Exception) -> str:
    """What went wrong, without the advice PyTorch appends about loading the file unsafely."""
    return (str(error).splitlines() or [type(error).__name__])[0]
