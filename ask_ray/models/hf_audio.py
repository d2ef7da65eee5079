"""Any audio model of the transformers library as a tower, with its own feature extractor."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.models.audio_towers import AudioTower
from ask_ray.models.pooling import Encoded
from ask_ray.models.pretrained import Origin, pooled, read_config, read_extractor, read_model, settled, states_of
from ask_ray.models.weights import WeightsError

if TYPE_CHECKING:
    from transformers import FeatureExtractionMixin

#: Seconds to which shorter clips are lengthened with silence: below, some models have no frame.
LEAST_SECONDS = 0.5


class HfAudio(AudioTower):
    """A transformers audio model (AST, wav2vec2, CLAP's audio tower, Whisper's encoder, …) from a folder or the hub.

    Features are made clip by clip on the CPU, and clips are computed together only where their features have one shape:
    some of these models hear padding even where it is masked. A clip longer than the model's window is split evenly,
    and its vector is the mean of its pieces'. Augmentation in training is the model's own, as its configuration says.
    """

    def __init__(self, name: str, pooling: str) -> None:
        """`name` is a local folder or hub id; for `pooling` see :func:`ask_ray.models.pretrained.pooled`.

        Raises:
            WeightsError: if the model cannot be had, or is none of audio.
            SettingsError: if it cannot be pooled so.
        """
        from transformers import AutoModel

        super().__init__()
        origin = Origin.of(name, "model.audio")
        self.pooling = pooling
        self.extractor = read_extractor(origin)
        if not hasattr(self.extractor, "sampling_rate"):
            raise WeightsError(f"{origin} is no audio model: its {type(self.extractor).__name__} takes no sampling rate")
        self.sample_rate = int(self.extractor.sampling_rate)
        self.window = window(self.extractor)
        self.model, lacking = read_model(AutoModel, read_config(origin), origin, "audio_model")
        least = round(LEAST_SECONDS * self.sample_rate)
        self.eval()
        silence = torch.zeros(1, least), torch.tensor([least])
        probe = settled(self.model, lambda: self.encode(*silence), lacking, origin, "an audio model that takes one clip")
        self.width = probe.vectors.shape[1]
        self.token_width = None if probe.tokens is None else probe.tokens.shape[2]
        self.train()

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Encoded:
        """See :meth:`AudioTower.encode`. A split clip has the tokens of all its pieces."""
        heard = self._heard(waveforms, lengths)
        vectors = torch.stack([torch.stack([vector for vector, _ in own]).mean(0) for own in heard])
        states = [[state for _, state in own if state is not None] for own in heard]
        if not states[0]:
            return Encoded(vectors, None, None)
        tokens = [torch.cat(own) for own in states]
        mask = [state.new_ones(len(state), dtype=torch.bool) for state in tokens]
        return Encoded(vectors, *(nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (tokens, mask)))

    def _heard(self, waveforms: Tensor, lengths: Tensor) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Of each clip's pieces the vector (width,) and the states (L, token_width)."""
        clips = waveforms.detach().float().cpu()
        pieces = [
            pieces_of(clip[:length], self.window, self.sample_rate) for clip, length in zip(clips, lengths.tolist(), strict=True)
        ]
        made = iter(self._encode([part for parts in pieces for part in parts], waveforms.device))
        return [list(islice(made, len(parts))) for parts in pieces]

    def _encode(self, parts: list[Tensor], device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
        """The same of each waveform of at most a window."""
        features = [self._features(part.numpy()) for part in parts]
        alike: dict[tuple[torch.Size, ...], list[int]] = defaultdict(list)
        for place, found in enumerate(features):
            alike[tuple(tensor.shape for tensor in found.values())].append(place)
        rows: dict[int, tuple[Tensor, Tensor | None]] = {}
        for places in alike.values():
            inputs = {key: torch.cat([features[place][key] for place in places]).to(device) for key in features[places[0]]}
            made = self.model(**inputs)
            states = states_of(made)
            each = [None] * len(places) if states is None else states
            rows.update(zip(places, zip(pooled(made, None, self.pooling), each, strict=True), strict=True))
        return [rows[place] for place in range(len(parts))]

    def _features(self, wave: np.ndarray) -> dict[str, Tensor]:
        """The model's inputs for one waveform, each with a batch axis of one."""
        # Reduced precision would round away quiet bands, so an enclosing autocast does not reach in here.
        with torch.autocast("cpu", enabled=False):
            made = self.extractor(wave, sampling_rate=self.sample_rate, return_tensors="pt")
        found = {key: value.float() if value.is_floating_point() else value for key, value in made.items()}
        if "is_longer" in found:  # CLAP's extractor marks one at random; pieces of at most a window never are
            found["is_longer"] = torch.zeros_like(found["is_longer"])
        return found


def window(extractor: FeatureExtractionMixin) -> int | None:
    """Samples that a feature extractor takes before it cuts them off; None: any number."""
    from transformers import ASTFeatureExtractor, ClapFeatureExtractor, WhisperFeatureExtractor

    if isinstance(extractor, ClapFeatureExtractor):
        return int(extractor.nb_max_samples)
    if isinstance(extractor, WhisperFeatureExtractor):
        return int(extractor.n_samples)
    if isinstance(extractor, ASTFeatureExtractor):  # frames of 25 ms, one every 10 ms
        return extractor.sampling_rate * (10 * (extractor.max_length - 1) + 25) // 1000
    return None


def pieces_of(clip: Tensor, window: int | None, rate: int) -> list[Tensor]:
    """A waveform (S,) lengthened to half a second and split into the fewest nearly equal pieces of at most `window`."""
    clip = functional.pad(clip, (0, max(0, round(LEAST_SECONDS * rate) - len(clip))))
    count = 1 if window is None else -(-len(clip) // window)
    return list(clip.tensor_split(count))
