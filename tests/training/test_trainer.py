"""What is refused before training: K and Nc against what all sources of the knowledge base hold together; why a run failed."""

from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train.v2.api.exceptions import WorkerGroupError

from ask_ray.config import Settings, SettingsError, load
from ask_ray.data.corpus import Corpus
from ask_ray.data.prepare import prepare
from ask_ray.data.schema import FORMAT, SPLITS
from ask_ray.knowledge.sources import Extent, Source
from ask_ray.storage import Folder
from ask_ray.training import trainer

CLIPS = 150  # of the small corpus


@pytest.fixture(scope="module")
def enriched(small_corpus, tmp_path_factory) -> Corpus:
    """The small corpus's recordings with six captions in place of three."""
    data = {"data": small_corpus.manifest["settings"]}
    data["data"] = data["data"] | {"prepared": str(tmp_path_factory.mktemp("enriched"))}
    data["data"]["soundscapes"] = data["data"]["soundscapes"] | {"captions": 6}
    return prepare(load(data).data)


def settings_of(sources: list[str], captions: int = 4, **ask: object) -> Settings:
    return load(
        {
            "model": {"width": 0.1, "dim": 16},
            "training": {"workers": 2, "batch_size": 8},
            "knowledge": {"sources": sources, "captions_per_clip": captions},
            "ask": {"prototypes": 8, **ask},
        }
    )


@pytest.mark.parametrize(("exclude", "most"), [("none", CLIPS), ("self", CLIPS - 1), ("batch", CLIPS - 16)])
def test_an_enriched_source_gives_no_more_clips_to_retrieve(small_corpus, enriched, exclude, most):
    for sources in (["train"], ["train", str(enriched.folder)], [str(enriched.folder)]):
        trainer.check(settings_of(sources, exclude=exclude, neighbours=most), small_corpus)
        with pytest.raises(SettingsError, match=rf"ask\.neighbours is {most + 1}, but .* {CLIPS} clips {most} are left"):
            trainer.check(settings_of(sources, exclude=exclude, neighbours=most + 1), small_corpus)


def test_an_enriched_source_gives_more_entries_to_make_prototypes_of(small_corpus, enriched):
    sources = ["train", str(enriched.folder)]
    most = CLIPS * 3 + CLIPS * 4
    trainer.check(settings_of(sources, prototypes=most), small_corpus)
    with pytest.raises(SettingsError, match=rf"ask\.prototypes is {most + 1}, but the knowledge base has {most} entries"):
        trainer.check(settings_of(sources, prototypes=most + 1), small_corpus)


def test_towers_that_are_built_before_a_run_tell_their_size_and_how_many_frames_a_clip_has():
    settings = load({"model": {"width": 0.1, "dim": 16}, "data": {"sample_rate": 8000, "max_seconds": 2}})
    plain = trainer.check_towers(settings)
    late = trainer.check_towers(settings.model_copy(update={"model": settings.model.model_copy(update={"interaction": "late"})}))
    assert plain.frames == 0
    assert late.frames == 26  # 101 frames of 20 ms, in fours
    assert late.parameters > plain.parameters
    seen = load(
        {"model": {"width": 0.1, "dim": 16, "interaction": "late"}, "data": {"corpus": "coco", "coco": {"path": "/coco"}}}
    )
    assert trainer.check_towers(seen).frames == 64  # cells of a grid of 8 × 8


def test_a_source_that_cannot_be_used_is_refused_only_where_it_is_read(small_corpus, tmp_path):
    with pytest.raises(SettingsError, match=rf"^knowledge\.sources: {tmp_path}"):
        trainer.check(settings_of(["train", str(tmp_path)]), small_corpus)
    trainer.check(settings_of(["train", str(tmp_path)], enabled=False), small_corpus)


def corpus_of(home: Path, clips: int, captions: int, test: int = 0) -> Corpus:
    """A corpus of which there is no more than what its manifest tells: clips to train on and test clips."""
    splits = {
        split: {"clips": count, "most_captions": captions, "files": [{"name": "clips", "clips": count}]}
        for split, count in zip(SPLITS, (clips, 0, test), strict=True)
    }
    folder = Folder.at(str(home))
    folder.write_json("manifest.json", {"format": FORMAT, "splits": splits})
    return Corpus.open(folder.uri)


def refreshed(**refresh: object) -> Settings:
    """Settings of a run of 80 steps, of which the first 8 are warm-up."""
    training = {"epochs": 10, "workers": 1, "batch_size": 50, "device": "cpu"}
    return load({"training": training, "knowledge": {"refresh": {"warmup_epochs": 1, **refresh}}})


STEPS = {"policy": "adaptive", "unit": "steps", "max_interval": 1000}


