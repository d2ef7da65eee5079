"""Encoding sources with a real actor pool: the same bits as in this process, in order, and nothing lost unnoticed."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from ask_ray.config import DataSettings, ModelSettings, PoolSettings, SoundscapeSettings
from ask_ray.data import prepare
from ask_ray.data.corpora import source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.schema import id_number
from ask_ray.knowledge import encoding
from ask_ray.knowledge.encoding import EncodingError, EncodingPlan, encode, encode_rows, probe_units, units
from ask_ray.knowledge.snapshot import Embeddings, Entries
from ask_ray.knowledge.sources import sources_of
from ask_ray.models import registry
from ask_ray.models.dual_encoder import DualEncoder

RATE = 8000
MODEL = ModelSettings(width=0.1, dim=16)
CPU = torch.device("cpu")


def prepared(home: Path, name: str, **soundscapes: Any) -> Corpus:
    scenes = SoundscapeSettings(**{"train": 19, "validation": 0, "test": 1, "seconds": 1, "captions": 3, **soundscapes})
    data = DataSettings(prepared=str(home), sample_rate=RATE, shard_clips=8, soundscapes=scenes)
    source, folder = source_of(data), prepare.Folder.at(str(home / name))
    written = [prepare.write_shard(source, shard, folder) for shard in source.shards()]
    prepare._write_manifest(data, folder, source, written)
    return Corpus.open(str(folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepared(tmp_path_factory.mktemp("prepared"), "corpus")


@pytest.fixture(scope="module")
def enriched(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Recordings of the corpus, with other captions and more of them."""
    return prepared(tmp_path_factory.mktemp("prepared"), "enriched", train=11, captions=5)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    return registry.build(MODEL, RATE).eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the pool's actors: more threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of(corpus: Corpus, captions: int, actors: int = 1, seconds: float = 10.0, others: Sequence[Corpus] = ()) -> EncodingPlan:
    pool = PoolSettings(min_actors=actors, max_actors=actors, cpus=0.5, batch_size=5)
    sources = sources_of(["train", *(str(other.folder) for other in others)], str(corpus.folder))
    return EncodingPlan(sources, captions, seconds, MODEL, pool)


def here(model: DualEncoder, corpus: Corpus, plan: EncodingPlan) -> list[dict]:
    return [encode_rows(model, corpus.read(group), plan, RATE, CPU) for group in corpus.groups("train")]


def expected_entries(corpus: Corpus, captions: int) -> list[tuple[str, int, str]]:
    """(id, which, caption) of the entries of a source."""
    rows = [corpus.read(group) for group in corpus.groups("train")]
    clips = [(one, of) for part in rows for one, of in zip(part.ids, part.captions, strict=True)]
    return [(one, which, caption) for one, of in clips for which, caption in enumerate(of[:captions])]


@pytest.mark.parametrize(("captions", "actors"), [(1, 1), (2, 2)])
def test_the_pool_gives_the_bits_of_this_process_in_the_order_of_the_corpus(ray_session, corpus, model, captions, actors):
    plan, seen = plan_of(corpus, captions, actors), []
    entries, rows = encode(plan, ray.put(model.state_dict()), lambda done, total: seen.append((done, total)))
    expected = here(model, corpus, plan)
    for name in ("audio", "text"):
        assert getattr(rows, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(rows, name), np.concatenate([part[name] for part in expected]))
    assert told(entries) == expected_entries(corpus, captions)
    assert entries.which.tolist() == list(range(captions)) * 19
    assert entries.numbers.tolist() == [id_number(one) for one in entries.ids.to_pylist()]
    assert entries.per_source() == {"train": 19 * captions}
    assert entries.most_per_clip == captions
    assert sorted(done for done, _ in seen)[-1] == 19
    assert {total for _, total in seen} == {19}
    if captions == 2:
        np.testing.assert_array_equal(rows.audio[::2], rows.audio[1::2])
        assert not np.array_equal(rows.text[::2], rows.text[1::2])


