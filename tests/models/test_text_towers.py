"""Text towers and their tokenisers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    ClapConfig,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    ConvBertConfig,
    ConvBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
)

from ask_ray.config import SettingsError
from ask_ray.models.text_towers import HashedWords, TinyText, Transformer, any_text, from_scratch, published
from ask_ray.models.weights import WeightsError

CAPTIONS = ["", "a dog barks", "Rain falls, then a siren wails and a man speaks", "a siren wails, then rain falls"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "bark", "##s", "rain", "falls", "then", ","]


def tiny() -> TinyText:
    torch.manual_seed(0)
    return TinyText(0.5, 0.1, 12)


def bert(weights: object = None, max_words: int = 8) -> Transformer:
    torch.manual_seed(0)
    if weights is None:
        return from_scratch("bert", 0.08, 12)
    return published("bert", str(weights), max_words, "eng_Latn")


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
def test_eval_repeats_itself_and_training_drops_out(make) -> None:
    tower = make().eval()
    tokens = tower.tokenise(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(tower(*tokens), tower(*tokens))
        tower.train()
        assert not torch.equal(tower(*tokens), tower(*tokens))


def test_width_scales_the_tiny_tower() -> None:
    assert [TinyText(width, 0.0, 8).width for width in (0.01, 0.5, 1.0, 2.0)] == [8, 64, 128, 256]


def test_published_bert_loads_from_a_folder(folder: Path) -> None:
    tower = bert(folder)
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
    tower = bert(folder).eval()
    assert tower(*tower.tokenise([""])).isfinite().all()


def test_published_weights_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for weights in (tmp_path / "gone", tmp_path / "empty", "nobody/no-such-model", "no such id"):
        with pytest.raises(WeightsError, match=r"model\.text_weights: .*give a local folder"):
            bert(weights)


def test_damaged_partial_and_pickled_weights_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:200])
    with pytest.raises(WeightsError, match="could not be loaded"):
        bert(folder)
    (folder / "model.safetensors").unlink()
    torch.save(BertModel(BertConfig.from_pretrained(folder)).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        bert(folder)


def test_weights_of_another_shape_or_model_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match=r"16 missing or differently shaped: encoder\.layer\.2\.att"):
        bert(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(WeightsError, match=r"encoder\.layer\.0\.intermediate\.dense\.bias \(32,\) instead of \(24,\)"):
        bert(folder)
    RobertaModel(RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(folder)
    with pytest.raises(WeightsError, match="is a roberta model; give bert's weights"):
        bert(folder)


def test_too_many_words_for_published_bert_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    with pytest.raises(WeightsError, match=r"takes 512 tokens; lower model\.max_words"):
        bert(folder, 513)


def test_a_roberta_takes_two_tokens_fewer_than_it_has_positions(models) -> None:
    published("roberta", str(models["roberta"]), 512, "eng_Latn").eval()
    with pytest.raises(WeightsError, match=r"takes 512 tokens; lower model\.max_words"):
        published("roberta", str(models["roberta"]), 513, "eng_Latn")


def test_the_sizes_are_the_published_ones() -> None:
    """Shapes only, with our hashed vocabulary of 30522: BERT-base and RoBERTa-base, and SONAR's encoder of 24 layers. A layer has
    four square projections and two linear layers, all with biases, and two norms."""

    def layers(count: int, width: int, inner: int) -> int:
        return count * (4 * (width * width + width) + 2 * width * inner + inner + width + 2 * 2 * width)

    with torch.device("meta"):
        towers = {name: from_scratch(name, 1.0, 48) for name in ("bert", "roberta", "sonar")}
    assert {name: tower.width for name, tower in towers.items()} == {"bert": 768, "roberta": 768, "sonar": 1024}
    assert len(towers["sonar"].encoder.layers) == 24
    assert towers["sonar"].encoder.layers[0].fc1.out_features == 8192
    counted = {name: sum(parameter.numel() for parameter in tower.parameters()) for name, tower in towers.items()}
    assert counted == {
        "bert": (30522 + 512 + 2 + 2) * 768 + layers(12, 768, 3072),  # words, places, segments, a norm
        "roberta": (30522 + 514 + 1 + 2) * 768 + layers(12, 768, 3072),
        "sonar": (30522 + 2) * 1024 + layers(24, 1024, 8192),  # its places are sinusoids
    }
    assert counted["bert"] == 108_891_648


def test_sonar_marks_captions_with_their_language(models) -> None:
    towers = {code: published("sonar", str(models["sonar"]), 24, code).eval() for code in ("eng_Latn", "deu_Latn")}
    tokens = {code: tower.tokenise(["ein hund, bellt", "ö"]) for code, tower in towers.items()}
    known = towers["deu_Latn"].tokenise.tokenizer.get_vocab()
    for code, (ids, mask) in tokens.items():
        assert ids[:, 0].tolist() == [known[code]] * 2
        assert mask[1].tolist() == [True] * 4 + [False] * (ids.shape[1] - 4)
    assert torch.equal(tokens["eng_Latn"][0][:, 1:], tokens["deu_Latn"][0][:, 1:])
    with torch.no_grad():
        made = [towers[code](*tokens[code]) for code in towers]
        hidden = towers["deu_Latn"].encoder(tokens["deu_Latn"][0][1:, :4]).last_hidden_state[0]
    assert (made[0] - made[1]).abs().max() > 1e-3
    torch.testing.assert_close(made[1][1], hidden.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("code", "near"), [("deu", "deu_Latn"), ("xxx_Xxxx", "_Latn"), ("</s>", "_Latn"), ("a", "_Latn")])
def test_a_language_that_sonars_tokeniser_lacks_is_refused(models, code: str, near: str) -> None:
    with pytest.raises(SettingsError, match=rf"model\.language: .*no language {code}; it has, among others, .*{near}"):
        published("sonar", str(models["sonar"]), 24, code)


def test_a_real_pretrained_encoder_knows_what_captions_mean(minilm: str) -> None:
    """Mean-pooled, as its authors do, and straight from the package that carries it."""
    tower = any_text(minilm, "mean", 48).eval()
    captions = ["A dog barks.", "A puppy is yapping.", "Rain falls on a tin roof.", "Water is pouring down on metal."]
    tokens = tower.tokenise(captions)
    with torch.no_grad():
        made = torch.nn.functional.normalize(tower(*tokens), dim=1)
        output = AutoModel.from_pretrained(minilm).eval()(
            **AutoTokenizer.from_pretrained(minilm)(captions[1], return_tensors="pt")
        )
    assert made.shape == (4, 384)
    wanted = torch.nn.functional.normalize(output.last_hidden_state[0].mean(0), dim=0)
    torch.testing.assert_close(made[1], wanted, atol=1e-5, rtol=1e-5)
    alike = made @ made.T
    assert min(alike[0, 1], alike[2, 3]) > alike[:2, 2:].max() + 0.1


@pytest.mark.parametrize("pooling", ["max", "first", "pooler"])
def test_any_text_model_pools_as_it_is_told(models, pooling: str) -> None:
    tower = any_text(str(models["bert"]), pooling, 8).eval()
    ids, mask = tower.tokenise(["a dog barks", "rain"])
    with torch.no_grad():
        output = BertModel.from_pretrained(models["bert"]).eval()(input_ids=ids[1:, :3])
        states = output.last_hidden_state[0]
        wanted = {"max": states.amax(0), "first": states[0], "pooler": output.pooler_output[0]}[pooling]
        torch.testing.assert_close(tower(ids, mask)[1], wanted, atol=1e-5, rtol=1e-5)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
READS = SMALL | {"vocab_size": len(PIECES), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LOOKS = SMALL | {"image_size": 32, "patch_size": 8}


def folder_of(folder: Path, model: PreTrainedModel) -> str:
    """The folder of a model, with a tokeniser."""
    model.save_pretrained(folder / "model")
    BertTokenizerFast(vocab={word: number for number, word in enumerate(PIECES)}).save_pretrained(folder / "model")
    return str(folder / "model")


def test_a_pooled_output_that_depends_on_the_batch_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    siglip = folder_of(tmp_path, SiglipModel(SiglipConfig(text_config=READS, vision_config=LOOKS)))
    with pytest.raises(SettingsError, match=r"model\.text_pooling is pooler, .*SiglipTextModel.*; choose mean"):
        any_text(siglip, "pooler", 16)
    for pooling in ("mean", "max", "first"):
        tower = any_text(siglip, pooling, 16).eval()
        with torch.no_grad():
            together, alone = tower(*tower.tokenise(["a dog", "rain falls, then a dog barks"])), tower(*tower.tokenise(["a dog"]))
        torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_model_that_heeds_its_padding_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolved = folder_of(tmp_path, ConvBertModel(ConvBertConfig(**READS, embedding_size=16)))
    with pytest.raises(WeightsError, match=r"model\.text: .*heeds its padding: give a model that does not"):
        any_text(convolved, "mean", 16)


@pytest.mark.parametrize(("kind", "positions", "most"), [("clip", 20, 20), ("clap", 22, 21)])
def test_a_model_of_two_towers_takes_the_tokens_of_its_text_tower(tmp_path: Path, kind: str, positions: int, most: int) -> None:
    torch.manual_seed(0)
    reads = READS | {"max_position_embeddings": positions}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=reads, vision_config=LOOKS, projection_dim=16))
    else:
        swin = {"hidden_size": 32, "patch_embeds_hidden_size": 8, "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
        model = ClapModel(ClapConfig(text_config=reads, audio_config=swin))
    folder = folder_of(tmp_path, model)
    tower = any_text(folder, "mean", most).eval()
    assert tower(*tower.tokenise(["a dog " * most])).isfinite().all()
    with pytest.raises(WeightsError, match=rf"model\.text: .*takes {most} tokens; lower model\.max_words"):
        any_text(folder, "mean", most + 1)


def test_of_a_model_with_two_stacks_the_encoder_reads(models) -> None:
    tower = any_text(str(models["bart"]), "mean", 24)
    assert type(tower.encoder).__name__ == "BartEncoder"
    with pytest.raises(SettingsError, match=r"model\.text_pooling.*choose mean"):
        any_text(str(models["bart"]), "pooler", 24)


def test_weights_under_other_names_than_the_models_are_refused(models) -> None:
    with pytest.raises(
        WeightsError, match=r"model\.text: .*does not fit M2M100Encoder: \d+ missing or differently shaped: embed_"
    ):
        any_text(str(models["sonar"]), "mean", 24)
