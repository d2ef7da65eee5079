"""Zero-shot classification: prompts averaged, accuracy against scikit-learn, clips heard one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score, top_k_accuracy_score
from torch.nn import functional

from ask_ray.config import Settings, SettingsError, load
from ask_ray.data import audio
from ask_ray.data import esc50 as layout
from ask_ray.data.schema import usable_waveform
from ask_ray.method import interaction
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder
from ask_ray.training import classification
from ask_ray.training.classification import Heard

CPU, RATE = torch.device("cpu"), 8000


@pytest.fixture(scope="module")
def settings() -> Settings:
    small = {"model": {"width": 0.1, "dim": 16}, "data": {"sample_rate": RATE, "max_seconds": 0.4}}
    return load({**small, "knowledge": {"pool": {"batch_size": 4}}})


@pytest.fixture(scope="module")
def model(settings) -> DualEncoder:
    torch.manual_seed(0)
    return registry.build(settings.model, RATE).eval()


def test_clips_are_heard_as_one_by_one_and_what_cannot_be_decoded_is_listed(model, settings, esc50: Path):
    listed = layout.read(str(esc50), "--path")
    heard = classification.hear(model, listed.clips, settings, CPU)
    assert heard.categories == ["dog", "dog", "church_bells", "church_bells", "water_drops", "water_drops"]
    assert [(one.id, one.reason) for one in heard.aside] == [("cut.wav", "unreadable"), ("gone.wav", "missing file")]
    for row, clip in zip(heard.audio, listed.clips, strict=False):
        samples = usable_waveform(audio.load(clip.path, RATE).samples, RATE, 0.1)[: round(0.4 * RATE)]
        waveform = torch.from_numpy(samples.astype(np.float32) / 32768)[None]
        with torch.inference_mode():
            alone = model.encode_audio(waveform, torch.tensor([waveform.shape[1]]))[0]
        torch.testing.assert_close(row, alone, atol=2e-3, rtol=0)  # a recording that is read in part is resampled in part


def test_nothing_that_can_be_heard_is_no_clips(model, settings, esc50: Path):
    heard = classification.hear(model, layout.read(str(esc50), "--path").clips[-2:], settings, CPU)
    assert (heard.categories, heard.audio.shape, len(heard.aside)) == ([], (0, 16), 2)


def test_a_class_is_the_mean_of_its_prompts_with_spaces_for_underscores(model):
    made = classification.class_vectors(model, ["dog", "church_bells"], ["the sound of {}", "{}!"], CPU)
    for row, name in zip(made, ("dog", "church bells"), strict=True):
        with torch.inference_mode():
            prompts = [model.encode_text(*model.tokenise([text]))[0] for text in (f"the sound of {name}", f"{name}!")]
        torch.testing.assert_close(row, functional.normalize(torch.stack(prompts).mean(0), dim=0), atol=1e-5, rtol=0)


def test_with_tokens_a_class_is_also_what_its_prompts_words_meet(settings, esc50: Path):
    torch.manual_seed(0)
    late = registry.build(settings.model.model_copy(update={"interaction": "late"}), RATE).eval()
    names, templates = ["dog", "church_bells", "water_drops"], ["the sound of {}", "{}!"]
    heard = classification.hear(late, layout.read(str(esc50), "--path").clips, settings, CPU)
    vectors = classification.class_vectors(late, names, templates, CPU)
    made = classification.class_tokenwise(late, heard, names, templates, CPU)
    frames = heard.tokens.rows(slice(None), CPU)
    with torch.inference_mode():
        for column, name in enumerate(("dog", "church bells", "water drops")):
            prompts = [late.text_encoding(*late.tokenise([text])).tokens for text in (f"the sound of {name}", f"{name}!")]
            means = torch.stack([interaction.token_scores(frames, prompt)[:, 0] for prompt in prompts]).mean(0)
            torch.testing.assert_close(made[:, column], means, atol=2e-3, rtol=0)  # prompts are kept in 16 bits
    both = (heard.audio @ vectors.T + made) / 2
    own = torch.tensor([names.index(category) for category in heard.categories])
    found = classification.classified(heard, names, vectors, made)
    assert found["accuracy"] == pytest.approx(float((both.argmax(1) == own).float().mean()))
    forced = classification.classified(heard, names, vectors, 10 * functional.one_hot(own, 3).float())
    assert forced["accuracy"] == 1


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    names = [f"class {n}" for n in range(8)]
    vectors = functional.normalize(torch.from_numpy(rng.standard_normal((8, 12))).float(), dim=1)
    own = rng.integers(0, 7, 200)  # the last class has no clips
    heard = functional.normalize(vectors[own] + 0.5 * torch.from_numpy(rng.standard_normal((200, 12))).float(), dim=1)
    found = classification.classified(Heard([names[n] for n in own], heard, []), names, vectors)
    scores = (heard @ vectors.T).numpy()
    taken = scores.argmax(1)
    assert found["n"] == 200
    assert 0.3 < found["accuracy"] < 0.98
    assert found["accuracy"] == pytest.approx(accuracy_score(own, taken))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(own, scores, k=5, labels=range(8)))
    low, high = found["intervals"]["accuracy"]
    assert low < found["accuracy"] < high
    *some, none = found["classes"]
    assert [of["accuracy"] for of in some] == pytest.approx(recall_score(own, taken, average=None, labels=range(7)))
    assert (none["clips"], none["accuracy"], none["intervals"], none["taken_for"]) == (0, None, None, None)
    for number, of in enumerate(some):
        wrong = [n for n in taken[own == number] if n != number]
        assert of["clips"] == (own == number).sum()
        assert of["taken_for"] == (None if not wrong else names[int(np.bincount(wrong).argmax())])


def test_a_model_that_gives_every_class_the_same_is_never_right():
    found = classification.classified(Heard(["a", "b"], torch.ones(2, 3), []), ["a", "b"], torch.ones(2, 3))
    assert found["accuracy"] == 0


def test_a_template_without_a_place_for_the_class_is_refused():
    classification.check_templates(["{}", "the sound of {}"])
    with pytest.raises(SettingsError, match=r"'the sound' has no \{\} where"):
        classification.check_templates(["{}", "the sound"])
