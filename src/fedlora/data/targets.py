"""What the data need to know of a task."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Targets(Protocol):
    """How a task reads the column `data.label`, and by what it partitions the examples."""

    def label_space(self, train: Sequence[str], test: Sequence[str]) -> tuple[str, ...]:
        """The labels of a run whose data name none; empty for a task without labels.

        Raises:
            ValueError: the values of the training and the test set have no such labels; `LabelError` if one is invalid.
        """

    def targets(self, values: Sequence[str], labels: Sequence[str]) -> list[Any]:
        """The target of each example.

        Raises:
            LabelError: a value is invalid.
        """

    def partition_keys(self, targets: Sequence[Any]) -> list[int]:
        """The class of each example, by which the partitions `dirichlet`, `pathological` and `shards` divide."""
