"""Evaluation: a split encoded in batches is the split encoded one by one, and injection reads the knowledge base."""

import resource
from dataclasses import replace
from tempfile import gettempdir

import numpy as np
import ot
import pytest
import torch
from torch.nn import functional

from ask_ray.config import AskSettings, DataSettings, Settings, SoundscapeSettings, load
from ask_ray.data import prepare, rarity
from ask_ray.data.corpora import source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.rarity import Frequencies
from ask_ray.data.schema import id_number
from ask_ray.knowledge import index
from ask_ray.knowledge.replica import Knowledge
from ask_ray.knowledge.snapshot import Embeddings, Entries, open_snapshot, publish
from ask_ray.method import interaction
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder, scores
from ask_ray.storage import Folder, StorageError
from ask_ray.training import evaluation, metrics
from ask_ray.training.evaluation import EncodedSplit

RATE, CPU, DIM = 8000, torch.device("cpu"), 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    home = tmp_path_factory.mktemp("prepared")
    scenes = SoundscapeSettings(train=6, validation=0, test=11, seconds=1, captions=3)
    data = DataSettings(prepared=str(home), sample_rate=RATE, shard_clips=4, soundscapes=scenes)
    source, folder = source_of(data), Folder.at(str(home / "corpus"))
    prepare._write_manifest(data, folder, source, [prepare.write_shard(source, shard, folder) for shard in source.shards()])
    return Corpus.open(str(folder))


def settings_of(**data: float) -> Settings:
    pool = {"batch_size": 3}
    return load({"model": {"width": 0.1, "dim": DIM, "dropout": 0.5}, "data": data, "knowledge": {"pool": pool}})


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    return registry.build(settings_of().model, RATE)


@pytest.fixture(scope="module")
def encoded(model, corpus) -> EncodedSplit:
    return evaluation.encode_split(model, corpus, "test", settings_of(), CPU)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, encoded: EncodedSplit) -> Knowledge:
    """A knowledge base of the very clips that are evaluated, so that a clip that found itself would show."""
    home = Folder.at(str(tmp_path_factory.mktemp("knowledge")))
    numbers = np.array([id_number(one) for one in encoded.ids], np.int64)
    which = np.zeros(len(numbers), np.int64)
    entries = Entries.of_lists(encoded.ids, numbers, ["a caption"] * len(numbers), which, ["train"] * len(numbers))
    rows = Embeddings(encoded.audio.numpy(), encoded.text[::3].numpy())
    built = (index.build(rows.audio, 1000, 1, 0), index.build(rows.text, 1000, 1, 0))
    paired = Embeddings(rows.audio[:4], rows.text[:4])
    publish(home, 1, entries, rows, paired, built, {"run": "run", "encoder_step": 0})
    return Knowledge(open_snapshot(home, 1, "run", DIM), CPU)


def one_by_one(model: DualEncoder, corpus: Corpus, seconds: float) -> EncodedSplit:
    model.eval()
    ids, captions, audio, text, owner = [], [], [], [], []
    for group in corpus.groups("test"):
        rows = corpus.read(group)
        for row in range(len(rows)):
            waveform = torch.from_numpy(rows.signal(row)[: round(seconds * RATE)].astype(np.float32) / 32768)[None]
            with torch.inference_mode():
                audio.append(model.encode_audio(waveform, torch.tensor([waveform.shape[1]])))
                text += [model.encode_text(*model.tokenise([caption])) for caption in rows.captions[row]]
            owner += [len(ids)] * len(rows.captions[row])
            ids.append(rows.ids[row])
            captions += rows.captions[row]
    model.train()
    return EncodedSplit(ids, captions, torch.cat(audio), torch.cat(text), torch.tensor(owner))


