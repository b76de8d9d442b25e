"""Setup of the evaluation by generated answers from a run's settings and test set."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.config.experiment import Experiment
from fedlora.errors import UserError
from fedlora.models.generate import check_positions
from fedlora.tasks.questions import grouped, spread
from fedlora.tasks.task import NO_TARGET, Examples, Task
from fedlora.train.generation import Generation

UNLIMITED = 1 << 30
"""A maximum length that truncates nothing: a truncated answer does not show how answers end."""


def generation_of(
    experiment: Experiment, task: Task, model: Any, tokenizer: Any, test: Examples, rows: Any
) -> Generation | None:
    """The evaluation by generated answers; None if it is not configured, or there is no test set.

    `rows` is the data set that `test` encodes; it is read only if answers are generated.

    Raises:
        UserError: the task generates no text, or the model has too few positions for the prompts and the answers.
    """
    settings = experiment.evaluate
    if not settings.generate or not len(test):
        return None
    if task.questions is None:
        raise UserError(f"evaluate.generate: task.kind = {experiment.task.kind!r} generates no text; set it to 0")
    asked = task.questions(tokenizer, rows[:], experiment.train.max_length)
    if not all(one.references for one in asked):
        raise UserError("evaluate.generate: plain texts have no answers; set it to 0, or use data.prompt or data.messages")
    questions = spread(grouped(asked), settings.generate)
    check_positions(model, max((len(one.prompt) for one in questions), default=0), settings.max_new_tokens)
    stop = stop_tokens(model, tokenizer, test)
    return Generation(questions, tokenizer, stop, settings.max_new_tokens, settings.batch_size, settings.text_metrics)


def generation_notes(experiment: Experiment, test: Examples) -> list[str]:
    """A note if answers are to be generated, but no adapter is evaluated on a test set."""
    if not experiment.evaluate.generate:
        return []
    if experiment.method.row.personal:
        reason = f"{experiment.method.name} has an adapter for each client, and none is evaluated on the test set"
    elif not len(test):
        reason = "there is no test set"
    else:
        return []
    return [f"evaluate.generate = {experiment.evaluate.generate}: no answers are generated: {reason}"]


def stop_tokens(model: Any, tokenizer: Any, examples: Examples) -> list[int]:
    """The ids of the tokens that end an answer: eos, those of the checkpoint, and special tokens that answers end with."""
    config = getattr(model, "generation_config", None) or model.config
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = torch.tensor([i for i, token in tokenizer.added_tokens_decoder.items() if token.special], dtype=torch.long)
    last = _last_of_answers(examples)
    ends = last[torch.isin(last, special)].tolist()
    return sorted({i for i in (tokenizer.eos_token_id, *ids, *ends) if i is not None})


def _last_of_answers(examples: Examples) -> Int[Tensor, " answers"]:
    """The last target of each answer; an example may have several."""
    assert examples.target_starts is not None, "answers have a target for each token"
    learned = examples.targets != NO_TARGET
    last = torch.cat([~learned[1:], torch.ones(1, dtype=torch.bool)])
    last[examples.target_starts[1:] - 1] = True
    return examples.targets[learned & last]
