"""Division of a step into micro-batches that fit in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: whole batches of the clients at `places`, or a part of one client's batch.

    `rows` are those of each client; `first` and `last` tell whether they begin and end its batch.
    """

    places: Sequence[int]
    rows: Sequence[Tensor]
    first: bool = True
    last: bool = True


def passes(batches: Sequence[Tensor], lengths: Tensor, max_tokens: int, packed: bool, split: bool) -> Iterator[Pass]:
    """The passes of a step, given each client's batch of rows and the length of every example.

    With `split`, a batch of more than `max_tokens` tokens is cut into several passes of at least one example.
    """
    own_lengths = [lengths[batch].tolist() for batch in batches]
    sizes = [(sum(own), 1) if packed else (max(own), len(own)) for own in own_lengths]
    for places in micro_batches(sizes, max_tokens):
        parts = _parts(own_lengths[places[0]], max_tokens, packed) if split and len(places) == 1 else []
        if len(parts) < 2:
            yield Pass(places, [batches[place] for place in places])
            continue
        for i, rows in enumerate(torch.split(batches[places[0]], parts)):
            yield Pass(places, [rows], first=i == 0, last=i == len(parts) - 1)


def _parts(lengths: Sequence[int], max_tokens: int, packed: bool) -> list[int]:
    """Numbers of consecutive examples of at most `max_tokens` tokens together, or of one example each."""
    parts, part = list[int](), list[int]()
    for length in lengths:
        longer = [*part, length]
        if part and (sum(longer) if packed else max(longer) * len(longer)) > max_tokens:
            parts.append(len(part))
            longer = [length]
        part = longer
    return [*parts, len(part)]


def bytes_per_token(adapted: AdaptedModel, task: Task, examples: Examples, start: Adapter) -> int:
    """Bytes that a training pass stores for its backward pass, per token of an example; 1 without examples.

    Those of the longest example that has targets, together with these, if they are tokens. With gradient checkpointing, the
    backward pass stores the activations of one block at a time, which are counted, too.
    """
    rows = examples.have_targets().nonzero()[:, 0]
    if len(rows) == 0:
        return 1
    (parameter, *_) = adapted.load_clients([start], "bam")
    targets_of_each = 0 if examples.target_starts is None else examples.target_starts.diff()
    longest = rows[(examples.lengths() + targets_of_each)[rows].argmax()][None]
    batch = examples.batch(longest, parameter.device)
    length = int(examples.lengths()[longest])
    stored = _stored(adapted, task, batch, length)
    if adapted.checkpointing.blocks:
        with adapted.checkpointing.disabled():
            stored += _stored(adapted, task, batch, length) // len(adapted.checkpointing.blocks)
    adapted.load_clients([])
    return max(1, stored // length)


def _stored(adapted: AdaptedModel, task: Task, batch: tuple[Mapping[str, Tensor], Tensor], length: int) -> int:
    """Bytes that the forward pass of one example of this length stores, without the model's own tensors."""
    saved: dict[int, torch.UntypedStorage] = {}

    def count(
        x: Tensor,
    ) -> None:  # returning x, the output of a node that saves it, would keep the graph in memory for good
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()

    inputs, targets = batch
    adapted.model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), ClientDropout() as dropout:
        dropout.next_pass([torch.Generator(targets.device).manual_seed(0)], [(length, 1)])
        task.losses(adapted.model, inputs, targets)
    own = {x.untyped_storage().data_ptr() for x in (*adapted.model.parameters(), *adapted.model.buffers())}
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
