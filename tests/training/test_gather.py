"""Two real processes against one: exchange, loss and data-parallel gradients are those of the whole batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.config import AskSettings
from ask_ray.knowledge import index
from ask_ray.knowledge.replica import Knowledge
from ask_ray.knowledge.snapshot import Embeddings, Entries, open_snapshot, publish
from ask_ray.method.interaction import Tokens, token_weights
from ask_ray.storage import Folder
from ask_ray.training import ask
from ask_ray.training.gather import agree_on_least, gather, gather_objects, share_buffers, tell_all, world_size

DIM, BATCH, RANKS, STEPS = 8, 32, 2, 2
CPU = torch.device("cpu")
PLAIN = AskSettings(enabled=False, beta=0, reliability="off", negatives="none")
CASES = {
    "plain": PLAIN,
    "queue": PLAIN.model_copy(update={"enabled": True, "negatives": "queue", "queue": 48}),
    "all of ASK": AskSettings(rho=0.5, neighbours=4, exclude="self"),
    "excluding the batch": AskSettings(rho=0.5, neighbours=4, exclude="batch", reliability="both"),
    "logits": AskSettings(rho=0.3, neighbours=4, transport="logits", coarse=False, negatives="none"),
    "late": PLAIN,
    "late, all of ASK": AskSettings(rho=0.5, neighbours=4, exclude="self"),
}


class Tiny(nn.Module):
    """A linear encoder of each modality, of wholes and of tokens, with a learnt temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.text = nn.Linear(6, DIM), nn.Linear(5, DIM)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.weigh = nn.Linear(DIM, 1, bias=False)

    def forward(self, audio: Tensor, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tokens, Tokens]]:
        u, v = functional.normalize(self.audio(audio), dim=1), functional.normalize(self.text(text), dim=1)
        parts = (self.audio, audio, 4), (self.text, text, 3)
        return u, v, self.log_scale.exp(), tuple(self.tokens(*part, lengths % most + 1) for *part, most in parts)

    def tokens(self, encoder: nn.Linear, rows: Tensor, lengths: Tensor) -> Tokens:
        """Up to `lengths` tokens of each row, no more than the longest row of the batch has."""
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        turned = torch.stack([rows.roll(place, 1) for place in range(mask.shape[1])], dim=1)
        vectors = functional.normalize(encoder(turned), dim=2)
        return Tokens(vectors, token_weights(self.weigh(vectors)[..., 0], mask), mask)


def knowledge(home: Folder) -> Knowledge:
    """60 entries of 30 clips, most of them in the batch of one of the steps."""
    if not home.exists("v000001"):
        rng = np.random.default_rng(3)
        tables = [rng.normal(size=(count, DIM)) for count in (60, 60, 7, 7)]
        tables = [(table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32) for table in tables]
        numbers, which = np.repeat(np.arange(30, dtype=np.int64), 2), np.tile(np.array([0, 1], np.int64), 30)
        entries = Entries.of_lists([str(n) for n in numbers], numbers, ["a caption"] * 60, which, ["train"] * 60)
        built = (index.build(tables[0], 1000, 1, 0), index.build(tables[1], 1000, 1, 0))
        facts = {"run": "run", "encoder_step": 0}
        publish(home, 1, entries, Embeddings(*tables[:2]), Embeddings(*tables[2:]), built, facts)
    return Knowledge(open_snapshot(home, 1, "run", DIM), CPU)


def run(name: str, known: Knowledge, part: slice) -> list[dict[str, Any]]:
    """Two steps on a part of each batch: the global loss, the data-parallel gradients and what is told."""
    model, settings, late = Tiny(), CASES[name], name.startswith("late")
    model.weigh.requires_grad_(late)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model
    queue = ask.Queue(settings.queue) if settings.negatives == "queue" else None
    told = []
    for number in range(STEPS):
        rng = torch.Generator().manual_seed(number)
        audio, text = torch.randn(BATCH, 6, generator=rng)[part], torch.randn(BATCH, 5, generator=rng)[part]
        own = (torch.randperm(40, generator=rng)[:BATCH])[part]
        lengths = torch.randint(12, (BATCH,), generator=rng).sort().values[part]  # one rank has fewer tokens than the other
        u, v, scale, tokens = wrapped(audio, text, lengths)
        ids = gather(own)
        read = settings.enabled and queue is None
        readings = known.read(u.detach(), v.detach(), own, ids, settings) if read else {}
        readings, leaves = ask.watched(readings, ids)
        made = ask.step(u, v, scale, ids, readings, queue, settings, tokens if late else None)
        influence = ask.measured_influence(made.loss, leaves)
        model.zero_grad()
        made.loss.backward()
        if queue is not None:
            queue.push(made.audio, made.text, ids)
        told.append(
            {
                "loss": made.loss.detach(),
                "audio_to_text": made.audio_to_text,
                "text_to_audio": made.text_to_audio,
                "consistency": made.consistency,
                "audio": made.audio,
                "text": made.text,
                "influence": influence,
                **{name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad},
            }
        )
    return told


