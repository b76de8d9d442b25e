"""HetLoRA: clients of unequal ranks train leading slices, prune their rank, and are zero-padded and averaged by norm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Scaling, Tensors, low_rank, pack, pick, unpack
from fedlora.linalg.combine import leading, norm, pad, widen
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.methods.flexlora import Sliced
from fedlora.methods.scaled import unscaled
from fedlora.ranges import AtMost, Fraction, NonNegativeFloat, PositiveInt, checked

_SMOOTH = 1e-12  # added under the square root of the tail's norms, whose gradient at 0 is undefined
_LEAST = 1e-30  # weight of updates with norm zero: if all norms are zero, all clients have equal weight


@dataclass(frozen=True)
class Kept:
    """The remaining rank of each module after pruning, and PEFT's scaling of factors by rank."""

    ranks: Mapping[str, int]
    scaling: Scaling


@dataclass(frozen=True)
@checked
class HetLoRA(Method[Sliced, Kept, Mapping[str, Mean]]):
    """b and a, averaged separately over clients of ranks r_k <= r after zero-padding.

    Client k is weighted by the Frobenius norm of its update b_k a_k, regardless of its number of examples: per module
    with `norm_scope` "layer", over all modules with "model". The merge is inexact for two reasons: the factors are
    averaged separately, and padding shrinks the product of a component by c^2 in every round, where c is the total
    weight of the clients that have it.

    A component that no client of the round has loses its product, and restarts from b = 0 and a fresh row in a.

    A client's tail consists of its components from floor(gamma r_k) on. The loss gets `tail_penalty` (lambda) times the
    product of the norms of the tail's columns of PEFT's `lora_B` and rows of `lora_A`, summed over modules. If that sum
    is smaller after training than before, the client removes its tail permanently: its rank only decreases, but not
    below `min_rank`. The new rank is client state; in messages, factors keep the client's original rank, with zeros for
    pruned components.

    Source: Cho et al. 2024, arXiv:2401.06432; for details it does not specify (norm scope, gamma, lambda),
    re-implementations.
    """

    rank: PositiveInt = 8
    gamma: Fraction = 0.99
    """The fraction of a client's ranks that pruning keeps."""
    tail_penalty: NonNegativeFloat = 0.01
    """Weight of the penalty on the ranks that pruning would remove."""
    min_rank: Annotated[PositiveInt, AtMost("rank")] = 1
    """The smallest rank to which a client is pruned."""
    norm_scope: Literal["layer", "model"] = "layer"
    """Whether clients are weighted by the norm of their update for each layer, or of the whole model."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Sliced:
        """Factors with zero update at the largest rank."""
        return Sliced.init(spec, self.rank, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Kept:
        """The rank of each module, without pruning."""
        return Kept({name: spec.rank(name, client.rank) for name in spec.modules}, spec.scaling)

    def send(self, server: Sliced, client: ClientInfo, rnd: Round) -> Tensors:
        """The leading components, up to the client's original rank."""
        return pack(server.leading(client.rank))

    def view(self, state: Kept, download: Tensors, client: ClientInfo) -> Adapter:
        """The components that the client has not pruned."""
        return self._own(state, download)

    def work(self, state: Kept, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Kept, Upload]]:
        """Trains with the penalty, prunes if the tail shrank, and uploads the factors at the original rank."""
        start = self._own(state, download)
        kept = {name: self._kept(part.rank) for name, part in start.items()}
        scales = {name: state.scaling.of(name, part.rank) for name, part in start.items()}
        penalty = partial(_penalty, self.tail_penalty, kept, scales) if self.tail_penalty else None
        trained = low_rank((yield from fit(start, penalty=penalty)))
        if tail(unscaled(trained, scales), kept) < tail(unscaled(start, scales), kept):
            state = replace(state, ranks=kept)
            trained = {name: leading(part, kept[name]) for name, part in trained.items()}
        wide = unpack(download, LowRank)
        return state, Upload(pack({name: pad(part, wide[name].rank) for name, part in trained.items()}))

    def collect(self, server: Sliced, collected: Mapping[str, Mean] | None, reply: Reply) -> Mapping[str, Mean]:
        """Each module's norm-weighted mean of the padded factors."""
        means = collected or {name: Mean() for name in server.adapter}
        for name, (weight, part) in self._weighted(reply).items():
            means[name].add(weight, pack({name: pad(part, server.adapter[name].rank)}), reply.client.id)
        return means

    def merge(self, server: Sliced, collected: Mapping[str, Mean], rnd: Round) -> Merged[Sliced]:
        """The means, with fresh rows for components that no client has."""
        merged = {name: unpack(mean.tensors(), LowRank)[name] for name, mean in collected.items()}
        adapter = {name: widen(part, part.rank, rnd.rng(f"hetlora {name}")) for name, part in merged.items()}
        return Merged(replace(server, adapter=adapter))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The change since the download, which has the registered rank too."""
        return changes(unpack(upload.values, LowRank), unpack(known.download, LowRank))

    def _weighted(self, reply: Reply) -> dict[str, tuple[float, LowRank]]:
        """Each module's weight and factors; the weight is zero if the reply's weight is."""
        parts = unpack(reply.upload.values, LowRank)
        sizes = {name: float(norm(part)) for name, part in parts.items()}
        if self.norm_scope == "model":
            sizes = dict.fromkeys(sizes, math.hypot(*sizes.values()))
        return {name: (max(sizes[name], _LEAST) if reply.weight else 0.0, part) for name, part in parts.items()}

    def _own(self, state: Kept, download: Tensors) -> dict[str, LowRank]:
        return {name: leading(part, state.ranks[name]) for name, part in unpack(download, LowRank).items()}

    def _kept(self, rank: int) -> int:
        """The rank without the tail; the rank itself if it may not decrease."""
        return min(rank, max(self.min_rank, math.floor(self.gamma * rank + 1e-9)))


def _penalty(strength: float, kept: Mapping[str, int], scales: Mapping[str, float], live: Tensors) -> Tensor:
    return strength * tail(unscaled(unpack(pick(live, "ba"), LowRank), scales), kept)


def tail(adapter: Mapping[str, LowRank], kept: Mapping[str, int]) -> Tensor:
    """The product of the norms of the columns of b and of the rows of a from `kept` on, summed over modules."""
    norms = [
        (part.b[:, kept[name] :].square().sum() + _SMOOTH).sqrt() * (part.a[kept[name] :].square().sum() + _SMOOTH).sqrt()
        for name, part in adapter.items()
    ]
    return torch.stack(norms).sum()