def told(entries: Entries) -> list[tuple[str, int, str]]:
    return list(zip(entries.ids.to_pylist(), entries.which.tolist(), entries.captions.to_pylist(), strict=True))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_several_sources_are_encoded_in_their_order_each_as_alone(ray_session, corpus, enriched, model, order):
    """The second source has the first one's recordings with more captions: its entries keep numbers and gain texts."""
    plan = plan_of(corpus, 4, actors=2, others=[enriched])
    plan = replace(plan, sources=tuple(plan.sources[place] for place in order))
    parts = [[corpus, enriched][place] for place in order]
    seen: list[tuple[int, int]] = []
    entries, rows = encode(plan, ray.put(model.state_dict()), lambda done, total: seen.append((done, total)))
    alone = [part for source in parts for part in here(model, source, plan)]
    for name in ("audio", "text"):
        np.testing.assert_array_equal(getattr(rows, name), np.concatenate([part[name] for part in alone]))
    assert told(entries) == [entry for source in parts for entry in expected_entries(source, 4)]
    names = [["train", "enriched"][place] for place in order]
    counts = {"train": 19 * 3, "enriched": 11 * 4}
    assert entries.sources == names
    assert [entries.sources[code] for code in entries.source] == [name for name in names for _ in range(counts[name])]
    assert entries.most_per_clip == 7
    assert seen[-1] == (30, 30)
    _same_recordings_have_the_same_audio(entries, rows)


def _same_recordings_have_the_same_audio(entries: Entries, rows: Embeddings) -> None:
    for number in np.unique(entries.numbers[entries.source == entries.sources.index("enriched")]):
        audio = rows.audio[entries.numbers == number]
        assert len(audio) == 7
        np.testing.assert_allclose(audio, np.broadcast_to(audio[:1], audio.shape), atol=1e-6)  # other batches, other last bits


def test_units_are_row_groups_by_source_then_as_in_the_corpus(corpus, enriched):
    every = units(plan_of(corpus, 1, others=[enriched]))
    assert [unit.source.name for unit in every] == ["train"] * 3 + ["enriched"] * 2
    assert [unit.group for unit in every] == corpus.groups("train") + enriched.groups("train")
    assert [unit.read().ids for unit in every[3:]] == [enriched.read(group).ids for group in enriched.groups("train")]


