"""Evaluation of adapters on examples that they were not trained on."""

from collections.abc import Sequence

import torch

from fedlora.adapter import Adapter
from fedlora.messages import Statistics
from fedlora.models.adapted import AdaptedModel
from fedlora.tasks.task import Examples, Task
from fedlora.train.batches import collate_clients


def score(
    adapted: AdaptedModel, task: Task, examples: Examples, asked: Sequence[tuple[torch.Tensor, Adapter]], batch_size: int
) -> list[Statistics]:
    """Each adapter's statistics on its own examples, given as rows [rows]; the adapters share forward passes.

    The examples are processed in order of length to save padding, `batch_size` in one pass.
    """
    adapted.load_clients([adapter for _, adapter in asked])
    adapted.model.eval()
    device = next(adapted.model.parameters()).device
    lengths = examples.lengths()
    sorted_rows = [rows[lengths[rows].argsort(stable=True)] for rows, _ in asked]
    rows_per_adapter, max_rows = max(1, batch_size // len(asked)), max(len(rows) for rows, _ in asked)
    sums: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for start in range(0, max_rows, rows_per_adapter):
            batches = [rows[start : start + rows_per_adapter] for rows in sorted_rows]
            rows, real = collate_clients(batches)
            inputs, targets = examples.batch(rows, device)
            with adapted.packing.of(lengths[rows].view(real.shape) * real, device):
                found = task.measure(adapted.model, inputs, targets, real.to(device))
            sums = {name: sums[name] + x for name, x in found.items()} if sums else dict(found)
    kept = {name: x.cpu() for name, x in sums.items()}  # [adapters, ...]
    return [Statistics(len(rows), {name: x[i].clone() for name, x in kept.items()}) for i, (rows, _) in enumerate(asked)]
