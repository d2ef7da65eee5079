"""Names in the settings to towers, and the dual encoder they make."""

from __future__ import annotations

from ask_ray.config import HF, ModelSettings, SettingsError
from ask_ray.data.frontend import TINY_MEL
from ask_ray.modality import Modality
from ask_ray.models import ced, text_towers
from ask_ray.models.audio_towers import AudioTower, ResNet38, TinyAudio
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.models.hf_audio import HfAudio
from ask_ray.models.hf_image import HfImage
from ask_ray.models.image_towers import ImageTower, TinyImage
from ask_ray.models.text_towers import TextTower, TinyText
from ask_ray.models.weights import fit, load_tensors, published_tensors


def _resnet38(model: ModelSettings, read: bool) -> AudioTower:
    weights = model.audio_weights
    tower = ResNet38(model.width if weights is None else 1.0, model.freq_mask, model.time_mask)
    if weights is not None and read:
        fit(tower, load_tensors(weights), ResNet38.IGNORE, f"model.audio_weights: {weights}")
    return tower


def _ced(model: ModelSettings, read: bool) -> AudioTower:
    weights = model.audio_weights
    width = model.width if weights is None else 1.0
    tower = ced.Ced(model.audio.removeprefix("ced-"), width, model.freq_mask, model.time_mask)
    if weights is not None and read:
        fit(tower, ced.published_names(published_tensors(weights)), ced.Ced.IGNORE, f"model.audio_weights: {weights}")
    return tower


def audio_tower(model: ModelSettings, sample_rate: int, read: bool = True) -> AudioTower:
    """The tower that `model.audio` names, for waveforms of `sample_rate` Hz; `read` and errors as for :func:`build`."""
    if model.audio == "tiny":
        _no_weights("audio", model.audio, model.audio_weights)
        return TinyAudio(sample_rate, model.width, model.dropout, model.freq_mask, model.time_mask)
    if model.audio.startswith(HF):
        _no_weights("audio", model.audio, model.audio_weights)
        tower: AudioTower = HfAudio(model.audio.removeprefix(HF), model.audio_pooling)
    else:
        tower = (_resnet38 if model.audio == "resnet38" else _ced)(model, read)
    if tower.sample_rate != sample_rate:
        raise SettingsError(
            f"data.sample_rate is {sample_rate} but model.audio={model.audio} hears {tower.sample_rate} Hz: "
            f"set data.sample_rate={tower.sample_rate} and prepare the corpus again"
        )
    return tower


def image_tower(model: ModelSettings) -> ImageTower:
    """The tower that `model.image` names; errors as for :func:`build`."""
    if model.image == "tiny":
        return TinyImage(model.width, model.dropout, model.image_crop)
    return HfImage(model.image.removeprefix(HF), model.image_pooling, model.image_crop)


def text_tower(model: ModelSettings) -> TextTower:
    """The tower that `model.text` names; errors as for :func:`build`."""
    if model.text == "tiny":
        _no_weights("text", model.text, model.text_weights)
        return TinyText(model.width, model.dropout, model.max_words)
    if model.text.startswith(HF):
        _no_weights("text", model.text, model.text_weights)
        return text_towers.any_text(model.text.removeprefix(HF), model.text_pooling, model.max_words)
    if model.text_weights is None:
        return text_towers.from_scratch(model.text, model.width, model.max_words)
    return text_towers.published(model.text, model.text_weights, model.max_words, model.language)


def _no_weights(side: str, name: str, weights: str | None) -> None:
    if weights is not None:
        why = "names its weights itself" if name.startswith(HF) else "has no published weights"
        raise SettingsError(f"model.{side}_weights is {weights}, but model.{side}={name} {why}: unset one of them")


def build(model: ModelSettings, sample_rate: int | None, read: bool = True) -> DualEncoder:
    """The dual encoder of these settings, in training mode on the CPU; seed PyTorch first to repeat its weights.

    Args:
        model: names, sizes and weights of the towers.
        sample_rate: Hz of the waveforms it will be given; None: it will be given pictures.
        read: whether to read the audio tower's published file, `model.audio_weights`; it need not be there for a model whose
            weights a checkpoint holds.

    Raises:
        SettingsError: if settings contradict each other; the message names the field and the fix.
        WeightsError: if published weights cannot be read or do not fit.
    """
    if model.freq_mask > TINY_MEL.mels:
        raise SettingsError(f"model.freq_mask is {model.freq_mask} but features have {TINY_MEL.mels} mels: lower it")
    modality: Modality = "image" if sample_rate is None else "audio"
    _check_read(model, modality)
    tower = image_tower(model) if sample_rate is None else audio_tower(model, sample_rate, read)
    text, widths = text_tower(model), None
    if model.interaction == "late":
        widths = _tokens(modality, model.tower(modality), tower.token_width), _tokens("text", model.text, text.token_width)
    return DualEncoder(tower, text, model.dim, model.dropout, model.temperature, widths)


def _check_read(model: ModelSettings, modality: Modality) -> None:
    """Refuse settings that were changed and that the chosen towers do not read."""
    towers = {modality: model.tower(modality), "text": model.text}
    read_by = {f"{side}_pooling": (side, name.startswith(HF), f"{HF} towers") for side, name in towers.items()}
    read_by["language"] = ("text", model.text == "sonar", "sonar")
    for setting, (side, is_read, readers) in read_by.items():
        value, default = getattr(model, setting), ModelSettings.model_fields[setting].default
        if not is_read and value != default:
            raise SettingsError(
                f"model.{setting} is {value}, but model.{side}={towers[side]} does not read it ({readers} do): leave it {default}"
            )


def _tokens(side: str, name: str, width: int | None) -> int:
    """The width of a tower's tokens."""
    if width is None:
        raise SettingsError(
            f"model.interaction is late, but model.{side}={name} gives one vector for all of its input and no tokens: set "
            f"model.interaction=cosine, or choose another model.{side}"
        )
    return width
