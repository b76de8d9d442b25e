"""A model's tokenizer: checked against the model, given a token to pad with, and its tokens kept from run to run."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor

from fedlora.cache import cached
from fedlora.errors import UserError

_PROBES = ("a", "\u0378")  # the second is no character of any script: unknown to every vocabulary but those of bytes


def settle_tokenizer(source: str, tokenizer: Any, model: Any) -> None:
    """Makes tokenizer and model config agree on a pad token, and a special token that is written out in a text a text.

    Raises:
        UserError: there is no tokenizer, it has tokens that the model lacks, or none to pad with.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    vocabulary = tokenizer.get_vocab()
    if special.union(_blank(tokenizer)).issuperset(vocabulary.values()):
        raise UserError(f"model = {source!r} has no tokenizer: save one there with tokenizer.save_pretrained")
    size = _embeddings(model)
    beyond = {token: i for token, i in vocabulary.items() if i >= size and i not in special}
    if beyond:
        raise UserError(
            f"model = {source!r}: the tokenizer has {len(beyond)} tokens beyond the model's {size} embeddings, such as "
            f"{min(beyond)!r}; save the model again after model.resize_token_embeddings(len(tokenizer))"
        )
    _split_special_tokens(tokenizer)
    config = model.config.get_text_config()
    pad = _pad_token(source, tokenizer, config, size, special, reads_last_token(model))
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    if not _valid(getattr(config, "pad_token_id", None), size):
        config.pad_token_id = pad
    _forget_lengths(tokenizer)


def reads_last_token(model: Any) -> bool:
    """Whether the head reads the last token that is not the config's pad token, as those of decoders do."""
    return hasattr(model, "score")  # so transformers calls the heads of these models


def positions(model: Any) -> int | None:
    """The longest input in tokens that the model has positions for; None if there is no limit."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not stated or stated < 0 or not getattr(config, "position_biased_input", True):  # XLNet says -1; DeBERTa-v3
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.weight.shape[0]) - int(module.padding_idx) - 1  # RoBERTa counts from behind the pad token
    return int(stated)


def check_lengths(lengths: Tensor, max_length: int, limit: int | None) -> None:
    """Refuses examples without a token or beyond the model's positions, given as their lengths [examples].

    Raises:
        UserError: some are empty, or have more than `limit` tokens, which `max_length` did not cut off.
    """
    if empty := int((lengths == 0).sum()):
        raise UserError(f"{empty} of {len(lengths)} examples are empty for the model's tokenizer; remove them")
    if limit is not None and (longer := int((lengths > limit).sum())):
        raise UserError(
            f"train.max_length = {max_length}: {longer} of {len(lengths)} examples are longer than the model's {limit} "
            f"positions; set train.max_length to at most {limit}"
        )


def check_known(features: Mapping[str, Tensor], tokenizer: Any) -> None:
    """Refuses a tokenizer to which all texts, given as the model's inputs, are unknown words.

    Raises:
        UserError: there is nothing but special tokens.
    """
    unread = torch.tensor([*tokenizer.all_special_ids, *_blank(tokenizer)])
    if features and torch.isin(features["input_ids"], unread).all():
        raise UserError("the tokenizer knows no word in any of the texts; check that it belongs to the model")


def kept_tokens(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> dict[str, Tensor]:
    """The model's inputs, example after example, and in `starts` where each begins and the last one ends.

    From the cache where the tokenizer can say what it is.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return _tokens(tokenizer, texts, max_length)
    key = [transformers.__version__, repr(tokenizer), backend.to_str(), str(max_length), "split special tokens"]
    for column in texts:
        key += [str(len(column)), *column]
    return load(cached("tokens", key, lambda: save(_tokens(tokenizer, texts, max_length))))


def _tokens(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> dict[str, Tensor]:
    found = tokenizer(*texts, truncation=True, max_length=max_length, split_special_tokens=True, verbose=False)
    _forget_lengths(tokenizer)
    lengths = [len(ids) for ids in found["input_ids"]]
    flat = {name: torch.tensor(list(chain.from_iterable(found[name]))) for name in found}
    return {**flat, "starts": torch.tensor([0, *lengths]).cumsum(0)}


def _forget_lengths(tokenizer: Any) -> None:
    """Undoes what a call leaves behind, so that the tokenizer is saved the same whatever it was used for."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()


def _pad_token(source: str, tokenizer: Any, config: Any, size: int, special: set[int], last: bool) -> int:
    """The id to pad with.

    Where the head looks for the last token that is not padding, it must be an id that the model's config has already, or
    one that no text ends with: with eos after each text and padding with eos the head would read the token before it, and
    the last one wherever the config of the base model has no pad id.
    """
    own = getattr(config, "pad_token_id", None)
    if last and _valid(own, size):
        if own in special or own == tokenizer.pad_token_id:
            return int(own)
        raise UserError(
            f"model = {source!r}: pad_token_id = {own} in config.json is an ordinary token of the tokenizer, "
            f"{tokenizer.convert_ids_to_tokens(own)!r}; set it to the id of a special token"
        )
    probes = [tokenizer(*texts)["input_ids"] for one in _PROBES for texts in ((one,), (one, one))]
    ends = {ids[-1] for ids in probes if ids and last}
    for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids, *sorted(special)):
        if _valid(pad, size) and pad not in ends:
            return int(pad)
    raise UserError(
        f"model = {source!r}: the tokenizer has no token to pad with; add one with "
        "tokenizer.add_special_tokens({'pad_token': '[PAD]'}) and model.resize_token_embeddings(len(tokenizer)), save both"
    )


def _split_special_tokens(tokenizer: Any) -> None:
    """Makes a special token that stands in a text a text; the saved tokenizer does the same."""
    from tokenizers.normalizers import Replace, Sequence

    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return
    for token in tokenizer.special_tokens_map.values():  # which a Unigram model has among its pieces: split up before
        whole = isinstance(token, str) and len(token) > 1 and tokenizer(token, add_special_tokens=False)["input_ids"]
        if whole and tokenizer.convert_tokens_to_ids(token) in whole:
            split = Replace(token, f"{token[0]} {token[1:]}")
            backend.normalizer = Sequence([split, *([backend.normalizer] if backend.normalizer else [])])


def _blank(tokenizer: Any) -> list[int]:
    """The id by which SentencePiece marks the start of a word, which may stand alone before an unknown one."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary["\u2581"]] if "\u2581" in vocabulary else []


def _embeddings(model: Any) -> int:
    """How many token ids the model has an embedding for."""
    try:
        return len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):  # CANINE embeds hashes of characters
        return 1 << 31


def _valid(pad: Any, size: int) -> bool:
    return isinstance(pad, int) and 0 <= pad < size
