"""Training batches: fair shares, the same again after a restart, captions of the very clip."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from ask_ray.config import DataSettings, FolderSettings
from ask_ray.data.batches import Batch, TrainingBatches, crop, epoch_order, longest, pad
from ask_ray.data.corpus import ClipRows, Corpus, Group
from ask_ray.data.prepare import prepare
from ask_ray.data.schema import SPLITS, id_number
from ask_ray.storage import Folder

GROUPS = st.lists(st.integers(1, 64), min_size=1, max_size=12)


def letters(captions) -> tuple[torch.Tensor, torch.Tensor]:
    """A tokeniser that loses nothing: code points."""
    rows = [torch.tensor([ord(letter) for letter in caption]) for caption in captions]
    words = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return words, words != 0


def read_back(batch: Batch) -> list[str]:
    return ["".join(map(chr, row[mask].tolist())) for row, mask in zip(batch.words, batch.mask, strict=True)]


def batches_of(corpus: Corpus, batch_size: int = 16, rank: int = 0, workers: int = 2, seed: int = 0, **data) -> TrainingBatches:
    return TrainingBatches(corpus, DataSettings(**data), letters, batch_size, seed, rank, workers)


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name


# --- the order of an epoch


@given(groups=GROUPS, seed=st.integers(0, 2**31), epoch=st.integers(0, 99), workers=st.integers(1, 5), window=st.integers(1, 99))
@budget(max_examples=150, deadline=None)
def test_every_worker_gets_an_equal_share_and_no_clip_goes_to_two(groups, seed, epoch, workers, window):
    total = sum(groups)
    if total < workers:
        return
    shares = [epoch_order(groups, seed, epoch, rank, workers, window) for rank in range(workers)]
    assert {len(share) for share in shares} == {total // workers}
    dealt = [place for share in shares for place in share]
    assert len(set(dealt)) == len(dealt) > total - workers
    assert set(dealt) <= {(group, row) for group, count in enumerate(groups) for row in range(count)}
    assert shares == [epoch_order(groups, seed, epoch, rank, workers, window) for rank in range(workers)]


@given(epoch=st.integers(0, 99), rank=st.integers(0, 1), seed=st.integers(0, 99))
@budget(max_examples=30, deadline=None)
def test_the_order_changes_with_the_epoch_and_with_the_seed(epoch, rank, seed):
    def order(*given: int) -> list:
        return epoch_order([64, 64, 50], *given, rank, 2, 1000)

    assert order(seed, epoch) != order(seed, epoch + 1)
    assert order(seed, epoch) != order(seed + 1, epoch)
    assert sorted(order(seed, epoch)) != order(seed, epoch)


def test_what_sits_out_one_epoch_is_seen_in_another():
    seen = {place for epoch in range(30) for rank in range(3) for place in epoch_order([7, 7], 0, epoch, rank, 3, 8)}
    assert len(seen) == 14


@given(window=st.integers(1, 200), epoch=st.integers(0, 9))
@budget(max_examples=30, deadline=None)
def test_a_worker_reads_few_row_groups_and_shuffles_no_further_than_its_window(window, epoch):
    groups = [10] * 20
    for rank in range(4):
        order = epoch_order(groups, 0, epoch, rank, 4, window)
        assert len({group for group, _ in order}) <= 50 // 10 + 1
        for start in range(0, 50, window):
            assert len({group for group, _ in order[start : start + window]}) <= -(-window // 10) + 1


# --- padding and cropping


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
@budget(max_examples=50, deadline=None)
def test_padding_keeps_every_sample(lengths, seed):
    rng = np.random.default_rng(seed)
    waveforms = [rng.integers(-32768, 32768, length).astype(np.int16) for length in lengths]
    padded, found = pad(waveforms)
    assert (padded.shape, padded.dtype, found.tolist()) == ((len(lengths), max(lengths)), torch.float32, lengths)
    assert padded.abs().max() <= 1
    for row, one in zip(padded, waveforms, strict=True):
        np.testing.assert_array_equal(row[: len(one)].numpy() * 32768, one)
        assert not row[len(one) :].any()


@given(length=st.integers(1, 60), limit=st.integers(1, 60), seed=st.integers(0, 99))
@budget(deadline=None)
def test_a_crop_is_a_stretch_of_the_clip(length, limit, seed):
    waveform = np.arange(length, dtype=np.int16)
    np.testing.assert_array_equal(crop(waveform, limit), waveform[:limit])
    made = crop(waveform, limit, np.random.default_rng(seed))
    assert len(made) == min(length, limit)
    np.testing.assert_array_equal(made, np.arange(made[0], made[0] + len(made)))


def test_random_crops_reach_both_ends():
    rng = np.random.default_rng(0)
    starts = {int(crop(np.arange(10), 7, rng)[0]) for _ in range(200)}
    assert starts == {0, 1, 2, 3}


# --- batches of a real corpus


@pytest.fixture(scope="module")
def captions(small_corpus) -> dict[int, list[str]]:
    read = [small_corpus.read(group) for split in SPLITS for group in small_corpus.groups(split)]
    return {id_number(name): texts for rows in read for name, texts in zip(rows.ids, rows.captions, strict=True)}


def test_an_epoch_holds_full_batches_of_clips_with_one_of_their_captions(small_corpus, captions):
    seen: list[int] = []
    for rank in range(2):
        made = batches_of(small_corpus, rank=rank)
        epoch = list(made.epoch(3))
        assert len(epoch) == made.steps == 150 // 2 // 16
        for batch in epoch:
            assert (batch.inputs.shape, batch.inputs.dtype) == ((16, 8000), torch.float32)
            assert batch.sizes.tolist() == [8000] * 16
            assert batch.inputs.abs().amax(1).min() > 1e-3
            own = [captions[clip][n] for clip, n in zip(batch.ids.tolist(), batch.captions.tolist(), strict=True)]
            assert read_back(batch) == own
            seen += batch.ids.tolist()
    assert len(set(seen)) == len(seen) == 2 * 4 * 16
    assert set(seen) <= set(captions)


def test_a_waveform_belongs_to_its_id(small_corpus):
    stored = {}
    for group in small_corpus.groups("train"):
        rows = small_corpus.read(group)
        stored |= {id_number(name): rows.signal(n) for n, name in enumerate(rows.ids)}
    for batch in batches_of(small_corpus, workers=1).epoch(0):
        for clip, waveform in zip(batch.ids.tolist(), batch.inputs, strict=True):
            np.testing.assert_array_equal(waveform.numpy() * 32768, stored[clip])


def test_captions_are_drawn_anew_each_epoch(small_corpus):
    made = batches_of(small_corpus, batch_size=150, workers=1)
    drawn = []
    for epoch in range(6):
        (batch,) = made.epoch(epoch)
        drawn.append(dict(zip(batch.ids.tolist(), batch.captions.tolist(), strict=True)))
    assert {n for one in drawn for n in one.values()} == {0, 1, 2}
    assert sum(len({one[clip] for one in drawn}) > 1 for clip in drawn[0]) > 140


def test_epochs_ranks_and_seeds_differ_and_the_same_comes_again(small_corpus):
    def first(epoch: int = 0, **options) -> Batch:
        return next(batches_of(small_corpus, **options).epoch(epoch))

    assert_same(first(), first())
    for other in (first(1), first(rank=1), first(seed=1)):
        assert not torch.equal(first().captions, other.captions)
        assert not torch.equal(first().ids, other.ids)


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("skipped", [0, 1, 3, 4])
def test_an_epoch_taken_up_at_a_step_goes_on_as_if_never_stopped(skipped, loaders, small_corpus):
    expected = list(batches_of(small_corpus).epoch(2))[skipped:]
    found = list(batches_of(small_corpus, loader_processes=loaders).epoch(2, first=skipped))
    assert len(found) == len(expected) == 4 - skipped
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_an_epoch_draws_none_of_the_models_random_numbers(small_corpus):
    before = torch.get_rng_state()
    next(batches_of(small_corpus).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("data", [{"cache_mib": 0}, {"cache_mib": 0, "loader_processes": 1}, {"cache_mib": 1}])
def test_a_small_cache_costs_time_not_clips(data, small_corpus, captions):
    made = [batch for rank in range(2) for batch in batches_of(small_corpus, rank=rank, **data).epoch(0)]
    seen = [clip for batch in made for clip in batch.ids.tolist()]
    assert len(set(seen)) == len(seen) == 128
    assert all(text in captions[clip] for batch in made for clip, text in zip(batch.ids.tolist(), read_back(batch), strict=True))


def test_with_a_cache_a_row_group_is_read_once(small_corpus, monkeypatch):
    read: list = []
    real = Corpus.read
    monkeypatch.setattr(Corpus, "read", lambda corpus, group: read.append(group) or real(corpus, group))
    made = batches_of(small_corpus, workers=1)
    for epoch in range(2):
        assert len(list(made.epoch(epoch))) == 9
    assert sorted(read) == sorted(small_corpus.groups("train"))


@dataclass(frozen=True)
class Large(Corpus):
    """A corpus too large for any cache here: 4000 clips of one mebibyte's 16th, silent, whose reads are counted."""

    reads: list[Group] = field(default_factory=list)

    def read(self, group: Group) -> ClipRows:
        self.reads.append(group)
        ids = [f"{group.file}-{group.number}-{row}" for row in range(group.clips)]
        samples, offsets = np.zeros(group.clips << 15, np.int16), np.arange(group.clips + 1) << 15
        return ClipRows(ids, [["a bell"]] * group.clips, samples, offsets)


