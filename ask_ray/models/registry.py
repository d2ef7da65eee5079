"""Names in the settings to towers, and the dual encoder they make."""

from __future__ import annotations

from collections.abc import Callable

from ask_ray.config import ModelSettings, SettingsError
from ask_ray.data.frontend import PANNS_MEL, TINY_MEL
from ask_ray.models.audio_towers import AudioTower, ResNet38, TinyAudio
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.models.text_towers import Bert, TextTower, TinyText
from ask_ray.models.weights import fit, load_tensors


def _tiny_audio(model: ModelSettings, sample_rate: int) -> AudioTower:
    if model.audio_weights is not None:
        raise SettingsError("model.audio_weights: the tiny audio tower has no published weights; set model.audio")
    return TinyAudio(sample_rate, model.width, model.dropout, model.freq_mask, model.time_mask)


def _resnet38(model: ModelSettings, sample_rate: int) -> AudioTower:
    if sample_rate != PANNS_MEL.sample_rate:
        raise SettingsError(
            f"data.sample_rate is {sample_rate} but model.audio=resnet38 hears {PANNS_MEL.sample_rate} Hz: "
            f"set data.sample_rate={PANNS_MEL.sample_rate} and prepare the corpus again"
        )
    if model.audio_weights is None:
        return ResNet38(model.width, model.freq_mask, model.time_mask)
    tower = ResNet38(1.0, model.freq_mask, model.time_mask)
    fit(tower, load_tensors(model.audio_weights), ResNet38.IGNORE, f"model.audio_weights: {model.audio_weights}")
    return tower


def _tiny_text(model: ModelSettings) -> TextTower:
    if model.text_weights is not None:
        raise SettingsError("model.text_weights: the tiny text tower has no published weights; set model.text")
    return TinyText(model.width, model.dropout, model.max_words)


def _bert(model: ModelSettings) -> TextTower:
    return Bert(model.text_weights, model.width, model.max_words)


#: Audio towers by the name that `model.audio` gives: settings and the corpus's rate in Hz to a tower.
AUDIO_TOWERS: dict[str, Callable[[ModelSettings, int], AudioTower]] = {"tiny": _tiny_audio, "resnet38": _resnet38}

#: Text towers by the name that `model.text` gives.
TEXT_TOWERS: dict[str, Callable[[ModelSettings], TextTower]] = {"tiny": _tiny_text, "bert": _bert}


def build(model: ModelSettings, sample_rate: int) -> DualEncoder:
    """The dual encoder of these settings, in training mode on the CPU; seed PyTorch first to repeat its weights.

    Args:
        model: names, sizes and weights of the towers.
        sample_rate: Hz of the waveforms it will be given.

    Raises:
        SettingsError: if settings contradict each other; the message names the field and the fix.
        WeightsError: if published weights cannot be read or do not fit.
    """
    if model.freq_mask > TINY_MEL.mels:
        raise SettingsError(f"model.freq_mask is {model.freq_mask} but features have {TINY_MEL.mels} mels: lower it")
    audio = AUDIO_TOWERS[model.audio](model, sample_rate)
    text = TEXT_TOWERS[model.text](model)
    return DualEncoder(audio, text, model.dim, model.dropout, model.temperature)