@pytest.mark.parametrize(
    ("refresh", "named"),
    [
        ({**STEPS, "min_interval": 72}, "min_interval: 72 steps after the 8 of warm-up are not below the 80"),
        ({"policy": "continuous", "unit": "steps", "min_interval": 500}, "min_interval: 500 steps"),
        ({**STEPS, "min_interval": 10, "signal": "probe", "probe_steps": 80}, "probe_steps is 80, and the run has 80 steps"),
        ({"poll_steps": 80}, "poll_steps is 80, and the run has 80 steps"),
    ],
)
def test_a_refresh_that_could_never_come_is_refused(tmp_path, refresh, named):
    with pytest.raises(SettingsError, match=rf"^knowledge\.refresh\.{named}"):
        trainer.check(refreshed(**refresh), corpus_of(tmp_path, 400, 1))


@pytest.mark.parametrize(
    "refresh",
    [
        {**STEPS, "min_interval": 71},
        {**STEPS, "min_interval": 10, "signal": "probe", "probe_steps": 79},
        {"poll_steps": 79},
        {"poll_steps": 80, "mode": "sync"},
    ],
)
def test_a_refresh_that_comes_late_is_not_refused(tmp_path, refresh):
    trainer.check(refreshed(**refresh), corpus_of(tmp_path, 400, 1))


GPU = {"workers": 2, "batch_size": 100, "device": "cuda"}


def searched(training: dict | None = None, knowledge: dict | None = None, **ask: object) -> Settings:
    """Settings of a run on GPUs that excludes the clips of its batches of 200, with five entries of each."""
    knowledge = {"captions_per_clip": 5, **(knowledge or {})}
    return load({"training": {**GPU, **(training or {})}, "knowledge": knowledge, "ask": {"exclude": "batch", **ask}})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            searched(neighbours=1049),
            r"2049 in all.*: lower ask\.neighbours, training\.batch_size or .* set ask\.exclude to self$",
        ),
        (searched(neighbours=2049, exclude="none"), r"2049 in all.*: lower ask\.neighbours or knowledge\.captions_per_clip$"),
        (searched(neighbours=2044, exclude="self"), r"1 excluded clips \(ask\.exclude=self\) of up to 5 entries, 2049 in all"),
        (searched(knowledge={"captions_per_clip": 9}, neighbours=849), r"2049 in all"),  # no clip has more than six captions
        (searched(knowledge={"probes": 2049, "exact_below": 20_000}), r"^knowledge\.probes: 2049 .*: lower knowledge\.probes$"),
    ],
)
def test_more_than_a_gpu_finds_or_searches_is_refused(tmp_path, settings, named):
    with pytest.raises(SettingsError, match=named):
        trainer.check(settings, corpus_of(tmp_path, 4000, 6))


@pytest.mark.parametrize(
    "settings",
    [
        searched(neighbours=1048),
        searched(neighbours=2048, exclude="none"),
        searched({"device": "cpu"}, neighbours=3000),
        searched(neighbours=3000, fine=False, negatives="none"),
        searched(knowledge={"corrections": {"write_back": True}}, neighbours=3000),  # such an index stays on the CPU
        searched(knowledge={"probes": 2048, "exact_below": 20_000}),
        searched(knowledge={"probes": 2049, "exact_below": 20_001}),
    ],
)
def test_what_a_gpu_can_search_or_does_not_is_not_refused(tmp_path, settings):
    trainer.check(settings, corpus_of(tmp_path, 4000, 6))


def test_a_knowledge_base_that_a_gpu_finds_all_of_is_not_refused(tmp_path):
    trainer.check(searched(neighbours=50), corpus_of(tmp_path, 400, 6))  # 2000 entries


def test_entries_of_a_clip_are_summed_over_sources_that_share_clips(tmp_path):
    corpora = [corpus_of(tmp_path / name, clips, captions) for name, clips, captions in (("a", 40, 3), ("b", 60, 9))]
    sources = [Source(name, corpus.folder.uri, "train") for name, corpus in zip("ab", corpora, strict=True)]
    assert trainer._fullest(searched(), sources, Extent(100, 40)) == 5
    assert trainer._fullest(searched(), sources, Extent(99, 40)) == 3 + 5


#: As Ray tells that it ended a worker: the line that names memory is not the last.
KILLED = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 5c1f) was 15.21GB / 16.00GB (0.950625), which exceeds the threshold of 0.95.
Refer to the documentation on how to address the out of memory issue.
To adjust the kill threshold, set the environment variable RAY_memory_usage_threshold when starting Ray."""

#: As CUDA tells that a kernel found no room.
ON_A_GPU = """CUDA error: out of memory
CUDA kernel errors might be asynchronously reported at some other API call.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OutOfMemoryError(KILLED), "Task was killed due to the node running low on memory."),
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 3.00 GiB of memory"), "Unable to allocate 3.00 GiB of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."), "CUDA out of memory. Tried to allocate 20.00 MiB."),
        (RuntimeError(ON_A_GPU), "CUDA error: out of memory"),
    ],
    ids=["ray", "python", "with-words", "torch", "cuda"],
)
def test_a_job_that_ran_out_of_memory_is_told_so(failure, told):
    assert trainer._cause(WorkerGroupError("a worker failed", {1: failure})) == f"training failed on rank 1: {told}"
