"""The gradient of one client's loss."""

import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.adapter import Adapter
from fedlora.messages import Gradient
from fedlora.models.adapted import AdaptedModel
from fedlora.tasks.task import Examples, Reduction, Task, reduced


def gradient(
    adapted: AdaptedModel,
    task: Task,
    examples: Examples,
    rows: Int[Tensor, " rows"],
    request: Gradient,
    batch_size: int,
    reduction: Reduction,
) -> Adapter:
    """The requested gradient of the examples' mean loss, processed in order of length, `batch_size` in one pass."""
    parameters = adapted.load_clients([request.start], request.train)
    adapted.model.eval()
    device, lengths = parameters[0].device, examples.lengths()[rows]
    terms = torch.zeros((), device=device)
    for places in torch.split(lengths.argsort(stable=True), batch_size):
        inputs, targets = examples.batch(rows[places], device)
        with adapted.packing.of(lengths[places][None], device, task.tokens_read(inputs, targets)):
            sums, counts = reduced(*task.losses(adapted.model, inputs, targets), reduction)
            loss = sums.sum() / len(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        terms += counts.sum()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(len(rows) / terms)
    return adapted.gradient(0, request.start, request.train)
