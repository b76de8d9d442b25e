"""Tokenizer setup: validation with the model, the pad token, and a cache of tokens between runs."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor

from fedlora.cache import cached
from fedlora.errors import UserError

_TEST_TEXTS = ("a", "\u0378")  # the second is an unassigned code point: unknown to every vocabulary except those of bytes


def set_up_tokenizer(source: str, tokenizer: Any, model: Any, chat: bool = False) -> None:
    """Sets the same pad token in tokenizer and model config, and makes the tokenizer encode special tokens in a text as
    plain text; not for `chat`, where they are part of the tokenizer's template.

    Raises:
        UserError: the tokenizer is missing, has tokens that the model lacks, or has no usable pad token.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    vocabulary = tokenizer.get_vocab()
    if special.union(_blank(tokenizer)).issuperset(vocabulary.values()):
        raise UserError(f"model = {source!r} has no tokenizer; save one there with tokenizer.save_pretrained")
    size = _embeddings(model)
    beyond = {token: i for token, i in vocabulary.items() if i >= size and i not in special}
    if beyond:
        raise UserError(
            f"model = {source!r}: the tokenizer has {len(beyond)} tokens beyond the model's {size} embeddings, such as "
            f"{min(beyond)!r}; save the model again after model.resize_token_embeddings(len(tokenizer))"
        )
    if not chat:
        _split_special_tokens(tokenizer)
    config = model.config.get_text_config()
    pad = _pad_token(source, tokenizer, config, size, special, reads_last_token(model))
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    if not _valid(getattr(config, "pad_token_id", None), size):
        config.pad_token_id = pad
    reset_lengths(tokenizer)


def reads_last_token(model: Any) -> bool:
    """Whether the head reads the last token that is not the config's pad token, as heads of decoders do."""
    return hasattr(model, "score")  # the name of these heads in transformers


def positions(model: Any) -> int | None:
    """The model's maximum input length in tokens; None if unlimited."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not stated or stated < 0 or not getattr(config, "position_biased_input", True):  # -1: XLNet; False: DeBERTa-v3
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.weight.shape[0]) - int(module.padding_idx) - 1  # RoBERTa counts from the pad token's id
    return int(stated)


def check_lengths(lengths: Tensor, max_length: int, limit: int | None) -> None:
    """Rejects empty examples and those longer than the model's positions, given their lengths [examples].

    Raises:
        UserError: some are empty, or still have more than `limit` tokens after truncation to `max_length`.
    """
    if empty := int((lengths == 0).sum()):
        raise UserError(f"{empty} of {len(lengths)} examples are empty for the model's tokenizer; remove them")
    if limit is not None and (longer := int((lengths > limit).sum())):
        raise UserError(
            f"train.max_length = {max_length}: {longer} of {len(lengths)} examples are longer than the model's {limit} "
            f"positions; set train.max_length to at most {limit}"
        )


def check_known(features: Mapping[str, Tensor], tokenizer: Any) -> None:
    """Rejects a tokenizer that maps all texts, given as the model's inputs, to unknown words.

    Raises:
        UserError: all tokens are special tokens.
    """
    if "input_ids" not in features:
        return
    unread = torch.tensor([*tokenizer.all_special_ids, *_blank(tokenizer)])
    ids = features["input_ids"]
    if len(ids) and torch.isin(ids, unread).all():
        raise UserError(
            "no text has a word of the tokenizer's vocabulary within train.max_length; raise it, or check that the "
            "tokenizer belongs to the model"
        )


def cached_tokens(
    tokenizer: Any, texts: Sequence[list[str]], max_length: int | None, special: bool = True
) -> dict[str, Tensor]:
    """The model's inputs, concatenated over the examples, and in `starts` the bounds of the examples.

    Truncated to `max_length`, if any; the tokenizer adds its special tokens if `special`. Cached if the tokenizer can be
    serialized.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return _tokens(tokenizer, texts, max_length, special)
    key = [transformers.__version__, repr(tokenizer), backend.to_str(), str(max_length), "split special tokens"]
    for column in texts:
        key += [str(len(column)), *column]
    if not special:
        key.append("no special tokens")
    return load(cached("tokens", key, lambda: save(_tokens(tokenizer, texts, max_length, special))))


def _tokens(tokenizer: Any, texts: Sequence[list[str]], max_length: int | None, special: bool) -> dict[str, Tensor]:
    found = tokenizer(
        *texts,
        truncation=max_length is not None,
        max_length=max_length,
        add_special_tokens=special,
        split_special_tokens=True,
        verbose=False,
    )
    reset_lengths(tokenizer)
    lengths = [len(ids) for ids in found["input_ids"]]
    flat = {name: torch.tensor(list(chain.from_iterable(found[name])), dtype=torch.long) for name in found}
    return {**flat, "starts": torch.tensor([0, *lengths]).cumsum(0)}


def reset_lengths(tokenizer: Any) -> None:
    """Resets truncation and padding set by a call, so that the saved tokenizer does not depend on earlier calls."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()


def _pad_token(source: str, tokenizer: Any, config: Any, size: int, special: set[int], last: bool) -> int:
    """The pad token's id.

    If the head reads the last token that is not padding, this must be the id in the model's config, or a token with
    which no text ends. Otherwise, for example if eos both ends each text and is the padding, the head would read the
    token before eos, and in a base model without a pad id eos itself.
    """
    own = getattr(config, "pad_token_id", None)
    if last and _valid(own, size):
        if own in special or own == tokenizer.pad_token_id:
            return int(own)
        raise UserError(
            f"model = {source!r}: pad_token_id = {own} in config.json is an ordinary token of the tokenizer, "
            f"{tokenizer.convert_ids_to_tokens(own)!r}; set it to the id of a special token"
        )
    test_ids = [tokenizer(*texts)["input_ids"] for one in _TEST_TEXTS for texts in ((one,), (one, one))]
    ends = {ids[-1] for ids in test_ids if ids and last}
    for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids, *sorted(special)):
        if _valid(pad, size) and pad not in ends:
            return int(pad)
    raise UserError(
        f"model = {source!r}: the tokenizer has no usable pad token; add one with "
        "tokenizer.add_special_tokens({'pad_token': '[PAD]'}) and model.resize_token_embeddings(len(tokenizer)), save both"
    )


def _split_special_tokens(tokenizer: Any) -> None:
    """Makes the tokenizer encode special tokens written in a text as plain text; the saved tokenizer does the same."""
    from tokenizers.normalizers import Replace, Sequence

    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return
    for token in tokenizer.special_tokens_map.values():  # a Unigram model may have them as pieces: split them beforehand
        whole = isinstance(token, str) and len(token) > 1 and tokenizer(token, add_special_tokens=False)["input_ids"]
        if whole and tokenizer.convert_tokens_to_ids(token) in whole:
            split = Replace(token, f"{token[0]} {token[1:]}")
            backend.normalizer = Sequence([split, *([backend.normalizer] if backend.normalizer else [])])


def _blank(tokenizer: Any) -> list[int]:
    """The id of SentencePiece's word-start mark, which may stand alone before an unknown word; empty if there is none."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary["\u2581"]] if "\u2581" in vocabulary else []


def _embeddings(model: Any) -> int:
    """The number of token ids that have an embedding."""
    try:
        return len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):  # CANINE embeds hashes of characters
        return 1 << 31


def _valid(pad: Any, size: int) -> bool:
    return isinstance(pad, int) and 0 <= pad < size
