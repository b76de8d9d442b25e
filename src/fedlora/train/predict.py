"""Predictions for examples, as a person reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedlora.adapter import Adapter
from fedlora.models.adapted import AdaptedModel
from fedlora.tasks.task import Examples, Task


def predictions(
    adapted: AdaptedModel,
    task: Task,
    examples: Examples,
    columns: Mapping[str, Sequence[Any]],
    adapter: Adapter,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The adapter's predictions by `task.predict`, in the order of the examples, of which `columns` are the values.

    The examples are processed in order of length to save padding, `batch_size` in one pass.
    """
    assert task.predict is not None, "the task generates text"
    lengths = examples.lengths()
    found: dict[int, dict[str, Any]] = {}
    adapted.load_clients([adapter])
    adapted.model.eval()
    device = next(adapted.model.parameters()).device
    with torch.inference_mode():
        for rows in torch.split(lengths.argsort(stable=True), batch_size):
            inputs, targets = examples.batch(rows, device)
            values = {name: [column[row] for row in rows.tolist()] for name, column in columns.items()}
            with adapted.packing.of(lengths[rows][None], device, task.tokens_read(inputs, targets)):
                found |= zip(rows.tolist(), task.predict(adapted.model, inputs, targets, values), strict=True)
    return [found[row] for row in range(len(examples))]