def large() -> Large:
    files = [{"name": f"train-{number}", "clips": 250} for number in range(16)]
    split = {"clips": 4000, "samples": 4000 << 15, "files": files}
    return Large(
        Folder.at("nowhere"),
        {"modality": "audio", "sample_rate": 8000, "settings": {"keep_seconds": 300}, "splits": {"train": split}},
    )


@pytest.mark.parametrize(("loaders", "cache_mib"), [(0, 32), (2, 64)])
def test_a_window_is_no_larger_than_what_the_cache_holds(loaders, cache_mib):
    """250 MiB through 32: each row group is read little more than once, by each process that reads."""
    made = batches_of(corpus := large(), workers=1, cache_mib=cache_mib, loader_processes=loaders)
    order = made._order(0)
    places = [order[step * 16 : (step + 1) * 16] for step in range(0, made.steps, max(1, loaders))]
    for of_batch in places:
        made._batch(of_batch, np.random.default_rng(0))
    assert len(corpus.reads) < 1.3 * len(corpus.groups("train"))
    assert made._cache.currsize <= 32 << 20


def test_a_row_group_that_is_larger_than_the_cache_is_read_once_for_a_batch():
    made = batches_of(corpus := large(), workers=1, cache_mib=0)
    for step in range(40):
        made._batch(made._order(0)[step * 16 : (step + 1) * 16], np.random.default_rng(0))
    assert len(corpus.reads) <= 2 * 40
    assert len(corpus.reads) < 25, "one is kept from batch to batch"


