"""One ASK step in one process: each part by its switch, and nothing left of them when all are off."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ask_ray.config import AskSettings
from ask_ray.knowledge.replica import Neighbourhood, Reading
from ask_ray.method import interaction, transport
from ask_ray.method.interaction import Tokens
from ask_ray.training import ask

DIM, BATCH, ENTRIES = 8, 6, 20
SCALE = torch.tensor(10.0)
OFF = AskSettings(rho=1, beta=0, reliability="off", negatives="none")


def unit(count: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def pairs() -> tuple[Tensor, Tensor]:
    return unit(BATCH, 1).requires_grad_(), unit(BATCH, 2).requires_grad_()


def nearest(u: Tensor, v: Tensor, k: int = 4, coarse: bool = True) -> dict[str, Reading]:
    """What a knowledge base of other clips answers."""
    made = {}
    for name, seed, count in (("fine", 10, ENTRIES), ("coarse", 20, 5))[: 1 + coarse]:
        audio, text = unit(count, seed), unit(count, seed + 1)
        found = [(query.detach() @ table.T).topk(k, dim=1).indices for query, table in ((u, audio), (v, text))]
        numbers = torch.arange(count) + 1000 if name == "fine" else torch.full((count,), -1)
        sources = numbers.clamp(max=0)
        every = torch.ones(BATCH, k, dtype=torch.bool)
        made[name] = Reading(Neighbourhood(found[0], every), Neighbourhood(found[1], every), audio, text, numbers, sources)
    return made


def ntxent(u: Tensor, v: Tensor) -> Tensor:
    own = torch.arange(len(u))
    return (functional.cross_entropy(SCALE * u @ v.T, own) + functional.cross_entropy(SCALE * v @ u.T, own)) / 2


def step(u: Tensor, v: Tensor, readings: dict[str, Reading], settings: AskSettings, queue: ask.Queue | None = None) -> ask.Step:
    return ask.step(u, v, SCALE, torch.arange(len(u)), readings, queue, settings)


# --- nothing left ---


@pytest.mark.parametrize("settings", [OFF, OFF.model_copy(update={"enabled": False, "beta": 0.2})])
@pytest.mark.parametrize("read", [False, True])
def test_with_every_part_off_the_loss_is_ntxent_and_so_is_its_gradient(settings, read):
    u, v = pairs()
    made = step(u, v, nearest(u, v) if read else {}, settings)
    torch.testing.assert_close(made.loss, ntxent(u, v))
    gradients = torch.autograd.grad(made.loss, (u, v))
    # Injection with ρ = 1 normalises once more: what points along the embedding itself has no effect on it.
    tangent = [
        g - (g * x).sum(1, keepdim=True) * x for g, x in zip(torch.autograd.grad(ntxent(u, v), (u, v)), (u, v), strict=True)
    ]
    for ours, theirs, x in zip(gradients, tangent, (u, v), strict=True):
        torch.testing.assert_close(ours - (ours * x).sum(1, keepdim=True) * x, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((made.audio_to_text + made.text_to_audio) / 2, made.loss.detach())
    assert torch.equal(made.audio, u.detach())
    assert torch.equal(made.text, v.detach())
    assert (made.consistency is None) == (not read)


@pytest.mark.parametrize(
    "change",
    [{"rho": 0.5}, {"beta": 0.3}, {"beta": 0.3, "transport": "logits"}, {"reliability": "pair"}, {"negatives": "knowledge"}],
    ids=str,
)
def test_every_switch_changes_the_loss(change):
    u, v = pairs()
    made = step(u, v, nearest(u, v), OFF.model_copy(update=change))
    assert torch.isfinite(made.loss)
    assert abs(float(made.loss.detach()) - float(ntxent(u, v).detach())) > 1e-4
    made.loss.backward()
    assert torch.isfinite(u.grad).all()
    assert float(u.grad.norm()) > 0


def test_negatives_raise_the_loss_and_by_as_much_as_their_rows_say():
    u, v = pairs()
    readings = nearest(u, v)
    made = step(u, v, readings, OFF.model_copy(update={"negatives": "knowledge"}))
    fine, own = readings["fine"], torch.arange(BATCH)
    more_texts = torch.einsum("bd,bkd->bk", u, fine.text[fine.by_audio.rows])
    more_audios = torch.einsum("bd,bkd->bk", v, fine.audio[fine.by_text.rows])
    expected = [
        functional.cross_entropy(SCALE * torch.cat([query @ other.T, more], 1), own)
        for query, other, more in ((u, v, more_texts), (v, u, more_audios))
    ]
    torch.testing.assert_close(made.loss, sum(expected) / 2)
    assert made.loss > ntxent(u, v)


def test_a_pair_whose_own_clip_is_its_neighbour_has_it_for_no_negative():
    u, v = pairs()
    readings = nearest(u, v, coarse=False)
    fine, settings = readings["fine"], OFF.model_copy(update={"negatives": "knowledge"})
    own = fine.by_audio.rows[2, 0]  # of one pair's neighbours by its audio
    numbers = fine.numbers.clone()
    numbers[own] = 2  # is its own clip
    others = [Neighbourhood(found.rows, found.valid.clone()) for found in (fine.by_audio, fine.by_text)]
    for found in others:
        found.valid[2] &= found.rows[2] != own
    expected = step(u, v, {"fine": replace(fine, by_audio=others[0], by_text=others[1])}, settings)
    torch.testing.assert_close(step(u, v, {"fine": replace(fine, numbers=numbers)}, settings).loss, expected.loss)
    assert expected.loss < step(u, v, readings, settings).loss


# --- reading ---


def test_reading_weighs_and_averages_neighbours_as_the_formulas_say():
    u, v = pairs()
    readings = nearest(u, v)
    settings = AskSettings(tau_knowledge=0.2, reliability="off")
    reads = ask.read_knowledge(u, v, readings, settings)
    for row in range(BATCH):
        means = {"aa": [], "at": [], "tt": [], "ta": []}
        for reading in readings.values():
            for way, query in (("audio", u), ("text", v)):
                rows = getattr(reading, f"by_{way}").rows[row]
                alpha = torch.softmax(getattr(reading, way)[rows] @ query[row] / 0.2, 0)
                for table in ("audio", "text"):
                    means[table[0] + way[0]].append(alpha @ getattr(reading, table)[rows])
        g = {name: functional.normalize(sum(of) / len(of), dim=0) for name, of in means.items()}
        torch.testing.assert_close(reads.audio[row], g["aa"])
        torch.testing.assert_close(reads.text[row], g["tt"])
        torch.testing.assert_close(reads.consistency[row], (g["aa"] @ g["at"] + g["tt"] @ g["ta"]) / 2)


def test_the_neighbour_variant_asks_the_other_modality_too():
    u, v = pairs()
    readings = nearest(u, v, coarse=False)
    settings = AskSettings(tau_knowledge=0.2, reliability="neighbour", coarse=False)
    reads = ask.read_knowledge(u, v, readings, settings)
    fine = readings["fine"]
    rows = fine.by_audio.rows[2]
    alpha = torch.softmax((fine.audio[rows] @ u[2] + fine.text[rows] @ v[2]) / 0.2, 0)
    torch.testing.assert_close(reads.audio[2], functional.normalize(alpha @ fine.audio[rows], dim=0))


def test_missing_neighbours_count_for_nothing():
    u, v = pairs()
    whole = nearest(u, v, k=3, coarse=False)["fine"]
    padded = [
        Neighbourhood(
            torch.cat([found.rows, torch.zeros(BATCH, 2, dtype=torch.int64)], 1),
            torch.cat([found.valid, torch.zeros(BATCH, 2, dtype=torch.bool)], 1),
        )
        for found in (whole.by_audio, whole.by_text)
    ]
    settings = AskSettings(rho=0.5, coarse=False, reliability="both")
    losses = [
        step(u, v, {"fine": Reading(*found, whole.audio, whole.text, whole.numbers, whole.sources)}, settings).loss
        for found in ([whole.by_audio, whole.by_text], padded)
    ]
    torch.testing.assert_close(*losses)
    nothing = [Neighbourhood(found.rows, torch.zeros_like(found.valid)) for found in padded]
    made = step(
        u,
        v,
        {"fine": Reading(*nothing, whole.audio, whole.text, whole.numbers, whole.sources)},
        settings.model_copy(update={"beta": 0}),
    )
    torch.testing.assert_close(made.loss, ntxent(u, v))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(made.loss, (u, v)))


# --- influence ---


def influence(settings: AskSettings, ids: Tensor, **change: Tensor) -> tuple[float, list[Tensor], Tensor]:
    u, v = pairs()
    readings = nearest(u, v, coarse=False)
    readings["fine"] = Reading(**{**vars(readings["fine"]), **change})
    readings, leaves = ask.watched(readings if settings.enabled else {}, ids)
    made = ask.step(u, v, SCALE, ids, readings, None, settings)
    return float(ask.measured_influence(made.loss, leaves)), leaves, made.loss


def test_out_of_batch_entries_have_influence_with_knowledge_alone():
    ids = torch.arange(BATCH)
    assert influence(OFF.model_copy(update={"enabled": False}), ids)[0] == 0
    assert influence(OFF, ids)[0] == 0
    for change in ({"rho": 0.5}, {"negatives": "knowledge"}):
        value, leaves, loss = influence(OFF.model_copy(update=change), ids)
        expected = sum(float(g.norm(dim=1).sum()) for g in torch.autograd.grad(loss, leaves))
        assert value > 0
        assert value == pytest.approx(expected)


def test_entries_of_the_batchs_own_clips_are_no_out_of_batch_knowledge():
    settings, ids = OFF.model_copy(update={"rho": 0.5}), torch.arange(BATCH)
    whole = influence(settings, ids)[0]
    half = influence(settings, ids, numbers=torch.arange(ENTRIES) - ENTRIES + BATCH + 5)[0]  # the last entries are in it
    none = influence(settings, ids, numbers=torch.zeros(ENTRIES, dtype=torch.int64))[0]
    assert 0 == none < half < whole


def test_watching_does_not_change_the_loss():
    u, v = pairs()
    readings = nearest(u, v)
    settings = AskSettings(rho=0.4)
    watched, _ = ask.watched(readings, torch.arange(BATCH))
    assert torch.equal(step(u, v, readings, settings).loss, step(u, v, watched, settings).loss)


# --- tokens ---


def tokens(seed: int, most: int, dtype: torch.dtype = torch.float32) -> Tokens:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(most) <= torch.randint(most, (BATCH, 1), generator=rng)
    weights = interaction.token_weights(torch.randn(BATCH, most, generator=rng, dtype=dtype), mask)
    vectors = functional.normalize(torch.randn(BATCH, most, DIM, generator=rng, dtype=dtype), dim=2)
    return Tokens(vectors, weights, mask)


def test_tokens_are_half_of_the_similarity_and_what_is_injected_the_other_half():
    u, v = pairs()
    sides, readings = (tokens(1, 4), tokens(2, 3)), nearest(u, v)
    late = interaction.token_scores(*sides)
    settings = OFF.model_copy(update={"rho": 0.5, "negatives": "knowledge"})
    made = ask.step(u, v, SCALE, torch.arange(BATCH), readings, None, settings, sides)
    reads, fine, own = ask.read_knowledge(u, v, readings, settings), readings["fine"], torch.arange(BATCH)
    injected = functional.normalize(u + reads.audio, dim=1) @ functional.normalize(v + reads.text, dim=1).T
    texts = torch.einsum("bd,bkd->bk", u, fine.text[fine.by_audio.rows])  # whole embeddings: entries have no tokens
    audios = torch.einsum("bd,bkd->bk", v, fine.audio[fine.by_text.rows])
    similarity = (injected + late) / 2
    expected = [
        functional.cross_entropy(SCALE * torch.cat([logits, more], 1), own)
        for logits, more in ((similarity, texts), (similarity.T, audios))
    ]
    torch.testing.assert_close(made.loss, sum(expected) / 2)
    assert torch.equal(made.audio, u.detach())


def test_the_plan_is_of_the_whole_similarity():
    u, v = pairs()
    sides = tokens(1, 4), tokens(2, 3)
    similarity = (u @ v.T + interaction.token_scores(*sides)).detach() / 2
    targets = 0.7 * torch.eye(BATCH) + 0.3 * transport.transport_plan(similarity, OFF.epsilon)
    made = ask.step(u, v, SCALE, torch.arange(BATCH), {}, None, OFF.model_copy(update={"beta": 0.3}), sides)
    both = [functional.cross_entropy(SCALE * logits, rows) for logits, rows in ((similarity, targets), (similarity.T, targets.T))]
    torch.testing.assert_close(made.loss, sum(both) / 2)


def test_gradients_through_tokens_and_embeddings_are_those_of_finite_differences():
    sides = tokens(1, 3, torch.float64), tokens(2, 2, torch.float64)

    def loss(u: Tensor, v: Tensor, frames: Tensor, words: Tensor) -> Tensor:
        moved = sides[0]._replace(vectors=frames), sides[1]._replace(vectors=words)
        return ask.step(u, v, SCALE.double(), torch.arange(BATCH), {}, None, OFF, moved).loss

    leaves = [unit(BATCH, 1).double(), unit(BATCH, 2).double(), *(side.vectors for side in sides)]
    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


# --- queue and drift ---


def test_the_queue_keeps_the_newest_pairs_and_their_order():
    queue = ask.Queue(5)
    assert queue.ids is None
    for start in (0, 3, 6):
        rows = torch.arange(start, start + 3).float()[:, None]
        queue.push(rows, -rows, torch.arange(start, start + 3))
    assert queue.ids.tolist() == [4, 5, 6, 7, 8]
    assert queue.audio[:, 0].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert queue.text[:, 0].tolist() == [-4.0, -5.0, -6.0, -7.0, -8.0]
    queue.push(torch.zeros(9, 1), torch.zeros(9, 1), torch.arange(9))
    assert queue.ids.tolist() == [4, 5, 6, 7, 8]


def test_queue_negatives_are_all_of_other_clips():
    u, v = pairs()
    queue = ask.Queue(100)
    held_audio, held_text, held_ids = unit(4, 50), unit(4, 51), torch.tensor([0, 1, 90, 91])
    queue.push(held_audio, held_text, held_ids)
    made = step(u, v, {}, OFF.model_copy(update={"negatives": "queue"}), queue)
    losses = []
    for query, other, held in ((u, v, held_text), (v, u, held_audio)):
        logits = SCALE * torch.cat([query @ other.T, query @ held.T], 1)
        logits[0, BATCH], logits[1, BATCH + 1] = -torch.inf, -torch.inf  # the pairs' own clips
        losses.append(functional.cross_entropy(logits, torch.arange(BATCH)))
    torch.testing.assert_close(made.loss, sum(losses) / 2)


def test_drift_of_the_batch_is_nothing_for_fresh_rows_and_grows_with_their_age():
    fresh = unit(30, 3)
    assert float(ask.batch_drift(fresh, fresh.clone(), 0.07)) == 0.0
    values = [
        float(ask.batch_drift(fresh, functional.normalize(fresh + age * unit(30, 4), dim=1), 0.07)) for age in (0.1, 0.3, 1)
    ]
    assert 0 < values[0] < values[1] < values[2]
    log_ideal, log_actual = (
        torch.log_softmax(fresh @ rows.T / 0.07, 1) for rows in (fresh, functional.normalize(fresh + unit(30, 4), dim=1))
    )
    expected = (log_ideal.exp() * (log_ideal - log_actual)).sum(1).mean()
    assert values[2] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_drift_of_fewer_than_two_pairs_is_not_known(count):
    assert np.isnan(float(ask.batch_drift(unit(30, 3)[:count], unit(30, 3)[:count], 0.07)))
