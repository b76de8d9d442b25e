"""Judging an adapter on examples it was not trained on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedlora.adapter import Adapter
from fedlora.train.inject import Adapted
from fedlora.train.tasks import Encoded, Task


@dataclass(frozen=True)
class Score:
    """The means of a task's metrics over a number of examples."""

    examples: int
    metrics: Mapping[str, float]


def score(adapted: Adapted, task: Task, examples: Encoded, rows: torch.Tensor, adapter: Adapter, batch_size: int) -> Score:
    """The adapter's metrics on the examples `rows` [rows], which are taken in order of length to save padding."""
    adapted.load(adapter)
    adapted.model.eval()
    device = next(adapted.model.parameters()).device
    by_length = rows[examples.lengths()[rows].argsort(stable=True)]
    sums: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for batch in torch.split(by_length, batch_size):
            inputs, targets = examples.batch(batch, device)
            for name, value in task.judge(adapted.model, inputs, targets).items():
                sums[name] = sums[name] + value if name in sums else value
    return Score(len(rows), {name: float(value) / len(rows) for name, value in sums.items()})