def test_long_clips_are_cropped_to_max_seconds(small_corpus):
    made = batches_of(small_corpus, max_seconds=0.25)
    whole = batches_of(small_corpus)
    starts = set()
    for short, full in zip(made.epoch(0), whole.epoch(0), strict=True):
        assert torch.equal(short.ids, full.ids)
        assert short.inputs.shape == (16, 2000)
        assert short.sizes.tolist() == [2000] * 16
        for part, all_of_it in zip(short.inputs, full.inputs, strict=True):
            (start,) = (all_of_it.unfold(0, 2000, 1) == part).all(1).nonzero().flatten().tolist()
            starts.add(start)
    assert len(starts) > 20
    assert max(starts) > 3000


def test_an_epoch_has_as_many_steps_as_every_rank_can_fill(small_corpus):
    assert [batches_of(small_corpus, batch_size=size, workers=1).steps for size in (150, 76, 75, 1)] == [1, 1, 2, 150]


def test_clips_of_all_lengths_are_padded(ray_session, tmp_path, write_audio):
    seconds = {f"{n}.wav": 0.2 + 0.05 * n for n in range(12)}
    for name, length in seconds.items():
        write_audio(tmp_path / "in" / name, seconds=length)
    (tmp_path / "in" / "captions.csv").write_text("file_name,caption\n" + "".join(f"{name},{name}\n" for name in seconds))
    folder = FolderSettings(path=str(tmp_path / "in"), validation=0, test=0)
    data = DataSettings(corpus="folder", folder=folder, prepared=str(tmp_path / "out"), shard_clips=5)
    made = replace(batches_of(prepare(data), batch_size=4, workers=1), data=data)
    for batch in made.epoch(0):
        expected = [round(16000 * seconds[name]) for name in read_back(batch)]
        assert batch.sizes.tolist() == expected
        assert batch.inputs.shape == (4, max(expected))
        for waveform, length in zip(batch.inputs, expected, strict=True):
            assert waveform[length - 50 : length].any()
            assert not waveform[length:].any()


def test_pictures_are_padded_below_and_to_the_right_and_cropped_by_their_tower() -> None:
    draw = np.random.default_rng(0)
    pictures = [draw.integers(1, 256, sides, dtype=np.uint8) for sides in ((10, 30, 3), (20, 8, 3))]
    assert longest(1.0, None) is None
    assert all(crop(one, longest(1.0, None), draw) is one for one in pictures)
    padded, sizes = pad(pictures)
    assert (padded.shape, padded.dtype) == ((2, 3, 20, 30), torch.uint8)
    assert sizes.tolist() == [[10, 30], [20, 8]]
    for row, (picture, (height, width)) in enumerate(zip(pictures, sizes.tolist(), strict=True)):
        np.testing.assert_array_equal(padded[row, :, :height, :width].permute(1, 2, 0).numpy(), picture)
        assert not padded[row, :, height:].any()
        assert not padded[row, :, :, width:].any()
