"""Questions with their options as one sequence, and the log-likelihood of each option."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedlora.data.lists import as_lists, flat
from fedlora.errors import UserError
from fedlora.tasks.prompts import leading, token_lists
from fedlora.tasks.task import NO_TARGET, Examples
from fedlora.tasks.token_losses import token_losses
from fedlora.tasks.word_tokens import blank

PROMPT, FILLER = 0, -1
"""Numbers of tokens that belong to no option; the options of a question are counted from 1."""
_Token = tuple[int, int, int, int]
"""Id, position, option, and, at the first token of an option, its size in bytes."""


def encode_questions(tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
    """Each question once, followed by its options, each after a copy of the question's last token.

    An input `option` has each token's option, `bytes` the length of an option's text at its first token. A question is
    truncated on its left, after the tokenizer's special tokens; one whose options leave no room for it has no target.
    """
    if not len(columns["prompt"]):
        none = torch.zeros(1, dtype=torch.long)
        return Examples({}, none, none[:0], {}, none)
    before, first = blank(tokenizer), leading(tokenizer)
    texts = flat(columns["options"])
    prompts = token_lists(tokenizer, columns["prompt"])
    options = as_lists(token_lists(tokenizer, [before + text for text in texts]), columns["options"])
    sizes = as_lists([len(text.encode()) for text in texts], columns["options"])
    tokens: list[_Token] = []
    starts, targets = [0], []
    for prompt, own, own_sizes, answer in zip(prompts, options, sizes, columns["answer"], strict=True):
        room = max_length - len(first) - sum(map(len, own)) - len(own) + 1
        fits = room > 0 and bool(prompt) and all(own)
        question = [*first, *(prompt[-room:] if fits else prompt)]
        tokens += _tokens(question, own, own_sizes)[:max_length]
        starts.append(len(tokens))
        targets.append(answer if fits else NO_TARGET)
    padding = {"input_ids": tokenizer.pad_token_id, "position_ids": 0, "option": FILLER, "bytes": 0}
    features = dict(zip(padding, torch.tensor(tokens).unbind(1), strict=True))
    return Examples(features, torch.tensor(starts), torch.tensor(targets), padding, torch.arange(len(targets) + 1))


def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of the model with which a token attends to its question and its own option alone."""
    option = inputs["option"]
    rows, longest = option.shape
    past = torch.ones(longest, longest, dtype=torch.bool, device=option.device).tril()
    seen = past & ((option[:, None, :] == PROMPT) | (option[:, None, :] == option[:, :, None]))
    dtype = next(x.dtype for x in model.parameters() if x.is_floating_point())
    mask = torch.zeros(rows, 1, longest, longest, dtype=dtype, device=option.device)
    mask = mask.masked_fill(~seen[:, None], torch.finfo(dtype).min)
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": inputs["position_ids"]}


def learned(inputs: Mapping[str, Tensor]) -> Bool[Tensor, "rows longest"]:
    """The tokens whose next one is of the same option."""
    option = inputs["option"]
    following = nn.functional.pad(option[:, 1:], (0, 1), value=FILLER)
    return (option == following) & (option > PROMPT)


def log_likelihoods(
    model: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "rows options"], Int[Tensor, "rows options"], Int[Tensor, "rows options"]]:
    """The log-likelihood of each option in fp32, its number of tokens and its bytes; 0 where a row has fewer options."""
    option, at = inputs["option"], learned(inputs)
    losses, _ = token_losses(model, call(model, inputs), inputs["input_ids"].roll(-1, 1).where(at, NO_TARGET))
    place = (option - 1).clamp(min=0)
    zeros = torch.zeros(len(option), int(option.max()), device=option.device)
    sums = zeros.scatter_add(1, place, -losses)
    counts = zeros.long().scatter_add(1, place, at.long())
    sizes = torch.zeros_like(counts).scatter_add(1, place, inputs["bytes"])
    return sums, counts, sizes


def check_apart(source: str, model: nn.Module) -> None:
    """Rejects a model in which a question's options influence each other.

    Raises:
        UserError: the likelihoods of two options of one sequence are not those of two sequences.
    """
    question, options = [5, 6, 7], ([8, 9, 10], [11, 6])
    device = next(model.parameters()).device
    columns = torch.tensor(_tokens(question, options, (1, 1)), device=device).unbind(1)
    inputs = {name: x[None] for name, x in zip(("input_ids", "position_ids", "option", "bytes"), columns, strict=True)}
    trained, reason = model.training, "the options of a question influence each other"
    model.eval()
    try:
        with torch.inference_mode():
            found = log_likelihoods(model, inputs)[0][0]
            for together, option in zip(found, options, strict=True):
                ids = torch.tensor([[*question, *option]], device=device)
                whole: Any = model
                each = whole(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                alone = each[2:-1].gather(1, ids[0, 3:, None]).sum()
                if not torch.isclose(together, alone, rtol=1e-3, atol=1e-3):
                    raise UserError(f"model = {source!r}: models of its type cannot be used for multiple choice: {reason}")
    except UserError:
        raise
    except Exception as error:  # any error of the architecture
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"model = {source!r}: models of its type cannot be used for multiple choice: {reason}") from error
    finally:
        model.train(trained)


def _tokens(question: Sequence[int], options: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[_Token]:
    """The tokens of a question and its options, given as ids, and the options' sizes in bytes."""
    shared = len(question) - 1
    found = [(i, at, PROMPT, 0) for at, i in enumerate(question[:-1])]
    for number, (option, size) in enumerate(zip(options, sizes, strict=True), 1):
        found += [(i, shared + at, number, 0 if at else size) for at, i in enumerate([question[-1], *option])]
    return found
