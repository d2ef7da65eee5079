"""The public layouts as they lie on disk, prepared and trained on for two steps with every tower at reduced width."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from picture_trees import karpathy

from ask_ray.config import DataSettings, ModelSettings, Settings, TrainingSettings
from ask_ray.data import prepare
from ask_ray.data.batches import TrainingBatches
from ask_ray.data.corpora import source_of
from ask_ray.data.corpus import Corpus
from ask_ray.models import registry
from ask_ray.storage import Folder
from ask_ray.training import evaluation
from ask_ray.training.step import Stepper

CPU, STEPS, BATCH = torch.device("cpu"), 2, 2
LAYOUTS = {"audiocaps": "audiocaps", "retrieval": "audiocaps", "clotho": "clotho", "wavcaps": "wavcaps", "parquet": "parquet"}
RATES = {"tiny": 16000, "resnet38": 32000, "ced-tiny": 16000, "hf:ast": 16000}
MORE = {"ced-mini": 16000, "ced-small": 16000, "ced-base": 16000, "hf:wav2vec2": 16000, "hf:clap": 48000}
HEARD = RATES | MORE
TEXT = ("tiny", "bert", "roberta", "sonar", "hf:minilm")
PAIRS = [(audio, text) for audio in RATES for text in TEXT] + [(audio, "tiny") for audio in MORE]


def layout_of(audio: str, text: str) -> str:
    return list(LAYOUTS)[sum(divmod(PAIRS.index((audio, text)), len(TEXT))) % len(LAYOUTS)]


def data_of(layout: str, tree: Path, rate: int) -> DataSettings:
    shares = {"validation": 0.2, "test": 0.3} if layout == "wavcaps" else {}
    corpus = LAYOUTS[layout]
    return DataSettings.model_validate(
        {"corpus": corpus, "sample_rate": rate, "max_rejected": 1.0, corpus: {"path": str(tree), **shares}}
    )


@pytest.fixture(scope="module")
def prepared(trees, tmp_path_factory) -> dict[tuple[str, int], tuple[DataSettings, Corpus]]:
    """Every layout at the rates at which it is heard, and a corpus of pictures."""
    made, home = {}, tmp_path_factory.mktemp("layouts")
    for layout, rate in sorted({(layout_of(*pair), HEARD[pair[0]]) for pair in PAIRS}):
        made[layout, rate] = corpus_of(data_of(layout, trees[layout], rate), home / f"{layout}-{rate}")
    tree = str(karpathy(home / "flickr30k", "flickr30k"))
    pictures = {"corpus": "flickr30k", "flickr30k": {"path": tree}, "image_size": 40, "max_rejected": 1.0}
    made["flickr30k", 0] = corpus_of(DataSettings.model_validate(pictures), home / "pictures")
    return made


def corpus_of(data: DataSettings, place: Path) -> tuple[DataSettings, Corpus]:
    source, folder = source_of(data), Folder.at(str(place))
    written = [prepare.write_shard(source, shard, folder) for shard in source.shards()]
    prepare._write_manifest(data, folder, source, written)
    return data, Corpus.open(folder.uri)


def model_of(audio: str, text: str, models: dict[str, Path], minilm: str) -> ModelSettings:
    weights = str(models[text]) if text in ("bert", "roberta", "sonar") else None
    places = {f"hf:{name}": f"hf:{path}" for name, path in {**models, "minilm": minilm}.items()}
    towers = {"audio": places.get(audio, audio), "text": places.get(text, text), "text_weights": weights}
    return ModelSettings(**towers, width=0.08, dim=16, freq_mask=0, time_mask=0, max_words=24)


@pytest.mark.parametrize(("audio", "text"), PAIRS)
def test_every_pair_of_towers_takes_steps_on_a_layout_and_encodes_it(audio, text, prepared, models, minilm) -> None:
    """Every tower that meets all text towers meets every layout."""
    data, corpus = prepared[layout_of(audio, text), HEARD[audio]]
    takes_steps_and_encodes(data, corpus, model_of(audio, text, models, minilm))


def test_an_image_tower_takes_steps_on_a_layout_of_pictures_and_encodes_it(prepared, models) -> None:
    towers = {"image": f"hf:{models['vit']}", "text": "tiny"}
    takes_steps_and_encodes(*prepared["flickr30k", 0], ModelSettings(**towers, width=0.08, dim=16, max_words=24))


def takes_steps_and_encodes(data: DataSettings, corpus: Corpus, towers: ModelSettings) -> None:
    training = TrainingSettings(batch_size=BATCH, warmup_share=0.0)
    settings = Settings(data=data, model=towers, training=training)
    torch.manual_seed(0)
    model = registry.build(settings.model, corpus.sample_rate)
    before = {name: value.clone() for name, value in model.named_parameters()}
    stepper = Stepper(model, model, settings, STEPS, CPU)
    batches = TrainingBatches(corpus, data, model.tokenise, BATCH, seed=0, rank=0, workers=1)
    losses = [stepper.take(batch, None).figures["loss"] for batch in islice(batches.epoch(0), STEPS)]
    assert len(losses) == STEPS
    assert torch.stack(losses).isfinite().all()
    moved = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"audio", "text"} <= moved
    encoded = evaluation.encode_split(model, corpus, "test", settings, CPU)
    assert len(encoded.audio) == corpus.clips("test") > 0
    assert len(encoded.text) == len(encoded.captions) >= len(encoded.audio)
    for rows in (encoded.audio, encoded.text):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
