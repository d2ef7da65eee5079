"""What is refused before training: K and Nc against what all sources of the knowledge base hold together."""

import pytest

from ask_ray.config import Settings, SettingsError, load
from ask_ray.data.corpus import Corpus
from ask_ray.data.prepare import prepare
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
