"""Text towers and their tokenisers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel

from ask_ray.models.text_towers import Bert, HashedWords, TextTower, TinyText
from ask_ray.models.weights import WeightsError

CAPTIONS = ["", "a dog barks", "Rain falls, then a siren wails and a man speaks", "a siren wails, then rain falls"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "bark", "##s", "rain", "falls", "then", ","]


def tiny() -> TinyText:
    torch.manual_seed(0)
    return TinyText(0.5, 0.1, 12)


def bert() -> Bert:
    torch.manual_seed(0)
    return Bert(None, 0.08, 12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published-style BERT of two layers, pooler and all."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_words_are_cut_at_anything_else_whatever_their_case_or_form() -> None:
    words = HashedWords(1000, 48)
    assert words.ids("A dog: BARKS!") == words.ids("a dog barks")
    assert words.ids("Ein Käuzchen ruft") == words.ids("ein ka\u0308uzchen ruft")
    assert len(words.ids("собака лает")) == 3
    assert words.ids("a dog") != words.ids("dog a")


def test_ids_stay_in_range_and_captions_are_padded_and_cut() -> None:
    words = HashedWords(50, 5)
    ids, mask = words(["", "one two", "one two three four five six seven"])
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [1, 3, 5]
    assert ids.shape == mask.shape == (3, 5)
    assert ids[0].tolist() == [1, 0, 0, 0, 0]
    assert set(HashedWords(50, 5000).ids(" ".join(map(str, range(2000))))) == set(range(1, 50))


def test_every_process_gives_a_word_the_same_id() -> None:
    code = "from ask_ray.models.text_towers import HashedWords; print(HashedWords(8192, 9).ids('a dog barks öfter'))"
    seed = str(1 + int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")))
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True)
    assert json.loads(run.stdout) == HashedWords(8192, 9).ids("a dog barks öfter")
    # A checkpoint keeps no vocabulary: were this to change, its embeddings would belong to other words.
    assert HashedWords(8192, 9).ids("a dog barks") == [1, 2729, 3267, 4584]


@pytest.mark.parametrize("make", [tiny, bert])
def test_a_batch_gives_what_its_captions_give_one_by_one(make) -> None:
    tower = make().eval()
    with torch.no_grad():
        together = tower(*tower.tokenise(CAPTIONS))
        alone = torch.cat([tower(*tower.tokenise([caption])) for caption in CAPTIONS])
    assert together.shape == (len(CAPTIONS), tower.width)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.pdist(together).min() > 1e-3


@pytest.mark.parametrize("make", [tiny, bert])
def test_eval_repeats_itself_and_training_drops_out(make) -> None:
    tower = make().eval()
    tokens = tower.tokenise(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(tower(*tokens), tower(*tokens))
        tower.train()
        assert not torch.equal(tower(*tokens), tower(*tokens))


@pytest.mark.parametrize("make", [tiny, bert])
def test_gradients_reach_every_parameter(make) -> None:
    tower: TextTower = make().train()
    (tower(*tower.tokenise(CAPTIONS)) * torch.randn(4, tower.width)).sum().backward()
    silent = [name for name, parameter in tower.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_width_scales_the_tiny_tower() -> None:
    assert [TinyText(width, 0.0, 8).width for width in (0.01, 0.5, 1.0, 2.0)] == [8, 64, 128, 256]


def test_published_bert_loads_from_a_folder(folder: Path) -> None:
    tower = Bert(str(folder), 4.0, 8)
    assert tower.training
    assert all(module.training for module in tower.modules())
    assert tower.width == 16
    ids, mask = tower.tokenise(["a dog barks", "rain"])
    assert ids.tolist() == [[2, 5, 6, 7, 8, 3], [2, 9, 3, 0, 0, 0]]
    assert mask.sum(1).tolist() == [6, 3]
    assert tower.tokenise(["rain falls then " * 9])[0].shape == (1, 8)
    tower.eval()
    reference = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = reference(input_ids=ids[1:, :3]).last_hidden_state
        torch.testing.assert_close(tower(ids, mask)[1], hidden[0].mean(0), atol=1e-5, rtol=1e-5)


def test_an_empty_caption_has_tokens_for_published_bert(folder: Path) -> None:
    tower = Bert(str(folder), 1.0, 8).eval()
    assert tower(*tower.tokenise([""])).isfinite().all()


def test_published_weights_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for weights in (str(tmp_path / "gone"), str(tmp_path / "empty"), "nobody/no-such-model", "no such id"):
        with pytest.raises(WeightsError, match=r"model\.text_weights: .*give a local folder"):
            Bert(weights, 1.0, 8)


def test_damaged_partial_and_pickled_weights_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:200])
    with pytest.raises(WeightsError, match="could not be loaded"):
        Bert(str(folder), 1.0, 8)
    (folder / "model.safetensors").unlink()
    torch.save(BertModel(BertConfig.from_pretrained(folder)).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        Bert(str(folder), 1.0, 8)


def test_weights_of_another_shape_or_model_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match=r"missing: encoder\.layer\.2"):
        Bert(str(folder), 1.0, 8)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(WeightsError, match=r"model\.text_weights"):
        Bert(str(folder), 1.0, 8)
    RobertaModel(RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(folder)
    with pytest.raises(WeightsError, match="is a roberta model; give a BERT model"):
        Bert(str(folder), 1.0, 8)


def test_too_many_words_for_published_bert_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    with pytest.raises(WeightsError, match=r"takes 512 tokens; lower model\.max_words"):
        Bert(str(folder), 1.0, 513)
