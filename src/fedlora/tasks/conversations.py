"""Conversations in the form of a tokenizer's chat template; the model learns the messages of the assistant."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor

from fedlora.cache import cached
from fedlora.errors import UserError
from fedlora.tasks.prompts import Prompted, leading, reject_tokens

Messages = Sequence[Mapping[str, str]]


def conversations(tokenizer: Any, rows: Sequence[Messages]) -> list[Prompted]:
    """The ids of each conversation, of which the assistant's messages are learned, each with its end mark.

    A template with `{% generation %}` marks these itself. Otherwise they are what each message adds to the conversation
    before it, which the template must not change. Cached, unless the template reads the date.

    Raises:
        UserError: the tokenizer has no template, or one that changes earlier messages or rejects these; or a message
            contains a special token.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template; choose a model that was trained for conversations, or use data.prompt and "
            "data.response with task.chat = false"
        )
    reject_tokens(_special(tokenizer), (one["content"] for row in rows for one in row))
    marked = "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template
    of = _marked if marked else _by_prefixes

    def make() -> bytes:
        return save(_flat([of(tokenizer, list(row)) for row in rows]))

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "strftime_now" in tokenizer.chat_template:
        return _each(load(make()))
    key = [Path(__file__).read_text(encoding="utf-8"), transformers.__version__, repr(tokenizer), backend.to_str()]
    key += [str(tokenizer.chat_template), *(json.dumps(list(map(dict, row))) for row in rows)]
    return _each(load(cached("conversations", key, make)))


def _flat(found: Sequence[Prompted]) -> dict[str, Tensor]:
    """The ids of all conversations, which of them are learned, and the length and the kept ids of each."""
    return {
        "ids": torch.tensor([*chain.from_iterable(one.ids for one in found)], dtype=torch.long),
        "learned": torch.tensor([*chain.from_iterable(one.learned for one in found)], dtype=torch.bool),
        "lengths": torch.tensor([len(one.ids) for one in found], dtype=torch.long),
        "kept": torch.tensor([one.kept for one in found], dtype=torch.long),
    }


def _each(flat: dict[str, Tensor]) -> list[Prompted]:
    """The inverse of `_flat`."""
    ends, kept = flat["lengths"].cumsum(0).tolist(), flat["kept"].tolist()
    ids, learned = flat["ids"].tolist(), flat["learned"].tolist()
    return [Prompted(ids[a:b], learned[a:b], n) for a, b, n in zip([0, *ends], ends, kept, strict=False)]


def _marked(tokenizer: Any, messages: Messages) -> Prompted:
    found = _applied(tokenizer, messages, return_assistant_tokens_mask=True)
    return Prompted(found["input_ids"], [bool(x) for x in found["assistant_masks"]], _kept(tokenizer, messages))


def _by_prefixes(tokenizer: Any, messages: Messages) -> Prompted:
    ids = _ids(tokenizer, messages)
    learned = [False] * len(ids)
    special = {*tokenizer.convert_tokens_to_ids(_special(tokenizer))}
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _ids(tokenizer, messages[:i], add_generation_prompt=True), _ids(tokenizer, messages[: i + 1])
        if not (ids[: len(after)] == after and after[: len(before)] == before):
            raise UserError(
                "the tokenizer's chat template changes a message once others follow it, and does not mark the assistant's "
                "messages with {% generation %}; change the template, or use data.prompt and data.response"
            )
        end = max((k + 1 for k in range(len(before), len(after)) if after[k] in special), default=len(after))
        learned[len(before) : end] = [True] * (end - len(before))
    return Prompted(ids, learned, _kept(tokenizer, messages))


def _special(tokenizer: Any) -> list[str]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def _kept(tokenizer: Any, messages: Messages) -> int:
    """The number of ids at the start that truncation keeps: the system's message, else bos."""
    try:
        system = _ids(tokenizer, messages[:1]) if messages[0]["role"] == "system" else []
    except UserError:  # the template needs further messages
        system = []
    if system and _ids(tokenizer, messages)[: len(system)] == system:
        return len(system)
    return len(leading(tokenizer))


def _ids(tokenizer: Any, messages: Messages, **more: Any) -> list[int]:
    return list(_applied(tokenizer, messages, **more)["input_ids"]) if messages else []


def _applied(tokenizer: Any, messages: Messages, **more: Any) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = tokenizer.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"split_special_tokens": False, "verbose": False},
            **more,
        )
    except Exception as error:  # a template raises its own errors
        raise UserError(
            "the tokenizer's chat template rejects a conversation; check the roles of its messages and their order"
        ) from error
    return found
