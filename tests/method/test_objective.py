"""The loss against a scipy reference, by finite differences with every option, and with negatives masked."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import functional

from ask_ray.method import injection, objective, reliability, transport


def pairs(batch: int, seed: int = 0, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    audio, text = functional.normalize(both, dim=-1)
    return audio, text


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def reference(
    similarity: np.ndarray, scale: float, targets: np.ndarray, audio_extra: np.ndarray, text_extra: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both directions' cross-entropies, from scipy's log-softmax."""
    batch = len(similarity)
    audio = log_softmax(scale * np.hstack([similarity, audio_extra]), axis=1)[:, :batch]
    text = log_softmax(scale * np.hstack([similarity.T, text_extra]), axis=1)[:, :batch]
    return -(targets * audio).sum(1), -(targets.T * text).sum(1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(0, 2**16), st.sampled_from([1.0, 14.0, 100.0]))
def test_plain_loss_is_bidirectional_ntxent(batch: int, seed: int, scale: float):
    audio, text = pairs(batch, seed)
    result = objective.contrastive_loss(objective.similarity(audio, text), scalar(scale))
    nothing = np.empty((batch, 0))
    audio_to_text, text_to_audio = reference((audio @ text.T).numpy(), scale, np.eye(batch), nothing, nothing)
    np.testing.assert_allclose(result.audio_to_text, audio_to_text, atol=1e-10)
    np.testing.assert_allclose(result.text_to_audio, text_to_audio, atol=1e-10)
    assert result.loss.item() == pytest.approx((audio_to_text.mean() + text_to_audio.mean()) / 2, abs=1e-10)


def test_plain_loss_is_torchs_cross_entropy():
    audio, text = pairs(9)
    logits, own = 20 * audio @ text.T, torch.arange(9)
    expected = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(objective.contrastive_loss(audio @ text.T, scalar(20.0)).loss, expected)


def test_every_option_together_matches_the_reference():
    audio, text = pairs(7)
    similarity = audio @ text.T
    targets = transport.soft_targets(transport.transport_plan(similarity, 0.1, tolerance=1e-12), 0.3)
    potential = reliability.potential(torch.linspace(-1, 1, 7, dtype=torch.float64), 0.5)
    more_text, more_audio = (pairs(7, seed)[0] @ pairs(5, seed)[1].T for seed in (1, 2))
    more_text[2] = more_audio[:, 3] = -math.inf
    result = objective.contrastive_loss(similarity, scalar(14.0), targets, targets.mT, potential, more_text, more_audio[:, :4])
    audio_to_text, text_to_audio = reference(
        similarity.numpy(), 14.0, targets.numpy(), more_text.numpy(), more_audio[:, :4].numpy()
    )
    np.testing.assert_allclose(result.audio_to_text, audio_to_text, atol=1e-10)
    np.testing.assert_allclose(result.text_to_audio, text_to_audio, atol=1e-10)
    expected = (potential.numpy() * (audio_to_text + text_to_audio) / 2).mean()
    assert result.loss.item() == pytest.approx(expected, abs=1e-10)


def test_everything_switched_off_is_ntxent():
    audio, text = pairs(8)
    knowledge_audio, knowledge_text = pairs(8, seed=1)
    plain = objective.contrastive_loss(audio @ text.T, scalar(14.0))
    similarity = objective.similarity(injection.inject(audio, knowledge_audio, 1.0), injection.inject(text, knowledge_text, 1.0))
    targets = transport.soft_targets(transport.transport_plan(similarity, 0.05), 0.0)
    for options in (
        {},
        {"targets_audio": targets, "targets_text": targets.mT},
        {"potential": torch.ones(8, dtype=torch.float64)},
        {"audio_negatives": torch.empty(8, 0), "text_negatives": torch.full((8, 3), -math.inf)},
    ):
        torch.testing.assert_close(objective.contrastive_loss(similarity, scalar(14.0), **options), plain)


