"""How a clip of an evaluation split is recognised: by id, by source id, by the digest of its samples."""

from functools import partial

import numpy as np
import pytest

from ask_ray.config import DataSettings, FolderSettings, SettingsError, SoundscapeSettings
from ask_ray.data import prepare
from ask_ray.data.corpora import source_of
from ask_ray.data.corpus import Corpus
from ask_ray.data.held_out import Found, HeldOut
from ask_ray.data.schema import Clip
from ask_ray.modality import Form
from ask_ray.storage import Folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    home = Folder.at(str(tmp_path_factory.mktemp("corpus")))
    scenes = SoundscapeSettings(train=3, validation=2, test=2, seconds=1, captions=1)
    data = DataSettings(sample_rate=8000, soundscapes=scenes)
    source = source_of(data)
    prepare._write_manifest(data, home, source, [prepare.write_shard(source, shard, home) for shard in source.shards()])
    return Corpus.open(home.uri)


def test_validation_and_test_are_held_out_and_training_is_not(corpus):
    held_out = HeldOut.of([corpus])
    assert set(held_out.ids) == {"validation-0000000", "validation-0000001", "test-0000000", "test-0000001"}
    assert len(held_out.digests) == 4
    assert held_out.find("test-0000001") == Found("held out by id", f"test clip 'test-0000001' of {corpus.folder}")
    for clip in zip(*corpus.identities("train"), strict=True):
        assert held_out.find(*clip) is None
    for _, source_id, digest in zip(*corpus.identities("validation"), strict=True):
        assert held_out.find("another name", source_id, digest).reason == "held out by digest"


def test_the_id_is_told_before_the_source_and_the_source_before_the_digest():
    held_out = HeldOut({"a": "1"}, {"s": "2"}, {"d": "3"})
    assert held_out.find("a", "s", "d") == Found("held out by id", "1")
    assert held_out.find("b", "s", "d") == Found("held out by source id", "2")
    assert held_out.find("b", None, "d") == Found("held out by digest", "3")
    assert held_out.find("b", "d", "a") is None
    assert HeldOut().find("a", "s", "d") is None


def test_a_missing_source_id_is_no_source_id():
    assert HeldOut(source_ids={}).find("a", None, None) is None


def test_both_are_held_out_and_the_first_tells_where():
    both = HeldOut({"a": "here"}).joined(HeldOut({"a": "there", "b": "there"}, digests={"d": "there"}))
    assert (both.ids, both.digests) == ({"a": "here", "b": "there"}, {"d": "there"})


def test_the_key_changes_with_what_is_held_out_alone():
    key = HeldOut({"a": "1"}, {"s": "2"}).key()
    assert HeldOut({"a": "elsewhere"}, {"s": "2"}).key() == key
    assert len({key, HeldOut({"b": "1"}, {"s": "2"}).key(), HeldOut({"s": "1"}, {"a": "2"}).key(), HeldOut().key()}) == 4


def test_corpora_to_compare_with_must_be_there_and_have_the_same_rate(corpus, tmp_path):
    assert HeldOut.named([corpus.folder.uri], Form("audio", 8000)) == HeldOut.of([corpus])
    with pytest.raises(SettingsError, match=r"^data\.held_out: .*manifest\.json"):
        HeldOut.named([str(tmp_path)], Form("audio", 8000))
    with pytest.raises(SettingsError, match=r"^data\.held_out: .*has 8000 Hz, .*data\.sample_rate 16000"):
        HeldOut.named([corpus.folder.uri], Form("audio", 16000))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, write_audio):
    """A function that prepares recordings of some lengths in each split, of which so many seconds are kept."""

    def prepared(keep_seconds: float, **lengths: float) -> Corpus:
        root, home = tmp_path_factory.mktemp("recordings"), Folder.at(str(tmp_path_factory.mktemp("corpus")))
        for split, seconds in lengths.items():
            write_audio(root / f"{split}.wav", seconds=seconds, rate=11025, hz=300 + 100 * len(split))
        rows = [f"{split}.wav,{split},x" for split in lengths]
        (root / "captions.csv").write_text("\n".join(["file_name,split,caption", *rows]))
        data = DataSettings(corpus="folder", folder=FolderSettings(path=str(root)), sample_rate=8000, keep_seconds=keep_seconds)
        source = source_of(data)
        prepare._write_manifest(data, home, source, [prepare.write_shard(source, shard, home) for shard in source.shards()])
        return Corpus.open(home.uri)

    return prepared


@pytest.mark.parametrize(
    ("kept", "test", "here", "comparable"),
    [
        (300, 2.5, 300, True),
        (300, 2.5, 10, True),
        (300, 2.5, 2.5, True),
        (300, 2.5, 2.4, False),
        (300, 2.5, 1, False),
        (2.5, 2.5, 300, True),
        (2, 2.5, 300, False),
        (2, 2.5, 2, True),
        (2, 2.5, 1, False),
    ],
)
def test_a_corpus_of_which_more_or_less_would_be_kept_here_is_refused(kept, test, here, comparable, recorded):
    """Where it is evaluated on longer recordings: how long those are that it trains on is all the same."""
    corpus = recorded(kept, train=6, test=test)
    named = partial(HeldOut.named, [corpus.folder.uri], Form("audio", 8000, here))
    if comparable:
        assert set(named().ids) == {"test.wav"}
    else:
        with pytest.raises(SettingsError, match=rf"^data\.held_out: .* keeps {kept} s .* keep {here} s \(data\.keep_seconds\)"):
            named()


def test_the_digest_of_a_recording_is_lost_when_it_is_cut_otherwise(recorded):
    corpora = [recorded(kept, train=1, test=2.5) for kept in (300, 2.5, 2)]
    whole, as_long, shorter = (corpus.identities("test").digests for corpus in corpora)
    assert whole == as_long != shorter


def test_a_digest_is_of_the_samples_alone():
    samples = np.arange(100, dtype=np.int16)
    clips = [Clip(name, "train", ("x",), samples.copy(), name, 8000, rate) for name, rate in (("a", 8000), ("b", 44100))]
    assert clips[0].digest == clips[1].digest
    samples[50] += 1
    assert Clip("a", "train", ("x",), samples, "a", 8000, 8000).digest != clips[0].digest
