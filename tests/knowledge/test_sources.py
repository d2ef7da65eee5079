"""What a knowledge base is made from: names, what is refused before training, and that one recording counts once."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ask_ray.config import DataSettings, FolderSettings, SettingsError, SoundscapeSettings
from ask_ray.data import prepare
from ask_ray.data.corpora import source_of
from ask_ray.data.corpus import Corpus
from ask_ray.knowledge import sources
from ask_ray.knowledge.sources import Extent, Source, check_sources, sources_of
from ask_ray.storage import Folder, digest_bytes

RATE = 8000
TRAIN, HELD_OUT = 70, 3


def prepared(folder: Path, rate: int = RATE, **soundscapes: Any) -> Corpus:
    """Prepared soundscapes; clips of equal number, length and seed are the same recording in each."""
    scenes = {"train": TRAIN, "validation": HELD_OUT, "test": HELD_OUT, "seconds": 1, "captions": 2, **soundscapes}
    data = DataSettings(prepared=str(folder), sample_rate=rate, shard_clips=40, soundscapes=SoundscapeSettings(**scenes))
    source, home = source_of(data), Folder.at(str(folder))
    prepare._write_manifest(data, home, source, [prepare.write_shard(source, shard, home) for shard in source.shards()])
    return Corpus.open(str(folder))


def altered(corpus: Corpus, folder: Path, change: Callable[[pa.Table], pa.Table]) -> Corpus:
    """A copy of a corpus with every file changed."""
    (folder / "clips").mkdir(parents=True)
    for path in (corpus.folder.local / "clips").iterdir():
        pq.write_table(change(pq.read_table(path)), folder / "clips" / path.name, row_group_size=64)
    Folder.at(str(folder)).write_json("manifest.json", corpus.manifest)
    return Corpus.open(str(folder))


def put(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


def renamed(table: pa.Table) -> pa.Table:
    return put(table, "id", pa.array([f"other {one}" for one in table.column("id").to_pylist()]))


def with_a_changed_sample(table: pa.Table, *clips: str) -> pa.Table:
    """The table with another sixth sample in some clips."""
    waveforms = table.column("waveform").combine_chunks()
    offsets, samples = waveforms.offsets.to_numpy(), waveforms.values.to_numpy().copy()
    digests = table.column("digest").to_pylist()
    for row, clip in enumerate(table.column("id").to_pylist()):
        if clip in clips:
            samples[offsets[row] + 5] ^= 1
            digests[row] = digest_bytes(samples[offsets[row] : offsets[row + 1]].tobytes())
    return put(put(table, "waveform", pa.ListArray.from_arrays(waveforms.offsets, samples)), "digest", pa.array(digests))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def corpus(home) -> Corpus:
    return prepared(home / "corpus")


@pytest.fixture(scope="module")
def enriched(home) -> Corpus:
    return prepared(home / "enriched", train=50, captions=6)


@pytest.fixture(scope="module")
def foreign(home) -> Corpus:
    """Other recordings under ids of their own."""
    return altered(prepared(home / "seeded", seed=1), home / "foreign", renamed)


def check(corpus: Corpus, *wanted: str | Corpus, held_out: Sequence[Corpus] = ()) -> Extent:
    places = [one if isinstance(one, str) else str(one.folder) for one in wanted]
    return check_sources(sources_of(places, str(corpus.folder)), corpus, [str(one.folder) for one in held_out])


def refused(corpus: Corpus, *wanted: str | Corpus, held_out: Sequence[Corpus] = ()) -> str:
    with pytest.raises(SettingsError, match=r"^knowledge\.sources: ") as refusal:
        check(corpus, *wanted, held_out=held_out)
    return str(refusal.value)


# --- names ---


def test_sources_keep_their_order_and_each_has_a_name_of_its_own(corpus, tmp_path):
    places = ["/a/clotho", "train", "s3://bucket/clotho/", "/b/train", "/c/my corpus (2)", "/d/clotho-2"]
    made = sources_of(places, str(corpus.folder))
    assert made[1] == Source("train", str(corpus.folder), "train")
    assert [source.name for source in made] == ["clotho", "train", "clotho-2", "train-2", "my_corpus__2_", "clotho-2-2"]
    assert [source.corpus for source in made] == [*places[:1], str(corpus.folder), "s3://bucket/clotho", *places[3:]]
    assert [source.in_domain for source in made] == [False, True, False, False, False, False]
    assert {source.split for source in made} == {"train"}


def test_a_relative_place_is_made_absolute(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources_of(["other"], str(corpus.folder))[0].corpus == str(tmp_path / "other")


def test_one_corpus_in_two_words_is_refused(corpus, enriched):
    place = enriched.folder.local
    assert str(place) in refused(corpus, "train", str(place), str(place / ".." / "enriched"))
    assert "write train" in refused(corpus, corpus)


# --- what is accepted ---


def test_the_training_split_alone_needs_no_reading(corpus):
    unreadable = Corpus(Folder("/nowhere"), corpus.manifest)
    assert check_sources(sources_of(["train"], "/nowhere"), unreadable) == Extent(clips=TRAIN, own=TRAIN)


def test_recordings_count_once_whatever_the_number_of_their_sources(corpus, enriched, foreign):
    assert check(corpus, "train", enriched) == Extent(clips=TRAIN, own=TRAIN)
    assert check(corpus, enriched) == Extent(clips=50, own=50)
    assert check(corpus, "train", foreign) == Extent(clips=2 * TRAIN, own=TRAIN)
    assert check(corpus, foreign) == Extent(clips=TRAIN, own=0)
    assert check(corpus, enriched, foreign, "train") == Extent(clips=2 * TRAIN, own=TRAIN)


def test_an_enriched_corpus_in_another_order_is_the_same_recordings(corpus, enriched, tmp_path):
    turned = altered(enriched, tmp_path / "turned", lambda table: table.take(list(range(len(table)))[::-1]))
    assert turned.ids("train") != enriched.ids("train")
    assert check(corpus, "train", turned).clips == TRAIN


# --- what is refused ---


def test_a_place_without_a_prepared_corpus_is_refused(corpus, tmp_path):
    told = refused(corpus, "train", str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in told
    assert "manifest.json" in told
    assert "gopher" in refused(corpus, "gopher://nowhere/at/all")


def test_another_sample_rate_is_refused(corpus, home):
    told = refused(corpus, "train", prepared(home / "fast", rate=16000, train=2))
    assert "fast" in told
    assert "--data.sample_rate 8000" in told


@pytest.mark.parametrize("column", ["waveform", "captions"])
def test_a_source_without_a_modality_is_refused(corpus, enriched, tmp_path, column):
    told = refused(corpus, "train", altered(enriched, tmp_path / "half", lambda table: table.drop_columns([column])))
    assert f"half lacks {column}" in told


def test_a_source_without_training_clips_is_refused(corpus, enriched, tmp_path):
    manifest = copy.deepcopy(enriched.manifest)
    manifest["splits"]["train"] |= {"clips": 0, "files": []}
    Folder.at(str(tmp_path)).write_json("manifest.json", manifest)
    assert "no clips in its train split" in refused(corpus, "train", str(tmp_path))


@pytest.mark.parametrize("with_train", [True, False])
def test_another_recording_under_an_id_of_the_training_split_is_refused(corpus, home, with_train):
    """Whether or not the training split is a source: its pairs exclude by clip."""
    told = refused(corpus, *["train"] * with_train, prepared(home / f"clash-{with_train}", train=9, seed=3))
    assert f"clash-{with_train}" in told
    assert "another recording" in told
    assert "'train-0000000'" in told


def test_two_sources_with_the_same_id_for_different_recordings_are_refused(corpus, foreign, home, tmp_path):
    other = altered(prepared(home / "third", seed=7), tmp_path / "third", renamed)
    told = refused(corpus, "train", foreign, other)
    assert str(other.folder) in told
    assert str(foreign.folder) in told


def recorded(folder: Path, write_audio: Callable[..., Path], keep_seconds: float, **lengths: float) -> Corpus:
    """Prepared recordings of so many seconds by their names, `test…` held out; the same name and length is the same sound."""
    for name, seconds in lengths.items():
        write_audio(folder / "in" / f"{name}.wav", seconds=seconds, rate=RATE, hz=200.0 + sum(name.encode()))
    rows = [f"{name}.wav,{'test' if name.startswith('test') else 'train'},{name}" for name in lengths]
    (folder / "in" / "captions.csv").write_text("\n".join(["file_name,split,caption", *rows]))
    settings = FolderSettings(path=str(folder / "in"))
    data = DataSettings(corpus="folder", folder=settings, sample_rate=RATE, keep_seconds=keep_seconds)
    source, home = source_of(data), Folder.at(str(folder / "out"))
    prepare._write_manifest(data, home, source, [prepare.write_shard(source, shard, home) for shard in source.shards()])
    return Corpus.open(str(home))


def test_recordings_that_were_cut_at_other_lengths_are_refused_as_they_could_not_be_recognised(tmp_path, write_audio):
    run = recorded(tmp_path / "run", write_audio, 300, train=1, test=3)
    told = refused(run, "train", recorded(tmp_path / "cut", write_audio, 2, train=1, other=3))
    for word in ("cut", "keeps 2 s", "300 s", "--data.keep_seconds 300"):
        assert word in told
    assert "keeps 300 s" in refused(
        recorded(tmp_path / "2", write_audio, 2, train=1, test=3), recorded(tmp_path / "3", write_audio, 300, other=3)
    )


def test_other_lengths_make_no_difference_to_shorter_recordings(tmp_path, write_audio):
    run = recorded(tmp_path / "run", write_audio, 300, train=1, test=2)
    assert check(run, "train", recorded(tmp_path / "cut", write_audio, 2, train=1, other=3)) == Extent(clips=2, own=1)
    assert check(recorded(tmp_path / "2", write_audio, 2, train=3, test=1), recorded(tmp_path / "short", write_audio, 5, other=1))


def test_sources_that_were_cut_otherwise_than_each_other_are_refused(tmp_path, write_audio):
    run = recorded(tmp_path / "run", write_audio, 300, train=1, test=1)
    sources = [recorded(tmp_path / f"{kept}", write_audio, kept, other=3) for kept in (2, 2.5)]
    assert "--data.keep_seconds 2" in refused(run, "train", *sources)
    assert check(run, "train", sources[0]) == Extent(clips=2, own=1)


@pytest.mark.parametrize("clips", [(0,), (39,), (40, 41), (49,)])
def test_one_other_sample_in_any_shared_clip_is_seen(corpus, enriched, clips, tmp_path):
    named = [f"train-{clip:07d}" for clip in clips]
    changed = altered(enriched, tmp_path / "changed", lambda table: with_a_changed_sample(table, *named))
    told = refused(corpus, "train", changed)
    assert f"clip {named[0]!r} of {changed.folder} is another recording" in told
    assert f"({len(clips)} of 50 shared ids clash)" in told


@given(clash=st.sets(st.integers(0, 299), max_size=4))
def test_of_many_shared_ids_every_one_that_clashes_counts(clash):
    """So many that a sample of them would miss some."""
    source, other = Source("other", "/other", "train"), Corpus(Folder("/run"), {})
    there = {f"clip {number}": f"{number:032x}" for number in range(300)}
    clashing = [f"clip {number}" for number in sorted(clash)]
    here = there | dict.fromkeys(clashing, "other samples") | {"a clip of its own": "0"}
    if not clashing:
        sources._refuse_clash(source, here, other, there)
        return
    with pytest.raises(SettingsError, match=rf"clip '{clashing[0]}' of /other .*\({len(clashing)} of 300 shared ids clash\)"):
        sources._refuse_clash(source, here, other, there)


def with_one(table: pa.Table, column: str, value: str) -> pa.Table:
    """The table with another value of a column in training clip 45."""
    pairs = zip(table.column("id").to_pylist(), table.column(column).to_pylist(), strict=True)
    return put(table, column, pa.array([value if clip == "train-0000045" else old for clip, old in pairs], pa.string()))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_clips_that_the_run_holds_out_are_refused(corpus, enriched, tmp_path, split):
    leak = f"{split}-0000001"
    told = refused(corpus, "train", altered(enriched, tmp_path / "leak", lambda table: with_one(table, "id", leak)))
    assert f"leak holds 1 clips that are evaluated on (1 held out by id), such as {leak!r}" in told
    assert f"{split} clip {leak!r} of {corpus.folder}" in told
    assert f"--data.held_out '[{corpus.folder}]'" in told


@pytest.mark.parametrize("split", ["validation", "test"])
def test_clips_that_sound_as_one_that_is_held_out_are_refused(corpus, enriched, tmp_path, split):
    digest = corpus.identities(split).digests[2]
    told = refused(corpus, "train", altered(enriched, tmp_path / "leak", lambda table: with_one(table, "digest", digest)))
    assert "(1 held out by digest), such as 'train-0000045'" in told
    assert f"{split} clip '{split}-0000002'" in told


def test_clips_of_a_source_that_is_held_out_are_refused(corpus, enriched, tmp_path):
    def named(table: pa.Table) -> pa.Table:
        return put(table, "source_id", pa.array([f"freesound:{clip}" for clip in table.column("id").to_pylist()]))

    run = altered(corpus, tmp_path / "run", named)
    assert check(run, "train", enriched).clips == TRAIN  # clips without a source id are no leak
    same = altered(enriched, tmp_path / "same", named)
    assert check(run, "train", same).clips == TRAIN
    leaking = altered(same, tmp_path / "leak", lambda table: with_one(table, "source_id", "freesound:test-0000000"))
    told = refused(run, "train", leaking)
    assert "(1 held out by source id), such as 'train-0000045'" in told
    assert "test clip 'test-0000000'" in told


@pytest.mark.parametrize("split", ["validation", "test"])
def test_clips_that_another_corpus_holds_out_are_refused_where_the_run_holds_them_out_too(
    corpus, enriched, tmp_path, home, split
):
    other = altered(prepared(home / f"elsewhere-{split}", train=2, seed=11), tmp_path / "elsewhere", renamed)
    assert check(corpus, "train", enriched, held_out=[other]).clips == TRAIN
    digest = other.identities(split).digests[1]
    leaking = altered(enriched, tmp_path / "leak", lambda table: with_one(table, "digest", digest))
    told = refused(corpus, enriched, leaking, held_out=[other])
    assert f"{split} clip 'other {split}-0000001' of {other.folder}" in told
    assert f"--data.held_out '[{corpus.folder}, {other.folder}]'" in told
    third = altered(leaking, tmp_path / "third", renamed)
    assert check(corpus, "train", third).clips == 2 * TRAIN - 20, "nobody is evaluated on it"


def test_a_source_that_is_held_out_itself_is_not_told_to_hold_itself_out(corpus, home, tmp_path):
    source = altered(prepared(home / "itself", train=9, seed=12), tmp_path / "itself", renamed)
    assert check(corpus, source, held_out=[source]) == Extent(clips=9, own=0)
    leaking = altered(source, tmp_path / "leak", lambda table: put(table, "digest", pa.array(["0"] * len(table))))
    evaluated = altered(corpus, tmp_path / "run", lambda table: put(table, "digest", pa.array(["0"] * len(table))))
    assert f"--data.held_out '[{evaluated.folder}]'" in refused(evaluated, leaking, held_out=[leaking])


def test_a_source_that_was_cut_otherwise_than_a_corpus_that_is_held_out_is_refused(tmp_path, write_audio):
    """Of that corpus only what it is evaluated on matters."""
    run = recorded(tmp_path / "run", write_audio, 2, train=1, test=1)
    source = recorded(tmp_path / "source", write_audio, 300, other=3)
    other = recorded(tmp_path / "elsewhere", write_audio, 2, train=3, testing=1)
    assert check(run, "train", source, held_out=[other]).own == 1
    held = recorded(tmp_path / "held", write_audio, 2, testing=3, dog=1)
    assert f"{held.folder} 2 s" in refused(run, "train", source, held_out=[held])