@pytest.mark.parametrize(("with_targets", "with_potential", "with_negatives"), itertools.product([False, True], repeat=3))
def test_gradients_by_finite_differences(with_targets: bool, with_potential: bool, with_negatives: bool):
    audio, text = (tensor.requires_grad_() for tensor in pairs(4))
    scale = scalar(5.0).requires_grad_()
    rows_text, rows_audio = (tensor.requires_grad_() for tensor in pairs(3, seed=1))
    targets = transport.soft_targets(transport.transport_plan(audio @ text.T, 0.1), 0.2) if with_targets else None
    potential = reliability.potential(torch.arange(4).double(), 1.0) if with_potential else None
    masked = torch.zeros(4, 3, dtype=torch.bool)
    masked[0] = masked[2, 1] = True

    def loss(audio: Tensor, text: Tensor, scale: Tensor, rows_text: Tensor, rows_audio: Tensor) -> Tensor:
        negatives = {}
        if with_negatives:
            negatives["audio_negatives"] = (audio @ rows_text.T).masked_fill(masked, -math.inf)
            negatives["text_negatives"] = (text @ rows_audio.T).masked_fill(masked, -math.inf)
        transposed = None if targets is None else targets.mT
        result = objective.contrastive_loss(audio @ text.T, scale, targets, transposed, potential, **negatives)
        return result.loss

    assert torch.autograd.gradcheck(loss, (audio, text, scale, rows_text, rows_audio))


def test_masked_negatives_leave_loss_and_every_gradient_finite():
    audio, text = (tensor.requires_grad_() for tensor in pairs(4))
    scale = scalar(14.0).requires_grad_()
    negatives = torch.full((4, 3), -math.inf, dtype=torch.float64)
    negatives[1, 0] = 0.4
    negatives.requires_grad_()
    targets = torch.full((4, 4), 0.25, dtype=torch.float64)
    result = objective.contrastive_loss(audio @ text.T, scale, targets, targets, None, negatives, negatives)
    result.loss.backward()
    assert result.loss.isfinite()
    for tensor in (audio, text, scale, negatives):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert negatives.grad is not None
    assert torch.equal(negatives.grad != 0, ~torch.isneginf(negatives))


def test_a_negative_raises_its_own_query_alone():
    audio, text = pairs(4)
    negatives = torch.full((4, 1), -math.inf, dtype=torch.float64)
    plain = objective.contrastive_loss(audio @ text.T, scalar(14.0))
    negatives[2] = 0.9
    harder = objective.contrastive_loss(audio @ text.T, scalar(14.0), audio_negatives=negatives)
    assert torch.equal(harder.text_to_audio, plain.text_to_audio)
    assert (harder.audio_to_text > plain.audio_to_text).tolist() == [False, False, True, False]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**16))
def test_the_order_of_pairs_does_not_matter(batch: int, seed: int):
    audio, text = pairs(batch, seed)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    loss, audio_to_text, text_to_audio = objective.contrastive_loss(audio @ text.T, scalar(14.0))
    permuted = objective.contrastive_loss(audio[order] @ text[order].T, scalar(14.0))
    torch.testing.assert_close(permuted, objective.ContrastiveLoss(loss, audio_to_text[order], text_to_audio[order]))


def test_half_precision_is_computed_in_float32():
    audio, text = pairs(8)
    similarity = (audio @ text.T).to(torch.bfloat16)
    result = objective.contrastive_loss(similarity, torch.tensor(14.0), audio_negatives=similarity[:, :2])
    assert {part.dtype for part in result} == {torch.float32}


def test_rejections():
    square = torch.zeros(3, 3)
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="text"):
        objective.similarity(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="similarity"):
        objective.contrastive_loss(torch.zeros(3, 2), one)
    with pytest.raises(ValueError, match="targets"):
        objective.contrastive_loss(square, one, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="potential"):
        objective.contrastive_loss(square, one, potential=torch.zeros(1))
    with pytest.raises(ValueError, match="negatives"):
        objective.contrastive_loss(square, one, text_negatives=torch.zeros(1, 4))
