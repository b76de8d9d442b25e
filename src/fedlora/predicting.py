"""Predictions of trained adapters for examples without targets."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.generation_setup import UNLIMITED, stop_tokens
from fedlora.models.tokenizers import check_lengths, positions
from fedlora.saved_adapter import SavedAdapter
from fedlora.train.generation import Generation
from fedlora.train.predict import predictions


def predict(
    path: str | Path,
    data: Any,
    *,
    client: str | None = None,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """The predictions of a trained adapter or model, a mapping for each example, in their order.

    A mapping has the `label` and its `probability`, the `score`, the `tags`, the `option` and its `index`, or the `answer`.

    Args:
        path: as in `evaluate`.
        data: a file; rows in memory, as in `run`; or a list of texts, for a task that reads one column. The column of the
            targets is not needed, and not read.
        client: the client whose adapter predicts, for a personal method.
        overrides: settings as for `--set`, such as `["evaluate.max_new_tokens=32"]`.
        notify: is called with messages about the examples.

    Raises:
        UserError: no such adapter, or data or settings that cannot be used.
    """
    saved = SavedAdapter.find(path, client, overrides)
    experiment = saved.experiment
    federated_data = FederatedData.of_test_set(experiment, data, saved.labels, targets=False)
    loaded = saved.load().merged_base()
    task, adapted, tokenizer, length = loaded.task, loaded.adapted, loaded.tokenizer, experiment.train.max_length
    columns, settings = federated_data.labelled_data.test[:], experiment.evaluate
    notes = [*loaded.notes]
    if task.questions is None:
        examples = task.encode(tokenizer, columns, length)
        check_lengths(examples.lengths(), length, positions(adapted.model))
        found = predictions(adapted, task, examples, columns, loaded.adapter, settings.batch_size)
    else:
        examples, questions = task.encode(tokenizer, columns, UNLIMITED), task.questions(tokenizer, columns, length)
        if empty := len(examples) - len(questions):
            raise UserError(f"{empty} of {len(examples)} examples are empty for the model's tokenizer; remove them")
        if full := sum(len(one.prompt) >= length for one in questions):
            notes.append(
                f"train.max_length = {length}: {full} of {len(questions)} prompts are that long, or truncated to it"
            )
        stop = stop_tokens(adapted.model, tokenizer, examples)
        generation = Generation(questions, tokenizer, stop, settings.max_new_tokens, settings.batch_size, ())
        found = [{"answer": answer} for answer in generation.answers(adapted, loaded.adapter)]
    for note in notes:
        notify(note)
    return found
