"""Models of the transformers library: read from safetensors, never by code that comes with them, and made trainable.

Data-parallel training needs a gradient for every parameter in every step. So layers are never dropped at random, and
parameters that the tower's vectors do not depend on (a pooler beside a mean, a mask token) are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ask_ray.config import SettingsError
from ask_ray.models.pooling import Encoded, masked_max, masked_mean
from ask_ray.models.weights import WeightsError, few, first_line, folder_of

if TYPE_CHECKING:
    from transformers import (
        BaseImageProcessor,
        FeatureExtractionMixin,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

# transformers takes seconds to import, which every Ray worker would pay: only what builds such a tower imports it.

#: Shares of layers dropped at random in training, by the names that configurations give them.
LAYER_DROPS = ("layerdrop", "encoder_layerdrop")


class Origin(NamedTuple):
    """Where published weights come from: the setting that names them, their path or hub id, and their local folder."""

    setting: str
    name: str
    folder: Path

    @classmethod
    def of(cls, name: str, setting: str) -> Origin:
        """The origin of a local folder or a model on the hub.

        Raises:
            WeightsError: if there is neither.
        """
        return cls(setting, name, folder_of(name, setting))

    def __str__(self) -> str:
        return f"{self.setting}: {self.name}"


def read_config(origin: Origin) -> PretrainedConfig:
    """The model's configuration, with layers that are never dropped.

    Raises:
        WeightsError: if it is missing, damaged or of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    config = _read(AutoConfig.from_pretrained, origin)
    for name in LAYER_DROPS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def read_tokenizer(origin: Origin) -> PreTrainedTokenizerBase:
    """The model's tokeniser, padding after the words.

    Raises:
        WeightsError: if it is missing or damaged.
    """
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer.from_pretrained, origin)
    tokenizer.padding_side = "right"
    return tokenizer


def read_extractor(origin: Origin) -> FeatureExtractionMixin:
    """The model's feature extractor.

    Raises:
        WeightsError: if it is missing, damaged or of no audio model.
    """
    from transformers import AutoFeatureExtractor

    return _read(AutoFeatureExtractor.from_pretrained, origin)


def read_processor(origin: Origin) -> BaseImageProcessor:
    """The model's image processor.

    Raises:
        WeightsError: if it is missing, damaged or of no vision model.
    """
    from transformers import AutoImageProcessor

    return _read(AutoImageProcessor.from_pretrained, origin)


def read_model(
    kind: Any, config: PretrainedConfig, origin: Origin, tower: str, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """What encodes one modality, in float32 and evaluation mode, and the names that its weights lack or have in other shapes.

    Args:
        kind: the class to read; of a model of two towers, the one named `tower` is taken, of two stacks, the encoder.

    Raises:
        WeightsError: if the weights cannot be read.
    """
    whole, report = _read(
        kind.from_pretrained,
        origin,
        config=config,
        use_safetensors=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    two_stacks = whole.config.is_encoder_decoder and hasattr(whole, "decoder")
    part = getattr(whole, tower) if hasattr(whole, tower) else whole.get_encoder() if two_stacks else whole
    path = next(name for name, module in whole.named_modules() if module is part)
    lacking = dict.fromkeys(report["missing_keys"], "")
    lacking |= {name: f" {tuple(there)} instead of {tuple(here)}" for name, there, here in report["mismatched_keys"]}
    own = {name: f"{path}.{name}" if path else name for name in part.state_dict()}
    return part, [name + lacking[full] for name, full in sorted(own.items()) if full in lacking]


def _read(reader: Callable[..., Any], origin: Origin, **options: Any) -> Any:
    """What `reader` makes of the folder; whatever is wrong with it is told by its setting."""
    try:
        with _quiet():
            return reader(origin.folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise WeightsError(
            f"{origin} could not be loaded ({first_line(error)}); give a local folder with config.json, model.safetensors and "
            "the files of its tokeniser, feature extractor or image processor"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and progress bars of transformers: what matters of them is told by errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def settled(model: nn.Module, encode: Callable[[], Encoded], lacking: list[str], origin: Origin, needed: str) -> Encoded:
    """What `encode` makes of a probe with `model`; what the vectors do not depend on is frozen.

    Args:
        needed: the kind of model that would do.

    Raises:
        WeightsError: if the model takes no such probe; if the vectors depend on weights that are `lacking`, naming the first
            of them, or are others each time.
        SettingsError: if it cannot be pooled as the settings say.
    """
    try:
        with torch.enable_grad():
            probe, again = encode(), encode()
    except SettingsError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        name = type(model).__name__
        raise WeightsError(f"{origin}: {name} gives no features ({first_line(error)}); give {needed}") from error
    if not torch.allclose(probe.vectors, again.vectors, atol=1e-4):
        raise WeightsError(
            f"{origin}: {type(model).__name__} makes other features of the same input each time, though it is not training (a "
            "masked autoencoder leaves parts out at random): give a model that does not"
        )
    reached = {id(parameter) for parameter in _leaves(probe.vectors)}
    idle = set()
    for name, parameter in model.named_parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)
            idle.add(name)
    lacking = [told for told in lacking if told.partition(" ")[0] not in idle]
    if lacking:
        raise WeightsError(
            f"{origin} does not fit {type(model).__name__}: {len(lacking)} missing or differently shaped: {few(lacking)}. "
            "Give this model's weights"
        )
    return probe


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a computation read."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [before for before, _ in node.next_functions]


def pooled(output: Any, mask: Tensor | None, pooling: str) -> Tensor:
    """One vector of each row of a model's output.

    Args:
        output: what a transformers model gave; its `last_hidden_state` is (B, L, C), or (B, C, …) where it is a picture.
        mask: (B, L) bool, true where positions count; None: all do.
        pooling: `mean` or `max` over these, `first`, the vector of the first, or `pooler`, the model's own `pooler_output`.

    Raises:
        SettingsError: if the model has no `pooler_output`, or nothing else.
    """
    if pooling == "pooler":
        if getattr(output, "pooler_output", None) is None:
            raise SettingsError(
                "model.audio_pooling, model.image_pooling, model.text_pooling: the model pools nothing itself; choose mean, max "
                "or first"
            )
        return output.pooler_output.flatten(1)
    states = states_of(output)
    if states is None:
        raise SettingsError(
            "model.audio_pooling, model.image_pooling, model.text_pooling: the model gives its own pooled output alone; choose "
            "pooler"
        )
    if pooling == "first":
        return states[:, 0]
    inside = mask if mask is not None else states.new_ones(states.shape[:2], dtype=torch.bool)
    return masked_mean(states, inside) if pooling == "mean" else masked_max(states, inside)


def states_of(output: Any) -> Tensor | None:
    """A model's `last_hidden_state` as (B, L, C), also where it is a picture; None if it gives none."""
    states = getattr(output, "last_hidden_state", None)
    return states.flatten(2).transpose(1, 2) if states is not None and states.ndim > 3 else states
