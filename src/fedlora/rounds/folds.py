"""Changes of the frozen base: which rounds made one, which client has which, and what a client that missed some is sent."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec
from fedlora.linalg.combine import stack
from fedlora.linalg.lowrank import LowRank


@runtime_checkable
class FoldStore(Protocol):
    """Where the folds are kept."""

    def save_fold(self, index: int, fold: Adapter) -> None:
        """Keeps the fold of the round of this index."""

    def fold(self, index: int) -> Mapping[str, LowRank]:
        """The fold of the round of this index."""


@dataclass(frozen=True)
class Folds:
    """The indices of the rounds that changed the base, in order, and how many of them each client has applied."""

    rounds: tuple[int, ...] = ()
    applied: Mapping[str, int] = field(default_factory=dict)

    def missed(self, client: str) -> tuple[int, ...]:
        """The rounds whose folds the client must still apply, each once and in this order."""
        return self.rounds[self.applied.get(client, 0) :]

    def delivered(self, clients: Iterable[str]) -> "Folds":
        """The same after these clients have applied all folds there are."""
        if not self.rounds:
            return self
        return replace(self, applied={**self.applied, **dict.fromkeys(clients, len(self.rounds))})

    def added(self, index: int) -> "Folds":
        """The same with one fold more."""
        return replace(self, rounds=(*self.rounds, index))


def catch_up(folds: Sequence[Mapping[str, LowRank]], spec: AdapterSpec) -> dict[str, Tensor]:
    """The sum of the folds for the wire: for each module its stacked factors, or the dense matrix where that is smaller."""
    tensors: dict[str, Tensor] = {}
    for name in folds[0] if folds else ():
        out, in_ = spec.modules[name]
        total = stack([(1.0, fold[name]) for fold in folds])
        if total.rank * (out + in_) < out * in_:
            tensors |= {f"{name}.b": total.b, f"{name}.a": total.a}
        else:
            tensors[f"{name}.w"] = total.product()
    return tensors
