"""Which examples go together in a step."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_POOL = 32  # batches that are sorted together: enough to save nearly all padding, few enough to mix the examples


def epoch(
    lengths: Int[Tensor, " rows"],
    batch_size: int,
    by_length: bool,
    rng: torch.Generator,
    shared_order_seed: torch.Generator,
) -> Iterator[Int[Tensor, " batch"]]:
    """One pass over the rows in random order, cut into batches of row numbers; one batch may be smaller.

    With `by_length`, examples of similar length come together: a pool of 32 batches is sorted by length before it is cut,
    and the batches are shuffled. Which examples meet is still random, but no longer independent of their length. The
    shuffling takes `shared_order_seed` and not `rng`: clients with equally many rows meet short and long batches at the
    same time, which saves padding when they are trained together.
    """
    order = torch.randperm(len(lengths), generator=rng)
    if not by_length:
        yield from torch.split(order, batch_size)
        return
    batches: list[Tensor] = []
    for pool in torch.split(order, _POOL * batch_size):
        batches += torch.split(pool[lengths[pool].argsort(stable=True)], batch_size)
    for i in torch.randperm(len(batches), generator=shared_order_seed).tolist():
        yield batches[i]


def concat_factors(
    batches: Sequence[Int[Tensor, " _"]],
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, "batches longest"]]:
    """Batches of several clients as equally long runs, and which of the rows are real. The shorter batches are filled up
    with one of the real rows, so that no filler is the longest example."""
    run = max(len(batch) for batch in batches)
    filler = next(batch[:1] for batch in batches if len(batch))
    filled = [torch.cat([batch, filler.expand(run - len(batch))]) for batch in batches]
    return torch.cat(filled), torch.arange(run) < torch.tensor([len(batch) for batch in batches])[:, None]
