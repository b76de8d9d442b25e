"""Division of a step into micro-batches that fit in memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedlora.adapter import Adapter
from fedlora.models.adapted import AdaptedModel
from fedlora.models.dropout import ClientDropout
from fedlora.tasks.task import Examples, Task


def micro_batches(sizes: Sequence[tuple[int, int]], max_tokens: int) -> Iterator[list[int]]:
    """Indices of the batches in each micro-batch, grouped by length; `sizes` are (length of longest example, examples).

    A micro-batch has at most `max_tokens` tokens, padding included, or a single batch.
    """
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda p: sizes[p]):
        longest, examples = sizes[i][0], max(sizes[p][1] for p in (*group, i))
        if group and (len(group) + 1) * longest * examples > max_tokens:
            yield sorted(group)
            group = []
        group.append(i)
    yield sorted(group)


def bytes_per_token(adapted: AdaptedModel, task: Task, examples: Examples, start: Adapter) -> int:
    """Bytes that a training pass stores for its backward pass, per token of the longest example; 1 without examples."""
    if len(examples) == 0:
        return 1
    (parameter, *_) = adapted.load_clients([start], "ba")
    saved: dict[int, torch.UntypedStorage] = {}

    def count(
        x: Tensor,
    ) -> None:  # returning x, the output of a node that saves it, would keep the graph in memory for good
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()

    longest = examples.lengths().argmax()[None]
    inputs, targets = examples.batch(longest, parameter.device)
    adapted.model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), ClientDropout() as dropout:
        dropout.next_pass([torch.Generator(parameter.device).manual_seed(0)], [(int(examples.lengths().max()), 1)])
        task.losses(adapted.model, inputs, targets)
    own = {x.untyped_storage().data_ptr() for x in (*adapted.model.parameters(), *adapted.model.buffers())}
    adapted.load_clients([])
    stored = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    return max(1, stored // int(examples.lengths().max()))
