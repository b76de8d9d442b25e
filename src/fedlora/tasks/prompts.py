"""Token ids of prompts with their answers, within a length, and what the model learns of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.errors import UserError
from fedlora.models.tokenizers import cached_tokens
from fedlora.tasks.task import NO_TARGET, Examples


@dataclass(frozen=True)
class Prompted:
    """Token ids, and which of them the model learns. Truncation keeps the first `kept` ids, or only the first one if these
    and the answer are too long."""

    ids: Sequence[int]
    learned: Sequence[bool]
    kept: int = 0


def pairs(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> Iterable[Prompted]:
    """Each prompt and answer, tokenized apart, so that generation starts from the same ids as training; then eos.

    The special tokens that the tokenizer puts before a text come first.
    """
    start, end = leading(tokenizer), eos(tokenizer, [*prompts, *answers])
    parts = [token_lists(tokenizer, texts) for texts in (prompts, answers)]
    for prompt, answer in zip(*parts, strict=True):
        ids = [*start, *prompt, *answer, end]
        yield Prompted(ids, [i >= len(start) + len(prompt) for i in range(len(ids))], len(start))


def token_lists(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens."""
    if not len(texts):
        return []
    found = cached_tokens(tokenizer, [list(texts)], None, special=False)
    return [ids.tolist() for ids in torch.tensor_split(found["input_ids"], found["starts"][1:-1])]


def leading(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as bos."""
    return surrounding(tokenizer)[0]


def surrounding(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a text, and those that it puts after a text."""
    with_special, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    at = next(i for i in range(len(with_special) + 1) if with_special[i : i + len(text)] == text)
    return list(with_special[:at]), list(with_special[at + len(text) :])


def eos(tokenizer: Any, texts: Iterable[str]) -> int:
    """The id of the eos token, with which an answer ends.

    Raises:
        UserError: there is none, or it is part of a text.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, with which answers end; choose a model for text generation")
    reject_tokens([tokenizer.eos_token], texts)
    return int(tokenizer.eos_token_id)


def reject_tokens(tokens: Sequence[str], texts: Iterable[str]) -> None:
    """Rejects texts that contain one of these special tokens.

    Raises:
        UserError: some do.
    """
    found = [next((token for token in tokens if token in text), None) for text in texts]
    if count := sum(one is not None for one in found):
        token = next(one for one in found if one is not None)
        raise UserError(
            f"{count} of {len(found)} texts contain special tokens of the tokenizer, such as {token!r}; remove them"
        )


def to_examples(found: Iterable[Prompted], max_length: int, pad: int) -> Examples:
    """The examples, truncated to `max_length`; a target is the next token, if it is learned.

    The answer is kept: the prompt is truncated on its left, after the ids that are kept. An answer that is too long alone
    is truncated on its right, and then has no end mark.
    """
    ids: list[int] = []
    targets: list[int] = []
    starts, cut = [0], {"prompt": 0, "answer": 0}
    for one in found:
        first = next((i for i, learned in enumerate(one.learned) if learned), len(one.ids))
        last = max((i for i, learned in enumerate(one.learned) if learned), default=len(one.ids) - 1) + 1
        prompt, answer = one.ids[:first], one.ids[first:last]
        room = max(max_length - len(answer), min(one.kept, 1))
        if len(prompt) > room:
            cut["prompt"] += 1
            prompt = _cut_left(prompt, room, one.kept if one.kept <= room else min(one.kept, 1))
        if len(prompt) + len(answer) > max_length:
            cut["answer"] += 1
            answer = answer[: max_length - len(prompt)]
        learned = [*[False] * len(prompt), *one.learned[first : first + len(answer)]]
        ids += (own := [*prompt, *answer])
        targets += [own[i + 1] if learned[i + 1] else NO_TARGET for i in range(len(own) - 1)] + [NO_TARGET] * (len(own) > 0)
        starts.append(len(ids))
    truncated = {part: count for part, count in cut.items() if count}
    return token_examples(ids, targets, starts, pad, truncated=truncated)


def last_prompt(one: Prompted, max_length: int) -> Sequence[int]:
    """The ids before the last answer, truncated as in `to_examples`, but whatever the answer; none without an answer."""
    begins = (i for i in range(len(one.ids) - 1, -1, -1) if one.learned[i] and not (i and one.learned[i - 1]))
    return truncated(one.ids[: next(begins, 0)], max_length, one.kept)


def truncated(prompt: Sequence[int], max_length: int, kept: int) -> Sequence[int]:
    """The ids of a prompt, truncated on the left after the first `kept`, or only the first one if these are too long."""
    if len(prompt) <= max_length:
        return prompt
    return _cut_left(prompt, max_length, kept if kept < max_length else min(kept, 1))


def _cut_left(ids: Sequence[int], room: int, kept: int) -> list[int]:
    """The first `kept` ids, and as many of the last ones as there is room for."""
    return [*ids[:kept], *ids[len(ids) - (room - kept) :]]


def token_examples(ids: list[int], targets: list[int], starts: list[int], pad: int, **more: Any) -> Examples:
    """Examples with a target for each token, given for all tokens one after the other."""
    flat, bounds = torch.tensor(ids, dtype=torch.long), torch.tensor(starts)
    features = {"input_ids": flat, "attention_mask": torch.ones_like(flat)}
    padding = {"input_ids": pad, "attention_mask": 0}
    return Examples(features, bounds, torch.tensor(targets, dtype=torch.long), padding, bounds, **more)
