"""Evaluation of adapters on examples that they were not trained on."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

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
    sums: dict[str, Tensor] = {}
    with torch.inference_mode():
        for inputs, targets, real in _passes(adapted, task, examples, asked, batch_size):
            found = task.measure(adapted.model, inputs, targets, real)
            sums = {name: sums[name] + x for name, x in found.items()} if sums else dict(found)
    kept = {name: x.cpu() for name, x in sums.items()}  # [adapters, ...]
    return [Statistics(len(rows), {name: x[i].clone() for name, x in kept.items()}) for i, (rows, _) in enumerate(asked)]


def test_set_metrics(
    adapted: AdaptedModel, task: Task, examples: Examples, adapter: Adapter, batch_size: int
) -> Mapping[str, int | float]:
    """All metrics of the adapter on the examples that have targets, and the number of these `examples`."""
    rows = examples.have_targets().nonzero()[:, 0]
    if task.test_metrics is None:
        found = score(adapted, task, examples, [(rows, adapter)], batch_size)[0]
        return {**task.metrics(found), "examples": len(rows)}
    with torch.inference_mode():
        parts = [
            task.measure(adapted.model, inputs, targets, real.view(-1, 1))  # each example as a client of its own
            for inputs, targets, real in _passes(adapted, task, examples, [(rows, adapter)], batch_size)
        ]
    each = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}  # [examples, ...]
    total = Statistics(len(rows), {name: x.sum(0) for name, x in each.items()})
    return {**task.metrics(total), **task.test_metrics(each), "examples": len(rows)}


def _passes(
    adapted: AdaptedModel,
    task: Task,
    examples: Examples,
    asked: Sequence[tuple[torch.Tensor, Adapter]],
    batch_size: int,
) -> Iterator[tuple[Mapping[str, Tensor], Tensor, Bool[Tensor, "adapters longest"]]]:
    """Loads the adapters; yields the inputs, targets and real rows of each pass, in order of length."""
    adapted.load_clients([adapter for _, adapter in asked])
    adapted.model.eval()
    device = next(adapted.model.parameters()).device
    lengths = examples.lengths()
    sorted_rows: list[Int[Tensor, " rows"]] = [rows[lengths[rows].argsort(stable=True)] for rows, _ in asked]
    rows_per_adapter, max_rows = max(1, batch_size // len(asked)), max(len(rows) for rows, _ in asked)
    for start in range(0, max_rows, rows_per_adapter):
        batches = [rows[start : start + rows_per_adapter] for rows in sorted_rows]
        rows, real = collate_clients(batches)
        inputs, targets = examples.batch(rows, device)
        own_lengths = lengths[rows].view(real.shape) * real
        with adapted.packing.of(own_lengths, device, task.tokens_read(inputs, targets)):
            yield inputs, targets, real.to(device)
