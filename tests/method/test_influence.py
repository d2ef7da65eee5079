"""OBI is 0 for plain NT-Xent (the Gradient Locality Bottleneck), and positive once knowledge enters the loss."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ask_ray.method import influence, injection, negatives, objective, reliability

BATCH, NEIGHBOURS, WIDTH = 6, 3, 8
SCALE = torch.tensor(14.0, dtype=torch.float64)


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def embeddings() -> tuple[Tensor, Tensor]:
    return unit(BATCH, WIDTH, seed=0).requires_grad_(), unit(BATCH, WIDTH, seed=1).requires_grad_()


def knowledge() -> tuple[Tensor, Tensor]:
    rows = (BATCH, NEIGHBOURS, WIDTH)
    return unit(*rows, seed=2).requires_grad_(), unit(*rows, seed=3).requires_grad_()


def weights(own: Tensor, rows: Tensor) -> Tensor:
    return injection.neighbour_weights(torch.einsum("bd,bkd->bk", own, rows), 0.07)


def injected_loss(audio: Tensor, text: Tensor, rows: tuple[Tensor, Tensor], rho: float) -> Tensor:
    sides = [
        injection.inject(own, injection.combine(injection.read(entries, weights(own, entries))), rho)
        for own, entries in zip((audio, text), rows, strict=True)
    ]
    return objective.contrastive_loss(objective.similarity(*sides), SCALE).loss


def test_plain_ntxent_has_none_even_when_knowledge_was_read():
    audio, text = embeddings()
    rows = knowledge()
    by_audio, by_text = (weights(own, entries) for own, entries in zip((audio, text), rows, strict=True))
    consistency = reliability.consistency(
        injection.read(rows[0], by_audio),
        injection.read(rows[0], by_text),
        injection.read(rows[1], by_text),
        injection.read(rows[1], by_audio),
    )
    similarity = objective.similarity(audio, text)
    for potential in (None, reliability.potential(consistency, 0.5)):
        loss = objective.contrastive_loss(similarity, SCALE, potential=potential).loss
        assert influence.out_of_batch_influence(loss, *rows).item() == 0.0


def test_injection_gives_influence_and_own_weight_one_takes_it_away():
    audio, text = embeddings()
    rows = knowledge()
    readings = [influence.out_of_batch_influence(injected_loss(audio, text, rows, rho), *rows).item() for rho in (0.2, 0.8, 1.0)]
    assert readings[0] > readings[1] > 0
    assert readings[2] == 0.0


def test_knowledge_negatives_give_influence_where_they_are_valid():
    audio, text = embeddings()
    rows_audio, rows_text = knowledge()
    for valid, positive in ((True, True), (False, False)):
        mask = torch.full((BATCH, NEIGHBOURS), valid)
        loss = objective.contrastive_loss(
            objective.similarity(audio, text),
            SCALE,
            audio_negatives=negatives.knowledge_negatives(audio, rows_text, mask),
            text_negatives=negatives.knowledge_negatives(text, rows_audio, mask),
        ).loss
        reading = influence.out_of_batch_influence(loss, rows_audio, rows_text)
        assert reading.isfinite()
        assert (reading.item() > 0) == positive


def test_missing_neighbours_have_no_influence():
    audio, text = embeddings()
    rows, _ = knowledge()
    similarity = torch.einsum("bd,bkd->bk", audio, rows)
    similarity = similarity.masked_fill(torch.ones_like(similarity, dtype=torch.bool), -math.inf)
    read = injection.read(rows, injection.neighbour_weights(similarity, 0.07))
    injected = injection.inject(audio, injection.combine(read), 0.2)
    loss = objective.contrastive_loss(objective.similarity(injected, text), SCALE).loss
    assert influence.out_of_batch_influence(loss, rows).item() == 0.0


def test_influence_is_the_sum_of_row_norms():
    first, second = torch.ones(2, 3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    loss = 3 * first.sum() + second.square().sum() / 2
    assert influence.out_of_batch_influence(loss, first, second).item() == pytest.approx(6 * 3 * 2 + 5 * 2)


def test_the_steps_own_backward_is_unchanged():
    rows = knowledge()
    audio, text = embeddings()
    injected_loss(audio, text, rows, 0.5).backward()
    measured_audio, measured_text = embeddings()
    loss = injected_loss(measured_audio, measured_text, rows, 0.5)
    reading = influence.out_of_batch_influence(loss, *rows)
    assert not reading.requires_grad
    assert measured_audio.grad is None
    loss.backward()
    torch.testing.assert_close(measured_audio.grad, audio.grad)
    torch.testing.assert_close(measured_text.grad, text.grad)


def test_rows_and_losses_without_gradient_count_zero():
    rows, _ = knowledge()
    assert influence.out_of_batch_influence(rows.sum(), rows.detach()).item() == 0.0
    assert influence.out_of_batch_influence(torch.tensor(1.0), rows).item() == 0.0
    assert influence.out_of_batch_influence(rows.sum()).item() == 0.0


def test_half_precision_gradients_are_summed_in_float32():
    rows = torch.ones(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    reading = influence.out_of_batch_influence(rows.sum(), rows)
    assert reading.dtype == torch.float32
    assert reading.item() == 12.0


def test_a_loss_that_is_no_scalar_is_rejected():
    with pytest.raises(ValueError, match="scalar"):
        influence.out_of_batch_influence(torch.zeros(2, requires_grad=True))
