"""The gradient of one client's loss."""

import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.adapter import Adapter
from fedlora.messages import Gradient
from fedlora.models.adapted import AdaptedModel
from fedlora.tasks.task import Examples, Task


def gradient(
    adapted: AdaptedModel, task: Task, examples: Examples, rows: Int[Tensor, " rows"], request: Gradient, batch_size: int
) -> Adapter:
    """The requested gradient of the examples' mean loss, processed in order of length, `batch_size` in one pass."""
    adapted.load_clients([request.start], request.train)
    adapted.model.eval()
    device, lengths = next(adapted.model.parameters()).device, examples.lengths()[rows]
    for places in torch.split(lengths.argsort(stable=True), batch_size):
        inputs, targets = examples.batch(rows[places], device)
        with adapted.packing.of(lengths[places][None], device):
            sums, counts = task.losses(adapted.model, inputs, targets)
            loss = (sums / counts).sum() / len(rows)
        loss.backward()  # type: ignore[no-untyped-call]
    return adapted.gradient(0, request.start, request.train)
