"""Leaves out examples without a target: they have no loss. Counts truncated examples."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

from jaxtyping import Bool, Int
from torch import Tensor

from fedlora.errors import UserError
from fedlora.tasks.task import Examples

K = TypeVar("K", bound=Hashable)


def check_targets(examples: Examples, kind: str) -> list[str]:
    """Notes about examples without a target and about truncated ones; `kind` is what the examples are for.

    Raises:
        UserError: no example has a target.
    """
    kept, count = int(examples.have_targets().sum()), len(examples)
    if kept < count and not kept:
        raise UserError(f"none of the {count} {kind} examples has a target after truncation; raise train.max_length")
    notes = [
        f"the {part} of {cut} of {count} {kind} examples is truncated; see train.max_length"
        for part, cut in examples.truncated.items()
    ]
    return (
        notes if kept == count else [*notes, f"{count - kept} of {count} {kind} examples have no target and are left out"]
    )


def rows_with_targets(
    rows: Mapping[K, Int[Tensor, " _"]], have_targets: Bool[Tensor, " examples"]
) -> dict[K, Int[Tensor, " _"]]:
    """Each client's rows without those that have no target."""
    return {client: own[have_targets[own]] for client, own in rows.items()}
