"""A tokenizer's vocabulary as metadata of a GGUF file."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's types of tokens

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPLITS = {
    ("GPT-2",): "gpt-2",
    ("digits", "GPT-2"): "smollm",
    (_WORDS + r"|\p{N}" + _TAIL, "bytes"): "qwen2",
    (_WORDS + r"|\p{N}{1,3}" + _TAIL, "bytes"): "llama-bpe",
}
"""llama.cpp's names of the ways in which byte-level tokenizers split texts, by their steps."""


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Adds the tokenizer to a `GGUFWriter`, for a model with this number of embeddings.

    Raises:
        UserError: llama.cpp has no such tokenizer, or its name of the way in which it splits texts is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise _not_exported(f"it is of type {model.get('type', type(tokenizer).__name__)}, not BPE")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ids = {i: token for token, i in tokenizer.get_vocab().items() if i < size}
    added = {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
    writer.add_token_list([ids.get(i, f"[PAD{i}]") for i in range(size)])
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks = {first + second: -float(rank) for rank, (first, second) in reversed([*enumerate(merges, 1)])}
        writer.add_token_scores([ranks.get(ids.get(i, ""), -float(len(merges) + 1)) for i in range(size)])
        writer.add_add_space_prefix(_prepends(content))
    else:
        split, normalizer = _SPLITS.get(tuple(_steps(content.get("pre_tokenizer")))), content.get("normalizer")
        if split is None or normalizer not in (None, {"type": "NFC"}):
            raise _not_exported("it splits or normalizes texts in a way that has no name here")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    unknown = tokenizer.unk_token_id if model.get("byte_fallback") else None
    writer.add_token_types([_type(i, ids.get(i), added, unknown) for i in range(size)])
    _add_special(writer, tokenizer, size)


def _add_special(writer: Any, tokenizer: Any, size: int) -> None:
    """Adds the ids of the special tokens, which of them begin and end each text, and the chat template."""
    ids = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer("a", add_special_tokens=False).input_ids
    first, last = bos is not None and ids[:1] == [bos] != plain[:1], eos is not None and ids[-1:] == [eos] != plain[-1:]
    if ids != [bos] * first + plain + [eos] * last:
        raise _not_exported("it puts other tokens than bos and eos around a text")
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None and i < size:
            add(i)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _type(i: int, token: str | None, added: Mapping[int, bool], unknown: int | None) -> int:
    if token is None:
        return _UNUSED
    if i == unknown:
        return _UNKNOWN
    if i in added:
        return _CONTROL if added[i] else _USER_DEFINED
    byte = unknown is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return _BYTE if byte else _NORMAL


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    """The steps of a pre-tokenizer, as in `_SPLITS`."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": steps}:
            for step in steps:
                yield from _steps(step)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield pattern
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            yield "GPT-2" if regex else "bytes"
        case _:
            yield "other"


def _prepends(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer of SentencePiece's kind puts a space before a text."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or ('"Metaspace"' in text and '"prepend_scheme": "never"' not in text)


def _not_exported(reason: str) -> UserError:
    return UserError(
        f"the tokenizer cannot be written to GGUF: {reason}; export a merged model, and convert it with llama.cpp's "
        "convert_hf_to_gguf.py"
    )
