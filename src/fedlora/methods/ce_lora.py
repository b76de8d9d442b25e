"""CE-LoRA: personal factors around a small core, of which each client gets its own mixture."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, pick, unpack
from fedlora.linalg.lowrank import Tri
from fedlora.linalg.subspace import likeness
from fedlora.messages import ClientInfo, Merged, Replies, Round
from fedlora.method import Local, fit
from fedlora.randomness import generator


@dataclass(frozen=True)
class Cores:
    """The core that all start from, and the last one that each client has sent."""

    start: Tensors
    last: Mapping[str, Tensors] = field(default_factory=dict)


@dataclass(frozen=True)
class CELoRA:
    """The update is b c a. A client trains all three, keeps b and a, and sends c: rank^2 floats for each module, and back.

    Client i gets back sum_j S_ij c_j over all clients that have ever sent a core, each with its last one: who is absent
    stays in the mixture. S_ij is the mean over modules of the linear centred kernel alignment of c_i and c_j, in [0, 1],
    divided by the sum of the row (`normaliser` "l1"), or its softmax. Without `include_self` a client gets nothing of its
    own core, unless it is the only one. The numbers of examples do not count. A client that has never sent a core gets the
    plain mean. Mixing costs O(clients^2 rank^3) for each module and round.

    b starts at 0, c at the identity and a with normal entries of deviation `std`: the released code's 1e-3, with which
    training starts slowly and depends on an optimiser that normalises its steps. Cores mean something to each other only as
    long as the clients' b and a stay close; hence `shared_a`: all draw the same a.

    The paper mixes by the likeness of the clients' data too: class-conditional Gaussian mixtures of features, compared by
    optimal transport. That part is not here, as a method cannot ask for features: S is that of the cores alone, which the
    paper's mixture would be with lambda 0. The server's part is missing in the released code, and the paper's text was not
    available: the form of S and absent and new clients are this package's. The code also trains layer norms, which have no
    place in an adapter.

    Source: Li et al. 2025, arXiv:2503.23869, and its released code.
    """

    rank: int = 8
    std: float = 1e-3
    shared_a: bool = True
    include_self: bool = True
    normaliser: Literal["l1", "softmax"] = "l1"

    def init_server(self, spec: AdapterSpec, seed: int) -> Cores:
        """The identity, and nobody's core."""
        return Cores({f"{name}.c": torch.eye(spec.rank(name, self.rank), dtype=spec.dtype) for name in spec.modules})

    def init_client(self, spec: AdapterSpec, who: ClientInfo, seed: int) -> dict[str, Tensor]:
        """b = 0 and a random a."""
        drawn: dict[str, Tensor] = {}
        for name, (out, in_) in spec.modules.items():
            rank, owner = spec.rank(name, self.rank), "" if self.shared_a else who.id
            a = self.std * torch.randn(rank, in_, generator=generator(seed, "ce_lora", name, owner))
            drawn |= {f"{name}.b": torch.zeros(out, rank, dtype=spec.dtype), f"{name}.a": a.to(spec.dtype)}
        return drawn

    def send(self, server: Cores, who: ClientInfo, rnd: Round) -> Tensors:
        """The client's own mixture of cores."""
        if not server.last:
            return server.start
        ids = sorted(server.last)
        stacked = {key: torch.stack([server.last[one][key] for one in ids]) for key in server.start}
        shares = self._shares(stacked, ids.index(who.id)) if who.id in server.last else _even(len(ids))
        return {key: mixed(cores, shares) for key, cores in stacked.items()}

    def view(self, mine: Tensors, got: Tensors, who: ClientInfo) -> Adapter:
        """Its own b and a around the mixture."""
        return unpack({**mine, **got}, Tri)

    def work(self, mine: Tensors, got: Tensors, who: ClientInfo, rnd: Round) -> Local[tuple[Tensors, Tensors]]:
        """Trains all three factors; keeps b and a, uploads c."""
        trained = pack((yield from fit(self.view(mine, got, who), "bca")))
        return pick(trained, "ba"), pick(trained, "c")

    def merge(self, server: Cores, replies: Replies, rnd: Round) -> Merged[Cores]:
        """Keeps the cores that came; they are mixed when they are sent."""
        came = {reply.client.id: reply.upload for reply in replies if reply.weight > 0}
        return Merged(replace(server, last={**server.last, **came}))

    def _shares(self, cores: Mapping[str, Tensor], one: int) -> Tensor:
        """Row `one` of S [clients], which sums to 1."""
        alike = torch.stack([likeness(c[one].expand_as(c), c) for c in cores.values()]).mean(0)
        others = torch.arange(len(alike)) != one
        if not self.include_self and bool(others.any()):
            alike = torch.where(others, alike, -torch.inf if self.normaliser == "softmax" else 0.0)
        if self.normaliser == "softmax":
            return alike.softmax(0)
        total = alike.sum()
        return alike / total if total > 0 else _even(len(alike))


def mixed(cores: Tensor, shares: Tensor) -> Tensor:
    """sum_j shares_j cores_j [rank, rank], summed in fp64."""
    return torch.einsum("k,kij->ij", shares, cores.to(shares.dtype)).to(cores.dtype)


def _even(clients: int) -> Tensor:
    return torch.full((clients,), 1 / clients, dtype=torch.float64)
