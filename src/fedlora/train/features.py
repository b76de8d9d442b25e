"""Examples as the untouched base model sees them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.train.inject import Adapted
from fedlora.train.tasks import Encoded, Task


def features(
    adapted: Adapted, task: Task, examples: Encoded, rows: Int[Tensor, " rows"], batch_size: int
) -> Float[Tensor, "rows width"]:
    """The task's features of the examples, in the order of `rows`, without any adapter or dropout, fp32 on the CPU.

    The examples are taken in order of length to save padding, `batch_size` in one pass.
    """
    found = torch.zeros(len(rows), adapted.spec.features)
    adapted.load([])
    adapted.model.eval()
    device = next(adapted.model.parameters()).device
    with torch.inference_mode():
        for places in torch.split(examples.lengths()[rows].argsort(stable=True), batch_size):
            inputs, _ = examples.batch(rows[places], device)
            found[places] = task.features(adapted.model, inputs).float().cpu()
    return found
