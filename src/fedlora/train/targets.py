"""Leaves out examples without a target: they have no loss."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fedlora.errors import UserError
from fedlora.tasks.task import Examples


def check_targets(examples: Examples, kind: str) -> str | None:
    """A note about examples without a target, if there are any; `kind` is what the examples are for.

    Raises:
        UserError: no example has a target.
    """
    kept, count = int(examples.have_targets().sum()), len(examples)
    if kept < count and not kept:
        raise UserError(f"none of the {count} {kind} examples has a target after truncation; raise train.max_length")
    return None if kept == count else f"{count - kept} of {count} {kind} examples have no target and are left out"


def rows_with_targets(
    rows: Mapping[str, Sequence[int]], have_targets: Bool[Tensor, " examples"]
) -> dict[str, Int[Tensor, " rows"]]:
    """Each client's rows without those that have no target."""
    tensors = {client: torch.tensor(own, dtype=torch.long) for client, own in rows.items()}
    return {client: own[have_targets[own]] for client, own in tensors.items()}