@given(clips=st.integers(1, 40))
def test_a_probe_has_enough_clips_in_units_spread_over_all_sources(corpus, enriched, clips):
    plan = plan_of(corpus, 1, others=[enriched])
    every, chosen = units(plan), probe_units(plan, clips)
    places = [every.index(unit) for unit in chosen]
    assert places == sorted(set(places))
    assert sum(unit.group.clips for unit in chosen) >= min(clips, 30)
    assert len(chosen) <= -(-clips // 8) + 2
    if len(chosen) > 1:
        assert {unit.source.name for unit in chosen} == {"train", "enriched"}
        assert np.ptp(np.diff(places)) <= 1


def test_the_rows_of_a_probe_are_found_among_the_entries(corpus, enriched, model):
    """As the pool gives them: entries of both sources, of which the clips have equal numbers."""
    plan = plan_of(corpus, 4, others=[enriched])
    parts = [(unit.source.name, encode_rows(model, unit.read(), plan, RATE, CPU)) for unit in units(plan)]
    columns = {name: np.concatenate([part[name] for _, part in parts]) for name in ("id", "number", "caption", "which")}
    sources = [name for name, part in parts for _ in part["id"]]
    locator = Entries.of_lists(*columns.values(), sources).locator()
    found = [locator.find(part["number"], part["which"], source) for source, part in parts]
    assert np.concatenate(found).tolist() == list(range(19 * 3 + 11 * 4))


def test_rows_are_what_the_model_gives_one_clip_and_one_caption_at_a_time(corpus, model):
    part = here(model, corpus, plan_of(corpus, 3))[2]
    rows = corpus.read(corpus.groups("train")[2])
    assert len(part["id"]) == 9
    for row in range(9):
        clip, which = divmod(row, 3)
        waveform = torch.from_numpy(rows.signal(clip).astype(np.float32) / 32768)[None]
        with torch.inference_mode():
            audio = model.encode_audio(waveform, torch.tensor([waveform.shape[1]]))
            text = model.encode_text(*model.tokenise([rows.captions[clip][which]]))
        assert (part["id"][row], part["which"][row]) == (rows.ids[clip], which)
        np.testing.assert_allclose(part["audio"][row], audio[0], atol=1e-5)
        np.testing.assert_allclose(part["text"][row], text[0], atol=1e-5)


def test_captions_that_a_clip_lacks_make_no_entries(corpus, model):
    assert [len(part["id"]) for part in here(model, corpus, plan_of(corpus, 9))] == [24, 24, 9]


def test_long_clips_are_cropped_from_the_start(corpus, model):
    part = here(model, corpus, plan_of(corpus, 1, seconds=0.5))[0]
    whole = here(model, corpus, plan_of(corpus, 1))[0]
    rows = corpus.read(corpus.groups("train")[0])
    start = torch.from_numpy(rows.signal(0)[: RATE // 2].astype(np.float32) / 32768)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(part["audio"][0], model.encode_audio(start, torch.tensor([RATE // 2]))[0], atol=1e-5)
    assert not np.allclose(part["audio"], whole["audio"], atol=1e-3)


# --- what came back, and what did not ---


def by_unit(corpus: Corpus, model: DualEncoder) -> dict[int, dict[str, np.ndarray]]:
    """What the pool gives, by row group, made by one of its actors outside of it."""
    actor = encoding.Encoder.__new__(encoding.Encoder)
    actor.plan, actor.units, actor.rate = plan_of(corpus, 2), units(plan_of(corpus, 2)), RATE
    actor.model, actor.device = model, CPU
    made = {unit: actor({"unit": np.array([unit])}) for unit in range(3)}
    return {unit: {name: np.asarray(column) for name, column in part.items()} for unit, part in made.items()}


@pytest.fixture
def found(corpus, model) -> dict[int, dict[str, np.ndarray]]:
    return by_unit(corpus, model)


def check(found: dict[int, dict[str, np.ndarray]], corpus: Corpus) -> None:
    encoding._check(found, units(plan_of(corpus, 2)))


def only(part: dict[str, np.ndarray], rows: list[int]) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in part.items()}


def test_all_rows_are_accepted(found, corpus):
    check(found, corpus)


def test_a_missing_unit_is_refused(found, corpus):
    del found[1]
    with pytest.raises(EncodingError, match=r"row group 0 of .*train-000001\.parquet is missing: 2 of 3"):
        check(found, corpus)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(list(range(2, 16)), id="a clip lost"),
        pytest.param(list(range(1, 16)), id="a caption lost"),
        pytest.param([0, *range(16)], id="a row twice"),
        pytest.param([0, 0, *range(2, 16)], id="a row twice in place of another"),
        pytest.param([0, 1, 0, 1, *range(4, 16)], id="a clip twice in place of another"),
    ],
)
def test_lost_and_double_rows_are_refused(found, corpus, rows):
    found[0] = only(found[0], rows)
    with pytest.raises(EncodingError, match="row group 0 of"):
        check(found, corpus)


def test_a_unit_of_other_size_than_the_corpus_says_is_refused(found, corpus):
    found[2] = only(found[0], list(range(16)))
    with pytest.raises(EncodingError, match=r"row group 0 of .*train-000002\.parquet: 8 of 3 clips"):
        check(found, corpus)


@pytest.mark.parametrize("name", ["audio", "text"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_number_that_is_not_finite_is_refused(found, corpus, name, value):
    found[2][name] = found[2][name].copy()
    found[2][name][-1, -1] = value
    with pytest.raises(EncodingError, match=rf"row group 0 of .*train-000002\.parquet: {name} embeddings are not finite"):
        check(found, corpus)


def test_what_weights_of_nan_give_is_refused(corpus, model):
    broken = copy.deepcopy(model)
    broken.load_state_dict({name: torch.full_like(value, torch.nan) for name, value in model.state_dict().items()})
    with pytest.raises(EncodingError, match=r"row group 0 of .*: audio embeddings are not finite"):
        check(by_unit(corpus, broken), corpus)
