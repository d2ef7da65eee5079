"""Text towers: captions to one vector each. Each brings the tokeniser that its weights belong to."""

from __future__ import annotations

import difflib
import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.config import SettingsError
from ask_ray.models.pooling import Encoded, masked_mean
from ask_ray.models.pretrained import Origin, pooled, read_config, read_model, read_tokenizer, settled, states_of
from ask_ray.models.weights import WeightsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# transformers takes seconds to import, which every Ray worker would pay: only what builds such a tower imports it.

WORDS = re.compile(r"\w+")

#: How far a caption's vector may be from the one it has alone, as a share of its largest value: longer sums round otherwise.
COMPANY = 1e-3


class TextTower(nn.Module):
    """A tower.

    width: the length of its vectors; token_width: of those of single tokens, None if it makes none; tokenise: captions as ids
    (B, L) int64 and a mask (B, L) bool, true for tokens, on the CPU, L as long as needed. It holds nothing of the tower, so that
    it can be handed to other processes.
    """

    width: int
    token_width: int | None = None
    tokenise: Callable[[Sequence[str]], tuple[Tensor, Tensor]]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids and mask, as `tokenise` makes them -> (B, width)."""
        return self.encode(ids, mask).vectors

    def encode(self, ids: Tensor, mask: Tensor) -> Encoded:
        """Arguments as for :meth:`forward`; what is made of a caption does not depend on its batch."""
        raise NotImplementedError


class HashedWords:
    """Words as ids without a vocabulary file: a word's id is a checksum of its lower-case spelling.

    Every process, on every machine, gives a word the same id. Two words may share one; among `vocabulary` ids, n words
    make about n² / (2 `vocabulary`) such pairs. Id 0 pads; id 1 begins every caption, so an empty one has a token too.
    """

    #: The vocabulary of towers that are as large as the published ones; BERT's.
    USUAL = 30522

    def __init__(self, vocabulary: int, max_words: int) -> None:
        self.vocabulary = vocabulary
        self.max_words = max_words

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 and mask (B, L) bool; captions are cut to `max_words` tokens."""
        rows = [torch.tensor(self.ids(caption)) for caption in captions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids, ids != 0

    def ids(self, caption: str) -> list[int]:
        """The ids of one caption, the begin token first."""
        words = WORDS.findall(unicodedata.normalize("NFKC", caption).lower())
        return [1] + [2 + zlib.crc32(word.encode()) % (self.vocabulary - 2) for word in words[: self.max_words - 1]]


class PublishedTokens:
    """The tokeniser that came with published weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_words: int) -> None:
        self.tokenizer = tokenizer
        self.max_words = max_words

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 and mask (B, L) bool; captions are cut to `max_words` tokens."""
        made = self.tokenizer(list(captions), padding=True, truncation=True, max_length=self.max_words, return_tensors="pt")
        return made["input_ids"], made["attention_mask"].bool()


class TinyText(TextTower):
    """Two transformer layers over hashed words, mean-pooled. A caption's vector does not depend on its batch."""

    VOCABULARY = 8192

    def __init__(self, width: float, dropout: float, max_words: int) -> None:
        super().__init__()
        self.width = self.token_width = max(8, round(128 * width / 8) * 8)
        self.tokenise = HashedWords(self.VOCABULARY, max_words)
        # Words and places start out small and equally strong: with larger words, order is learnt much later.
        self.embed = nn.Embedding(self.VOCABULARY, self.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.place = nn.Parameter(0.02 * torch.randn(max_words, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, 4, 4 * self.width, dropout, functional.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(self.width), enable_nested_tensor=False)

    def encode(self, ids: Tensor, mask: Tensor) -> Encoded:
        """See :meth:`TextTower.encode`."""
        x = self.layers(self.embed(ids) + self.place[: ids.shape[1]], src_key_padding_mask=~mask)
        return Encoded(masked_mean(x, mask), x, mask)


class Transformer(TextTower):
    """An encoder of the transformers library over the tokens of its tokeniser, pooled over each caption's own."""

    def __init__(
        self, encoder: PreTrainedModel, tokenise: Callable[[Sequence[str]], tuple[Tensor, Tensor]], pooling: str = "mean"
    ) -> None:
        """For `pooling` see :func:`ask_ray.models.pretrained.pooled`."""
        super().__init__()
        self.encoder = encoder
        self.tokenise = tokenise
        self.pooling = pooling
        self.width = self.token_width = encoder.config.hidden_size

    def encode(self, ids: Tensor, mask: Tensor) -> Encoded:
        """See :meth:`TextTower.encode`."""
        made = self.encoder(input_ids=ids, attention_mask=mask)
        states = states_of(made)
        return Encoded(pooled(made, mask, self.pooling), states, None if states is None else mask)


def from_scratch(family: str, width: float, max_words: int) -> Transformer:
    """A `bert`, `roberta` or `sonar` with random weights on hashed words, its number of heads scaled by `width`."""
    kind, config = _architecture(family, width)
    encoder = kind(config, **_options(family))
    return Transformer(encoder, HashedWords(config.vocab_size, max_words))


def published(family: str, weights: str, max_words: int, language: str) -> Transformer:
    """A `bert` (Devlin et al. 2019), `roberta` (Liu et al. 2019) or `sonar` (Duquenne et al. 2023) with its tokeniser.

    Args:
        weights: a local folder or hub id with a tokeniser and safetensors.
        language: the captions' language, as `sonar`'s tokeniser calls it; the others take none.

    Raises:
        WeightsError: if the weights cannot be had, are another model's, take fewer than `max_words` tokens, or make of a
            caption what depends on its batch.
        SettingsError: if the tokeniser lacks the language.
    """
    origin = Origin.of(weights, "model.text_weights")
    config = read_config(origin)
    kind, usual = _architecture(family, 1.0)
    if config.model_type != usual.model_type:
        raise WeightsError(f"{origin} is a {config.model_type} model; give {family}'s weights, a {usual.model_type} model")
    tokenizer = read_tokenizer(origin)
    if family == "sonar":
        _speak(tokenizer, language, config.vocab_size, origin)
    return _pretrained(kind, config, tokenizer, max_words, "mean", origin, **_options(family))


def any_text(name: str, pooling: str, max_words: int) -> Transformer:
    """Any text model of the transformers library, from a local folder or the hub; of two stacks, the encoder.

    Raises:
        WeightsError: if it cannot be had, takes fewer than `max_words` tokens, or makes of a caption what depends on its batch.
        SettingsError: if it cannot be pooled so, or a caption's vector depends on its batch then.
    """
    from transformers import AutoModel

    origin = Origin.of(name, "model.text")
    return _pretrained(AutoModel, read_config(origin), read_tokenizer(origin), max_words, pooling, origin)


def _pretrained(
    kind: Any,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_words: int,
    pooling: str,
    origin: Origin,
    **options: Any,
) -> Transformer:
    """The tower of published weights, in training mode."""
    model, lacking = read_model(kind, config, origin, "text_model", **options)
    # Not the whole's configuration, which of a model of two towers has no such number.
    most = _positions(model.config)
    if most is not None and max_words > most:
        raise WeightsError(f"{origin} takes {most} tokens; lower model.max_words")
    tower = Transformer(model, PublishedTokens(tokenizer, max_words), pooling).eval()
    probe = settled(model, lambda: tower.encode(*tower.tokenise(["a"])), lacking, origin, "a text encoder")
    _check_company(tower, probe.vectors, origin)
    tower.token_width = None if probe.tokens is None else probe.tokens.shape[2]
    return tower.train()


def _check_company(tower: Transformer, alone: Tensor, origin: Origin) -> None:
    """That a caption's vector is the one it has alone, (1, C) of "a", also where it is padded beside a longer one.

    Raises:
        SettingsError: if it is not, as the model's own pooled output may be of the padding.
        WeightsError: if not even the mean over a caption's own tokens is.
    """
    with torch.no_grad():
        beside = tower(*tower.tokenise(["a", "a a a a a a a a"]))[:1]
    if (beside - alone).abs().max() <= COMPANY * alone.abs().max():
        return
    told = f"{type(tower.encoder).__name__} makes another vector of a caption beside a longer one than of the caption alone"
    if tower.pooling == "mean":
        raise WeightsError(f"{origin}: {told}, so it heeds its padding: give a model that does not")
    raise SettingsError(f"model.text_pooling is {tower.pooling}, with which {told} ({origin}); choose mean")


def _positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model takes: RoBERTa and its kin begin to count after the number of their padding. None: any number."""
    most = getattr(config, "max_position_embeddings", None)
    kin = any(word in config.model_type for word in ("roberta", "camembert", "mpnet", "m2m_100", "clap", "altclip"))
    return most - config.pad_token_id - 1 if most is not None and kin else most


def _speak(tokenizer: PreTrainedTokenizerBase, language: str, vocabulary: int, origin: Origin) -> None:
    """Make a tokeniser mark captions as of a language.

    Raises:
        SettingsError: if it has no such code.
    """
    known = {
        code: number for code, number in tokenizer.get_added_vocab().items() if re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", code)
    }
    if known.get(language, vocabulary) >= vocabulary:
        near = difflib.get_close_matches(language, sorted(known), 4, 0.3) or sorted(known)[:4]
        raise SettingsError(f"model.language: {origin.name} has no language {language}; it has, among others, {', '.join(near)}")
    tokenizer.src_lang = language


def _options(family: str) -> dict[str, bool]:
    """What a family's class is told beside its configuration."""
    return {} if family == "sonar" else {"add_pooling_layer": False}


def _architecture(family: str, width: float) -> tuple[Any, PretrainedConfig]:
    """The class of a family and its usual configuration, with the number of heads scaled; padding is token 0."""
    from transformers import BertConfig, BertModel, M2M100Config, RobertaConfig, RobertaModel
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    heads = max(1, round((16 if family == "sonar" else 12) * width))
    if family == "sonar":
        config = M2M100Config(
            vocab_size=HashedWords.USUAL,
            d_model=64 * heads,
            encoder_layers=24,
            encoder_attention_heads=heads,
            encoder_ffn_dim=512 * heads,
            encoder_layerdrop=0.0,
            max_position_embeddings=514,
            pad_token_id=0,
        )
        return M2M100Encoder, config
    kind, make = (BertModel, BertConfig) if family == "bert" else (RobertaModel, RobertaConfig)
    return kind, make(
        vocab_size=HashedWords.USUAL,
        hidden_size=64 * heads,
        num_attention_heads=heads,
        intermediate_size=256 * heads,
        max_position_embeddings=514 if family == "roberta" else 512,
        type_vocab_size=1 if family == "roberta" else 2,
        pad_token_id=0,
    )
