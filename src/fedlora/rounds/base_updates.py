"""Base updates, which are changes of the frozen base: the log of them, their delivery to clients, their encoding."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo


@runtime_checkable
class BaseUpdateStore(Protocol):
    """Storage of base updates."""

    def save_base_update(self, index: int, base_update: Adapter) -> None:
        """Saves the base update of the round with this index."""

    def base_update(self, index: int) -> Mapping[str, LowRank]:
        """Loads the base update of the round with this index."""


@dataclass(frozen=True)
class BaseUpdateLog:
    """Indices of the rounds with a base update, in order, and the number of base updates that each client has applied."""

    rounds: tuple[int, ...] = ()
    applied: Mapping[str, int] = field(default_factory=dict)

    def pending(self, client: str) -> tuple[int, ...]:
        """Rounds whose base updates the client has not applied, in the order in which it must apply them."""
        return self.rounds[self.applied.get(client, 0) :]

    def delivered(self, clients: Iterable[str]) -> "BaseUpdateLog":
        """Returns the log after these clients have applied all base updates."""
        if not self.rounds:
            return self
        return replace(self, applied={**self.applied, **dict.fromkeys(clients, len(self.rounds))})

    def known(self, held: Mapping[str, Sequence[int]]) -> "BaseUpdateLog":
        """Returns the log corrected by the base updates that these clients report, counted up to the first missing one."""
        if not held or not self.rounds:
            return self
        counts = {
            client: next((i for i, r in enumerate(self.rounds) if r not in has), len(self.rounds))
            for client, has in held.items()
        }
        return replace(self, applied={**self.applied, **counts})

    def added(self, index: int) -> "BaseUpdateLog":
        """Returns the log with one more base update."""
        return replace(self, rounds=(*self.rounds, index))


def pending_tensors(base_updates: Mapping[int, Mapping[str, LowRank]], spec: AdapterSpec) -> dict[str, Tensor]:
    """Encodes the base updates of these rounds: the factors of each module, or the dense matrix if it is smaller.

    Each base update is sent separately, with its round's index: a client that has some of them applies the others, and
    all bases to which all base updates were added one by one are bitwise equal.
    """
    tensors: dict[str, Tensor] = {}
    for index, base_update in base_updates.items():
        for name, part in base_update.items():
            out, in_ = spec.modules[name]
            if part.rank * (out + in_) < out * in_:
                tensors |= {f"{index}/{name}.b": part.b, f"{index}/{name}.a": part.a}
            else:
                tensors[f"{index}/{name}.w"] = part.product()
    return tensors


def pending_base_updates(
    spec: AdapterSpec, store: BaseUpdateStore, base_updates: BaseUpdateLog, clients: Sequence[ClientInfo]
) -> dict[ClientInfo, Tensors]:
    """Pending base updates of each client that has any; clients with the same pending base updates share the tensors."""
    made: dict[tuple[int, ...], Tensors] = {}
    for pending in {base_updates.pending(client.id) for client in clients} - {()}:
        made[pending] = pending_tensors({index: store.base_update(index) for index in pending}, spec)
    return {client: made[pending] for client in clients if (pending := base_updates.pending(client.id))}


def base_update_indices(tensors: Tensors) -> set[int]:
    """Indices of the rounds whose base updates are in a result of `pending_tensors`."""
    return {int(key.partition("/")[0]) for key in tensors}


def caught_up(tensors: Tensors, spec: AdapterSpec) -> dict[int, dict[str, LowRank]]:
    """Inverse of `pending_tensors`, in the order of the rounds; a dense matrix w becomes the product of w and 1.

    Raises:
        ValueError: a name or a shape was not produced by `pending_tensors`.
    """
    grouped: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        index, _, rest = key.partition("/")
        name, _, factor = rest.rpartition(".")
        if not index.isdecimal() or name not in spec.modules:
            raise ValueError(f"{key!r} does not belong to a base update of this model")
        grouped.setdefault(int(index), {}).setdefault(name, {})[factor] = tensor
    return {i: {name: _factors(name, parts, spec) for name, parts in grouped[i].items()} for i in sorted(grouped)}


def _factors(name: str, parts: Tensors, spec: AdapterSpec) -> LowRank:
    if parts.keys() == {"w"}:
        parts = {"b": parts["w"], "a": torch.eye(parts["w"].shape[-1], dtype=parts["w"].dtype)}
    if parts.keys() != {"b", "a"} or {x.ndim for x in parts.values()} != {2}:
        raise ValueError(f"the base update of {name!r} has the parts {sorted(parts)}, expected b and a, or w")
    b, a = parts["b"], parts["a"]
    if (b.shape[0], a.shape[1]) != spec.modules[name] or b.shape[1] != a.shape[0]:
        raise ValueError(f"the base update of {name!r} has the shapes {tuple(b.shape)} and {tuple(a.shape)}")
    return LowRank(b, a)
