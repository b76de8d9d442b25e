"""Features of examples in the base model without adapters."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.models.adapted import AdaptedModel
from fedlora.models.tokenizers import positions
from fedlora.tasks.task import Examples, Task


def features(
    adapted: AdaptedModel, task: Task, examples: Examples, rows: Int[Tensor, " rows"], batch_size: int
) -> Float[Tensor, "rows width"]:
    """The task's features of the examples, in the order of `rows`, without any adapter or dropout, fp32 on the CPU.

    The examples are processed in order of length to save padding, `batch_size` in one pass.
    """
    found = torch.zeros(len(rows), adapted.spec.features)
    lengths = examples.lengths()[rows]
    adapted.load_clients([])
    adapted.model.eval()
    device = next(adapted.model.parameters()).device
    with torch.inference_mode():
        for places in torch.split(lengths.argsort(stable=True), batch_size):
            inputs, _ = examples.batch(rows[places], device)
            with adapted.packing.of(lengths[places][None], device, task.tokens_read(inputs, None)):
                found[places] = task.features(adapted.model, inputs).float().cpu()
    return found


def try_packing(adapted: AdaptedModel, task: Task, tokenizer: Any, max_length: int) -> None:
    """Enables packing if it leaves the model's features and losses unchanged up to rounding; see `Packing`."""
    texts = ["one", "a few words", " ".join(["many words"] * 20), "more"]
    longest = min(max_length, positions(adapted.model) or max_length)
    examples = task.encode(tokenizer, task.made_up(texts, adapted.spec.classes), longest)
    adapted.load_clients([])
    adapted.model.eval()
    parameter = next(adapted.model.parameters())
    inputs, targets = examples.batch(torch.arange(len(texts)), parameter.device)

    def outputs() -> Tensor:
        lengths = examples.lengths().view(2, -1)
        with adapted.packing.of(lengths, parameter.device, task.tokens_read(inputs, None)):
            found = task.features(adapted.model, inputs)
        with adapted.packing.of(lengths, parameter.device, task.tokens_read(inputs, targets)):
            losses = task.losses(adapted.model, inputs, targets)[0]
        return torch.cat([found, losses[:, None].to(found)], 1)

    with torch.inference_mode():
        adapted.packing.try_out(outputs, torch.finfo(adapted.dtype).eps ** 0.5)
