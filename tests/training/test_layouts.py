"""The public layouts as they lie on disk, prepared and trained on for two steps with every tower at reduced width."""

from itertools import islice
from pathlib import Path

import pytest
import torch

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
TEXT = ("tiny", "bert", "roberta", "sonar", "hf:minilm")


def data_of(layout: str, tree: Path, rate: int) -> DataSettings:
    shares = {"validation": 0.2, "test": 0.3} if layout == "wavcaps" else {}
    corpus = LAYOUTS[layout]
    return DataSettings.model_validate(
        {"corpus": corpus, "sample_rate": rate, "max_rejected": 1.0, corpus: {"path": str(tree), **shares}}
    )


@pytest.fixture(scope="module")
def prepared(trees, tmp_path_factory) -> dict[tuple[str, int], tuple[DataSettings, Corpus]]:
    """Every layout at every rate that a tower hears."""
    made, home = {}, tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        for rate in sorted({*RATES.values()}):
            data, folder = data_of(layout, trees[layout], rate), Folder.at(str(home / f"{layout}-{rate}"))
            source = source_of(data)
            written = [prepare.write_shard(source, shard, folder) for shard in source.shards()]
            prepare._write_manifest(data, folder, source, written)
            made[layout, rate] = data, Corpus.open(folder.uri)
    return made


def model_of(audio: str, text: str, models: dict[str, Path], minilm: str) -> ModelSettings:
    weights = str(models[text]) if text in ("bert", "roberta", "sonar") else None
    places = {f"hf:{name}": f"hf:{path}" for name, path in {**models, "minilm": minilm}.items()}
    towers = {"audio": places.get(audio, audio), "text": places.get(text, text), "text_weights": weights}
    return ModelSettings(**towers, width=0.08, dim=16, freq_mask=0, time_mask=0, max_words=24)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("audio", RATES)
def test_every_pair_of_towers_takes_steps_on_a_layout_and_encodes_it(audio, text, prepared, models, minilm) -> None:
    """Every audio tower meets every layout."""
    layout = list(LAYOUTS)[(list(RATES).index(audio) + TEXT.index(text)) % len(LAYOUTS)]
    data, corpus = prepared[layout, RATES[audio]]
    training = TrainingSettings(batch_size=BATCH, warmup_share=0.0)
    settings = Settings(data=data, model=model_of(audio, text, models, minilm), training=training)
    torch.manual_seed(0)
    model = registry.build(settings.model, data.sample_rate)
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
