"""The dual encoder as the settings build it."""

import pickle

import pytest
import torch
from torch import nn

from ask_ray.config import ModelSettings, SettingsError
from ask_ray.models.dual_encoder import DualEncoder, scores
from ask_ray.models.registry import build

SMALL = ModelSettings(width=0.25, dim=16)
CAPTIONS = ["a dog barks", "rain falls, then a siren wails", ""]


def made(settings: ModelSettings = SMALL, rate: int = 16000) -> DualEncoder:
    torch.manual_seed(0)
    return build(settings, rate)


def clips(rate: int = 16000) -> tuple[torch.Tensor, torch.Tensor]:
    waves = 0.1 * torch.randn(3, rate, generator=torch.Generator().manual_seed(0))
    return waves, torch.tensor([rate, rate // 2, rate])


@pytest.mark.parametrize(("audio", "rate"), [("tiny", 16000), ("resnet38", 32000)])
@pytest.mark.parametrize("text", ["tiny", "bert"])
def test_every_pair_of_towers_trains(audio: str, text: str, rate: int) -> None:
    model = made(ModelSettings(audio=audio, text=text, width=0.08, dim=16), rate)
    assert all(module.training for module in model.modules())
    audio_made, text_made, scale = model(*clips(rate), *model.tokenise(CAPTIONS))
    assert audio_made.tokens is text_made.tokens is None
    u, v = audio_made.vectors, text_made.vectors
    assert u.shape == v.shape == (3, 16)
    assert u.dtype == v.dtype == scale.dtype == torch.float32
    torch.testing.assert_close(u.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(v.norm(dim=1), torch.ones(3))
    nn.functional.cross_entropy(scale * u @ v.T, torch.arange(3)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_encodings_repeat_survive_a_copy_and_depend_on_the_seed() -> None:
    model = made().eval()
    copy = pickle.loads(pickle.dumps(model))
    other = made().eval()
    with torch.no_grad():
        first = torch.cat([model.encode_audio(*clips()), model.encode_text(*model.tokenise(CAPTIONS))])
        for again in (model, copy, other):
            second = torch.cat([again.encode_audio(*clips()), again.encode_text(*again.tokenise(CAPTIONS))])
            assert torch.equal(first, second)
        torch.manual_seed(1)
        assert not torch.equal(build(SMALL, 16000).eval().encode_audio(*clips()), first[:3])


def test_a_state_dict_carries_the_whole_model() -> None:
    model = made().eval()
    torch.manual_seed(5)
    other = build(SMALL, 16000).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.encode_audio(*clips()), model.encode_audio(*clips()))


def test_reduced_precision_gives_float32_unit_vectors_close_to_the_exact_ones() -> None:
    model = made().eval()
    with torch.no_grad():
        exact = model.encode_audio(*clips()), model.encode_text(*model.tokenise(CAPTIONS))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model.encode_audio(*clips()), model.encode_text(*model.tokenise(CAPTIONS))
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.norm(dim=1), torch.ones(3))
        assert (a * b).sum(1).min() > 0.99


@pytest.mark.parametrize(("given", "expected"), [(0.07, 0.07), (0.001, 0.01), (10.0, 10.0)])
def test_temperature_starts_where_it_is_set_within_bounds(given: float, expected: float) -> None:
    model = made(ModelSettings(width=0.1, temperature=given))
    assert model.log_temperature.dtype == torch.float32
    assert model.log_temperature.shape == ()
    assert model.temperature.item() == pytest.approx(expected)
    assert model.scale.item() == pytest.approx(1 / expected)


def test_temperature_stays_in_bounds_and_finds_back() -> None:
    model = made()
    optimiser = torch.optim.SGD([model.log_temperature], 1.0)
    for direction, bound in ((1, 0.01), (-1, 10.0)):
        with torch.no_grad():
            model.log_temperature.fill_(torch.tensor(bound).log() - 0.5 * direction)
        assert model.temperature.item() == pytest.approx(bound)
        optimiser.zero_grad()
        (direction * model.temperature).backward()
        assert model.log_temperature.grad == 0
        optimiser.zero_grad()
        (-direction * model.temperature).backward()
        assert model.log_temperature.grad == pytest.approx(-direction * bound)
        optimiser.step()
        assert (model.log_temperature - torch.tensor(bound).log()).abs() != 0.5


LATE = SMALL.model_copy(update={"interaction": "late"})


def test_tokens_add_few_parameters_after_all_others_and_leave_the_embeddings_alone() -> None:
    plain, late = made().eval(), made(LATE).eval()
    more = late.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in more} == {"audio_tokens", "text_tokens"}
    assert all(torch.equal(value, late.state_dict()[name]) for name, value in plain.state_dict().items())
    assert sum(late.state_dict()[name].numel() for name in more) < 0.1 * sum(p.numel() for p in plain.parameters())
    with torch.no_grad():
        assert torch.equal(late.audio_encoding(*clips()).vectors, plain.encode_audio(*clips()))
        captions = plain.tokenise(CAPTIONS)
        assert torch.equal(late.text_encoding(*captions).vectors, plain.encode_text(*captions))


@pytest.mark.parametrize("dim", [16, 200])
def test_tokens_are_unit_vectors_that_count_alike_at_first(dim: int) -> None:
    model = made(LATE.model_copy(update={"dim": dim}))
    words, mask = model.tokenise(CAPTIONS)
    audio, text, _ = model(*clips(), words, mask)
    assert torch.equal(text.tokens.mask, mask)
    for side in (audio.tokens, text.tokens):
        assert side.vectors.shape == (*side.mask.shape, min(dim, 128))
        assert side.vectors.dtype == side.weights.dtype == torch.float32
        torch.testing.assert_close(side.vectors.norm(dim=2), torch.ones(side.mask.shape))
        torch.testing.assert_close(side.weights, side.mask / side.mask.sum(1, keepdim=True))
    assert scores(audio, text).shape == (3, 3)
    nn.functional.cross_entropy(scores(audio, text), torch.arange(3)).backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert silent == ["log_temperature"]
    assert model.audio_tokens.weigh.weight.grad.norm() > 0


def test_scores_of_a_batch_are_those_of_its_pairs_one_by_one() -> None:
    model = made(LATE).eval()
    nn.init.normal_(model.audio_tokens.weigh.weight)
    waves, lengths = clips()
    with torch.no_grad():
        together = scores(model.audio_encoding(waves, lengths), model.text_encoding(*model.tokenise(CAPTIONS)))
        for row, (wave, length) in enumerate(zip(waves, lengths, strict=True)):
            heard = model.audio_encoding(wave[None, :length], length[None])
            for column, caption in enumerate(CAPTIONS):
                alone = scores(heard, model.text_encoding(*model.tokenise([caption])))
                torch.testing.assert_close(together[row, column], alone[0, 0], atol=1e-5, rtol=0)


def test_tokens_of_a_tower_that_makes_none_are_refused(pooler_only) -> None:
    settings = ModelSettings(width=0.1, dim=16, text=f"hf:{pooler_only}", text_pooling="pooler", interaction="late")
    with pytest.raises(
        SettingsError, match=r"model\.interaction is late, but model\.text=hf:.*no tokens: set model\.interaction"
    ):
        build(settings, 8000)
    model = build(settings.model_copy(update={"interaction": "cosine"}), 8000)
    assert model.encode_text(*model.tokenise(["a dog barks"])).shape == (1, 16)
    with pytest.raises(SettingsError, match="choose pooler"):
        build(settings.model_copy(update={"text_pooling": "mean"}), 8000)


def test_a_corpus_at_another_rate_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"data\.sample_rate is 16000.*set data\.sample_rate=32000"):
        build(ModelSettings(audio="resnet38"), 16000)


def test_a_mask_wider_than_the_features_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"model\.freq_mask is 65"):
        build(ModelSettings(freq_mask=65), 16000)