@pytest.mark.parametrize("seconds", [10.0, 0.5])
def test_a_split_is_what_its_clips_and_captions_are_one_by_one(model, corpus, seconds):
    model.train()
    made = evaluation.encode_split(model, corpus, "test", settings_of(max_seconds=seconds), CPU)
    assert all(module.training for module in model.modules())  # training goes on as it was
    expected = one_by_one(model, corpus, seconds)
    assert (made.ids, made.captions) == (expected.ids, expected.captions)
    assert torch.equal(made.owner, expected.owner)
    for ours, theirs in ((made.audio, expected.audio), (made.text, expected.text)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert evaluation.both_ways(made) == evaluation.both_ways(expected)


def test_a_model_in_evaluation_mode_stays_in_it(model, corpus):
    model.eval()
    evaluation.encode_split(model, corpus, "test", settings_of(), CPU)
    assert not any(module.training for module in model.modules())


def test_both_ways_are_the_figures_by_their_names(encoded):
    made = evaluation.both_ways(encoded)
    arguments = (encoded.audio, encoded.text, encoded.owner)
    size = {"n": 11, "m": 33}
    assert made["t2a"] == metrics.text_to_audio(*arguments).figures() | size
    assert made["a2t"] == metrics.audio_to_text(*arguments).figures() | size
    assert made["t2a"].keys() == {"r1", "r5", "r10", "map10", "median_rank", "mean_rank", "n", "m"}


@pytest.mark.parametrize("reliability", ["pair", "both"])
def test_injection_mixes_in_the_neighbours_of_ones_own_modality_but_never_oneself(encoded, known, reliability):
    ask = AskSettings(rho=0.6, neighbours=3, tau_knowledge=0.1, coarse=False, reliability=reliability)
    made = evaluation.injected(encoded, known, ask)
    assert (made.ids, made.captions) == (encoded.ids, encoded.captions)
    assert torch.equal(made.owner, encoded.owner)
    for name, rows, table, own in (
        ("audio", encoded.audio, encoded.audio, torch.arange(11)),
        ("text", encoded.text, encoded.text[::3], encoded.owner),
    ):
        scores = rows @ table.T
        scores[torch.arange(len(rows)), own] = -torch.inf
        found = scores.topk(3, dim=1)
        alpha = torch.softmax(found.values / 0.1, dim=1)
        knowledge = functional.normalize(torch.einsum("bk,bkd->bd", alpha, table[found.indices]), dim=1)
        expected = functional.normalize(0.6 * rows + 0.4 * knowledge, dim=1)
        torch.testing.assert_close(getattr(made, name), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(getattr(made, name), rows, atol=1e-3)


def test_injection_with_prototypes_is_finite_and_differs(encoded, known):
    fine, both = (evaluation.injected(encoded, known, AskSettings(neighbours=3, coarse=coarse)) for coarse in (False, True))
    for rows in (both.audio, both.text):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    assert not torch.allclose(fine.audio, both.audio)
    assert all(np.isfinite(value) for way in evaluation.both_ways(both).values() for value in way.values())


@pytest.mark.parametrize("exclude", ["self", "batch", "none"])
def test_injection_in_chunks_is_injection_at_once(encoded, known, monkeypatch, exclude):
    """What is asked about together is no batch of training, whose clips would leave each other out."""
    ask = AskSettings(neighbours=3, exclude=exclude)
    whole = evaluation.injected(encoded, known, ask)
    monkeypatch.setattr(evaluation._chunked, "__defaults__", (4,))
    chunked = evaluation.injected(encoded, known, ask)
    torch.testing.assert_close(chunked.audio, whole.audio)
    torch.testing.assert_close(chunked.text, whole.text)


def test_rho_of_one_injects_nothing(encoded, known):
    made = evaluation.injected(encoded, known, AskSettings(rho=1, neighbours=3))
    torch.testing.assert_close(made.audio, encoded.audio)
    torch.testing.assert_close(made.text, encoded.text)


def test_by_plan_ranks_as_the_plan_of_pot_does(encoded):
    ways, found = evaluation.ranked_by_plan(encoded, 0.1)
    assert found.error <= 1e-3
    similarity = (encoded.audio.double() @ encoded.text.double().T).numpy()
    shares = [np.full(size, 1 / size) for size in similarity.shape]
    plan = ot.sinkhorn(*shares, -similarity, 0.1, "sinkhorn_log", numItermax=5000, stopThr=1e-10)
    owner = encoded.owner.numpy()
    t2a = [1 + np.sum(plan[:, n] > plan[clip, n]) for n, clip in enumerate(owner)]
    a2t = [min(1 + np.sum(plan[clip] > plan[clip, n]) for n in np.flatnonzero(owner == clip)) for clip in range(11)]
    assert np.abs(ways["t2a"].rank - t2a).max() <= 1  # the last digits of near ties
    assert np.mean(ways["t2a"].rank == t2a) > 0.9
    assert np.mean(ways["a2t"].rank == a2t) > 0.9


def test_a_plan_undoes_a_clip_that_stands_near_to_everything():
    rng = torch.Generator().manual_seed(0)
    audio = functional.normalize(torch.randn(40, 16, generator=rng), dim=1)
    text = functional.normalize(audio + 1.5 * audio[:1] + 0.1 * torch.randn(40, 16, generator=rng), dim=1)
    split = EncodedSplit([*map(str, range(40))], ["a caption"] * 40, audio, text, torch.arange(40))
    plain, (plan, _) = evaluation.ranked(split), evaluation.ranked_by_plan(split, 0.05)
    assert plain["t2a"].figures()["r1"] < 0.5
    assert plan["t2a"].figures()["r1"] > 0.9


# --- token by token ---


@pytest.fixture(scope="module")
def late() -> DualEncoder:
    """A model whose tokens count differently."""
    torch.manual_seed(0)
    made = registry.build(settings_of().model.model_copy(update={"interaction": "late"}), RATE)
    for head in (made.audio_tokens, made.text_tokens):
        torch.nn.init.normal_(head.weigh.weight, std=0.5)
    return made


@pytest.fixture(scope="module")
def met(late, corpus) -> EncodedSplit:
    return evaluation.encode_split(late, corpus, "test", settings_of(), CPU)


def test_tokens_of_a_split_meet_as_those_of_its_clips_and_captions_do_one_by_one(late, met, corpus):
    plain = one_by_one(late, corpus, 10.0)
    late.eval()
    with torch.inference_mode():
        captions = [late.text_encoding(*late.tokenise([caption])) for caption in plain.captions]
        rows = [rows for group in corpus.groups("test") for rows in [corpus.read(group)]]
        waves = [torch.from_numpy(of.signal(row).astype(np.float32) / 32768)[None] for of in rows for row in range(len(of))]
        clips = [late.audio_encoding(wave, torch.tensor([wave.shape[1]])) for wave in waves]
        alone = torch.tensor([[float(scores(clip, caption)) for caption in captions] for clip in clips])
    torch.testing.assert_close((met.audio @ met.text.T + met.tokenwise) / 2, alone, atol=5e-4, rtol=0)  # 16 bits are kept
    assert torch.equal(met.owner, plain.owner)


def test_rankings_with_tokens_are_by_both_halves_and_knowledge_changes_one(met, known):
    whole = ((met.audio @ met.text.T + met.tokenwise) / 2).double()
    injected = evaluation.injected(met, known, AskSettings(neighbours=3))
    mixed = ((injected.audio @ injected.text.T + met.tokenwise) / 2).double()
    assert torch.equal(injected.tokenwise, met.tokenwise)
    for split, similarity in ((met, whole), (injected, mixed)):
        ranks = evaluation.ranked(split)["t2a"].rank
        right = similarity[met.owner, torch.arange(33)]
        assert np.abs(ranks - (similarity >= right - 1e-7).sum(0).numpy()).max() <= 1
    assert not torch.allclose(mixed, whole, atol=1e-3)
    assert not np.array_equal(evaluation.ranked(met)["t2a"].rank, evaluation.ranked(replace(met, tokenwise=None))["t2a"].rank)
    by_plan, found = evaluation.ranked_by_plan(met, 0.1)
    assert found.error <= 1e-3
    expected = whole + 0.1 * found.rows[:, None]
    assert np.mean(by_plan["t2a"].rank == (expected >= expected[met.owner, torch.arange(33)]).sum(0).numpy()) > 0.9


def test_tokens_of_a_split_meet_alike_in_any_chunks(late, met, corpus, monkeypatch):
    monkeypatch.setattr(interaction.score_rows, "__defaults__", (500,))
    chunked = evaluation.encode_split(late, corpus, "test", settings_of(), CPU)
    torch.testing.assert_close(chunked.tokenwise, met.tokenwise, atol=1e-6, rtol=0)


def test_scores_that_do_not_fit_where_temporary_files_lie_are_told_with_their_bytes(late, corpus):
    """No file may grow past 1000 bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=rf"11 clips with 33 captions take 1,452 bytes, which {gettempdir()} .* set TMPDIR"
        ):
            evaluation.encode_split(late, corpus, "test", settings_of(), CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_told_has_sizes_queries_and_intervals(encoded):
    made = evaluation.told(encoded, evaluation.ranked(encoded), resamples=50)
    plain = evaluation.both_ways(encoded)
    assert [made[way]["queries"] for way in ("t2a", "a2t")] == [33, 11]
    for way, of in made.items():
        assert {name: of[name] for name in plain[way]} == plain[way]
        assert of["intervals"].keys() == set(metrics.FIGURES)


def test_buckets_hold_every_clip_once_and_their_figures_are_of_their_clips_alone(encoded, corpus):
    trained = Frequencies.of(corpus.captions("train"))
    assert trained.clips == 6
    ways = evaluation.ranked(encoded)
    rows = evaluation.by_rarity(encoded, ways, trained)
    assert [row["bucket"] for row in rows] == [name for name in rarity.BUCKETS if name in {row["bucket"] for row in rows}]
    assert sum(row["clips"] for row in rows) == 11
    for row in rows:
        captions = [encoded.captions[3 * clip : 3 * clip + 3] for clip in range(11)]
        mine = [clip for clip in range(11) if rarity.BUCKETS[rarity.bucket(trained.clip(captions[clip]))] == row["bucket"]]
        assert row["clips"] == row["a2t"]["queries"] == len(mine)
        assert row["a2t"]["r1"] == np.mean(ways["a2t"].rank[mine] == 1)
        assert row["t2a"]["mean_rank"] == np.mean([ways["t2a"].rank[3 * clip + k] for clip in mine for k in range(3)])
