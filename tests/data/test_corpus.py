"""A prepared corpus: its counts, its row groups and what is read from them."""

import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from ask_ray.config import SettingsError
from ask_ray.data.corpus import Corpus
from ask_ray.data.schema import SPLITS
from ask_ray.storage import Folder, StorageError, digest_bytes


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path):
    (tmp_path / "clips").mkdir()
    with pytest.raises(SettingsError, match=r"manifest\.json") as refusal:
        Corpus.open(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '"text"', '{"splits": {"train": {}}}'])
def test_a_manifest_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SettingsError, match=r"manifest\.json"):
        Corpus.open(str(tmp_path))


def test_a_corpus_of_an_older_format_is_prepared_anew(small_corpus, tmp_path):
    Folder.at(str(tmp_path)).write_json("manifest.json", small_corpus.manifest | {"format": 1})
    with pytest.raises(SettingsError, match=r"format 1.*format 3: prepare it anew"):
        Corpus.open(str(tmp_path))


def test_identities_are_those_of_the_clips(small_corpus):
    for split in SPLITS:
        of = small_corpus.identities(split)
        assert of.ids == small_corpus.ids(split)
        assert of.source_ids == [None] * len(of.ids)
        waveforms = small_corpus.signals(split, range(len(of.ids)))
        assert of.digests == [digest_bytes(waveforms[place].tobytes()) for place in range(len(of.ids))]


def test_an_unknown_split_is_refused(small_corpus):
    with pytest.raises(SettingsError, match="train, validation, test"):
        small_corpus.clips("dev")


def test_row_groups_hold_every_clip_once(small_corpus):
    assert [group.clips for group in small_corpus.groups("train")] == [64, 36, 50]
    for split, count in zip(SPLITS, (150, 7, 20), strict=True):
        read = [small_corpus.read(group) for group in small_corpus.groups(split)]
        assert [len(rows) for rows in read] == [group.clips for group in small_corpus.groups(split)]
        assert [name for rows in read for name in rows.ids] == [f"{split}-{n:07d}" for n in range(count)]
        assert small_corpus.clips(split) == count


def test_what_is_read_is_what_the_files_hold(small_corpus):
    for group in small_corpus.groups("train"):
        whole = pq.read_table(small_corpus.folder.local / "clips" / group.file).slice(64 * group.number, group.clips).to_pylist()
        rows = small_corpus.read(group)
        assert rows.ids == [row["id"] for row in whole]
        assert rows.captions == [row["captions"] for row in whole]
        for n in (0, group.clips // 2, group.clips - 1):
            assert rows.signal(n).dtype == np.int16
            np.testing.assert_array_equal(rows.signal(n), whole[n]["waveform"])


def test_ids_columns_and_single_waveforms_are_those_of_the_whole(small_corpus):
    for split in SPLITS:
        assert small_corpus.ids(split) == [name for group in small_corpus.groups(split) for name in small_corpus.read(group).ids]
        assert {"id", "captions", "waveform"} <= set(small_corpus.columns(split))
    groups = [small_corpus.read(group) for group in small_corpus.groups("train")]
    whole = [rows.signal(row) for rows in groups for row in range(len(rows))]
    places = [149, 0, 63, 64, 99, 100, 101]  # in three row groups of two files, their first and last clips among them
    found = small_corpus.signals("train", places)
    assert sorted(found) == sorted(places)
    for place in places:
        np.testing.assert_array_equal(found[place], whole[place])
    assert small_corpus.signals("train", []) == {}


def test_an_empty_split_has_no_ids_and_no_columns(small_corpus):
    empty = {"clips": 0, "captions": 0, "most_captions": 0, "samples": 0, "seconds": 0.0, "files": []}
    splits = {**small_corpus.manifest["splits"], "validation": empty}
    corpus = Corpus(small_corpus.folder, {**small_corpus.manifest, "splits": splits})
    assert (corpus.ids("validation"), corpus.columns("validation"), corpus.groups("validation")) == ([], [], [])


@pytest.mark.parametrize("content", [None, b"PAR1 and no more"])
def test_files_that_are_gone_or_damaged_are_a_storage_error_with_their_place(content, recorded):
    corpus = recorded("own", dog=1)
    (file,) = (corpus.folder / "clips").local.glob("train*.parquet")
    (group,) = corpus.groups("train")
    file.unlink()
    if content:
        file.write_bytes(content)
    for read in (corpus.columns, corpus.ids, corpus.identities, lambda split: list(corpus.captions(split))):
        with pytest.raises(StorageError, match=rf"^{corpus.folder / 'clips'} cannot be read: .*; mend the storage, or prepare"):
            read("train")
    with pytest.raises(StorageError, match="cannot be read"):
        corpus.read(group)


def test_sizes_that_plan_memory_and_knowledge(small_corpus):
    assert small_corpus.sample_rate == 8000
    assert small_corpus.mean_bytes("train") == 2 * 8000
    assert [small_corpus.entries("train", count) for count in (1, 2, 3, 4)] == [150, 300, 450, 450]
    assert small_corpus.rejected() == {}


def test_a_corpus_can_be_handed_to_a_worker(small_corpus):
    assert pickle.loads(pickle.dumps(small_corpus)) == small_corpus
    assert Corpus.open(str(small_corpus.folder)) == small_corpus