def exchange(rank: int) -> dict[str, Any]:
    """Every function of the exchange, told by one rank."""
    rows = torch.arange(6.0).reshape(3, 2) + 100 * rank
    weighed = rows.clone().requires_grad_()
    gathered = gather(weighed)
    (gathered * torch.arange(12.0).reshape(6, 2)[: len(gathered)]).sum().backward()
    turned = rows.clone().requires_grad_()
    (gather(turned).T.contiguous() * torch.arange(12.0).reshape(6, 2)[: len(gathered)].T.contiguous()).sum().backward()
    return {
        "world": world_size(),
        "without gradient": gather(rows.long()),
        "with gradient": gathered.detach(),
        "gradient": weighed.grad,
        "transposed gradient": turned.grad,
        "objects": gather_objects({"rank": rank}),
        "least": [agree_on_least(5 - rank, CPU), agree_on_least(rank, CPU)],
        "told": [tell_all(f"by {rank}"), tell_all(None if rank == 0 else rank)],
        "running mean": shared_mean(rank),
    }


def shared_mean(rank: int) -> Tensor:
    """What a normalisation has for its running mean when each rank saw other numbers, and then rank 0's were shared."""
    norm = nn.BatchNorm1d(2, momentum=None)
    norm(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 100 * rank)
    share_buffers(norm)
    return norm.running_mean


def child(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    known = knowledge(Folder.at(str(folder / "knowledge")))
    share = BATCH // RANKS
    made = {name: run(name, known, slice(rank * share, (rank + 1) * share)) for name in CASES}
    torch.save({"steps": made, "exchange": exchange(rank)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    knowledge(Folder.at(str(made / "knowledge")))
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What two processes told."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(RANKS)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_loss_and_gradients_of_one_with_the_whole_batch(ranks, folder, name):
    one = run(name, knowledge(Folder.at(str(folder / "knowledge"))), slice(None))
    for step, expected in enumerate(one):
        for rank in ranks:
            told = rank["steps"][name][step]
            assert told.keys() == expected.keys()
            for key in told.keys() - {"influence"}:
                if expected[key] is None:
                    assert told[key] is None
                else:
                    torch.testing.assert_close(told[key], expected[key], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        assert float(expected["audio.weight"].norm()) > 1e-3
        assert not name.startswith("late") or float(expected["weigh.weight"].norm()) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_influence_is_nothing_without_knowledge_and_something_with_it(ranks, folder, name):
    """Rows that both ranks read count once for each, which bounds the sum over entries from above."""
    one = run(name, knowledge(Folder.at(str(folder / "knowledge"))), slice(None))
    for step in range(STEPS):
        single = float(one[step]["influence"])
        both = [float(rank["steps"][name][step]["influence"]) for rank in ranks]
        assert both[0] == both[1]
        if name in ("plain", "queue", "late"):
            assert single == both[0] == 0
        else:
            assert 0 < single <= both[0] * (1 + 1e-4)
            assert both[0] < 2 * single


def test_what_the_queue_holds_counts_from_the_second_step(ranks):
    first, second = ([rank["steps"][name][step]["loss"] for name in ("plain", "queue")] for rank in ranks[:1] for step in (0, 1))
    assert first[0] == first[1]
    assert second[0] < second[1]


def test_exchange_between_two_ranks(ranks):
    rows = torch.cat([torch.arange(6.0).reshape(3, 2), torch.arange(6.0).reshape(3, 2) + 100])
    weights = torch.arange(12.0).reshape(6, 2)
    for rank, told in enumerate(rank["exchange"] for rank in ranks):
        assert told["world"] == 2
        assert torch.equal(told["with gradient"], rows)
        assert torch.equal(told["without gradient"], rows.long())
        # Both ranks derive the same loss, so a row hears twice its weight; the mean over ranks takes that back.
        assert torch.equal(told["gradient"] / 2, weights[3 * rank : 3 * rank + 3])
        assert torch.equal(told["transposed gradient"], told["gradient"])
        assert told["objects"] == [{"rank": 0}, {"rank": 1}]
        assert told["least"] == [4, 0]
        assert told["told"] == ["by 0", None]
        assert told["running mean"].tolist() == [2, 3]


def test_alone_everything_is_ones_own():
    told = exchange(0)
    assert told["world"] == 1
    assert torch.equal(told["with gradient"], torch.arange(6.0).reshape(3, 2))
    assert (told["objects"], told["least"], told["told"]) == ([{"rank": 0}], [5, 0], ["by 0", None])


if __name__ == "__main__":
    child(int(sys.argv[2]), Path(sys.argv[1]))
