"""Tokens of texts that are given as words."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor

from fedlora.cache import cached
from fedlora.errors import UserError
from fedlora.models.tokenizers import reset_lengths


def word_tokens(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int) -> dict[str, Tensor]:
    """The model's inputs, concatenated over the texts; in `starts` the bounds of the texts, in `words` each token's word.

    `words` has the index of the word within its text, -1 for special tokens. Texts are truncated to `max_length` tokens.
    If the tokenizer reads a word after a blank and one at the start of a text differently, as that of GPT-2 does, all words
    are read as after a blank. Cached.

    Raises:
        UserError: the tokenizer does not tell which token belongs to which word.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "task.kind = 'tagging' needs a fast tokenizer, which tells the word of each token; choose another model"
        )
    key = [transformers.__version__, repr(tokenizer), tokenizer.backend_tokenizer.to_str(), str(max_length)]
    for words in texts:
        key += [str(len(words)), *words]
    return load(cached("word tokens", key, lambda: save(_tokens(tokenizer, texts, max_length))))


def blank(tokenizer: Any) -> str:
    """The blank with which a word is tokenized alone as it is within a text; empty if it needs none."""
    apart = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return "" if apart == tokenizer("a a", add_special_tokens=False)["input_ids"] else " "


def _tokens(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int) -> dict[str, Tensor]:
    before = blank(tokenizer)
    found = tokenizer(
        [[before + word for word in words] for words in texts],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_attention_mask=True,
        split_special_tokens=True,
        verbose=False,
    )
    reset_lengths(tokenizer)
    flat = {name: torch.tensor(list(chain.from_iterable(found[name])), dtype=torch.long) for name in found}
    words = [-1 if word is None else word for i in range(len(texts)) for word in found.word_ids(i)]
    starts = torch.tensor([0, *map(len, found["input_ids"])]).cumsum(0)
    return {**flat, "starts": starts, "words": torch.tensor(words, dtype=torch.long)}
