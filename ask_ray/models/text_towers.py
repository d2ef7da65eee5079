"""Text towers: captions to one vector each. Each brings the tokeniser that its weights belong to."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from ask_ray.models.pooling import masked_mean
from ask_ray.models.weights import WeightsError, few

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

# transformers takes seconds to import, which every Ray worker would pay: only what builds a BERT imports it.

WORDS = re.compile(r"\w+")


class TextTower(nn.Module):
    """A tower.

    width: the length of its vectors; tokenise: captions as ids (B, L) int64 and a mask (B, L) bool, true for tokens, on the CPU,
    L as long as needed. It holds nothing of the tower, so that it can be handed to other processes.
    """

    width: int
    tokenise: Callable[[Sequence[str]], tuple[Tensor, Tensor]]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids and mask, as `tokenise` makes them -> (B, width)."""
        raise NotImplementedError


class HashedWords:
    """Words as ids without a vocabulary file: a word's id is a checksum of its lower-case spelling.

    Every process, on every machine, gives a word the same id. Two words may share one; among `vocabulary` ids, n words
    make about n² / (2 `vocabulary`) such pairs. Id 0 pads; id 1 begins every caption, so an empty one has a token too.
    """

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
        self.width = max(8, round(128 * width / 8) * 8)
        self.tokenise = HashedWords(self.VOCABULARY, max_words)
        # Words and places start out small and equally strong: with larger words, order is learnt much later.
        self.embed = nn.Embedding(self.VOCABULARY, self.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.place = nn.Parameter(0.02 * torch.randn(max_words, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, 4, 4 * self.width, dropout, functional.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(self.width), enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`TextTower.forward`."""
        x = self.embed(ids) + self.place[: ids.shape[1]]
        return masked_mean(self.layers(x, src_key_padding_mask=~mask), mask)


class Bert(TextTower):
    """BERT (Devlin et al. 2019), mean-pooled: published, with its tokeniser, or from scratch on hashed words."""

    def __init__(self, weights: str | None, width: float, max_words: int) -> None:
        """`weights` is a local folder or hub id with a tokeniser and safetensors; unset, `width` scales BERT-base.

        Raises:
            WeightsError: if the weights cannot be had, are not BERT's, or take fewer than `max_words` tokens.
        """
        from transformers import BertConfig, BertModel

        super().__init__()
        if weights is None:
            heads = max(1, round(12 * width))
            config = BertConfig(hidden_size=64 * heads, num_attention_heads=heads, intermediate_size=256 * heads)
            self.tokenise = HashedWords(config.vocab_size, max_words)
            self.bert = BertModel(config, add_pooling_layer=False)
        else:
            tokenizer, self.bert = published_bert(weights, max_words)
            self.tokenise = PublishedTokens(tokenizer, max_words)
        self.width = self.bert.config.hidden_size

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`TextTower.forward`."""
        return masked_mean(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def published_bert(weights: str, max_words: int) -> tuple[PreTrainedTokenizerBase, BertModel]:
    """Tokeniser and model, in training mode, from a local folder or the Hugging Face hub; safetensors only.

    Raises:
        WeightsError: see :class:`Bert`.
    """
    from transformers import AutoConfig, AutoTokenizer, BertModel

    try:
        config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
        if config.model_type != "bert":
            raise WeightsError(f"model.text_weights: {weights} is a {config.model_type} model; give a BERT model")
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
        model, report = BertModel.from_pretrained(
            weights, add_pooling_layer=False, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"model.text_weights: {weights} could not be loaded ({reason}); where the hub cannot be reached, give a "
            "local folder with config.json, the tokeniser's files and model.safetensors"
        ) from error
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise WeightsError(f"model.text_weights: {weights} does not fit BERT: {len(lacking)} missing: {few(lacking)}")
    if max_words > config.max_position_embeddings:
        raise WeightsError(f"model.text_weights: {weights} takes {config.max_position_embeddings} tokens; lower model.max_words")
    return tokenizer, model.train()
