"""RAVAN: several frozen random heads in each module, each with a small trained core; small clients train fewer heads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pick
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.sparse import pack_positions, unpack_positions
from fedlora.linalg.subspace import frame
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit, gradient
from fedlora.parts.heads import Heads
from fedlora.randomness import generator
from fedlora.ranges import PositiveInt, checked

_SUM = torch.float64


@dataclass(frozen=True)
class Cores:
    """The c of all heads, `"module.c"` [heads, head_rank, head_rank]; `fixed` has the ranks common to all clients."""

    c: Tensors
    fixed: Mapping[str, int]

    def trains(self, client: ClientInfo) -> dict[str, int]:
        """The number of heads of each module that the client trains."""
        return {name: self.fixed.get(name, client.rank) for name in map(_module, self.c)}


@dataclass(frozen=True)
class Frozen:
    """b and a of all heads, the same on every client, and the number of heads of each module that this client trains."""

    factors: Tensors
    trains: Mapping[str, int]


@dataclass(frozen=True)
@checked
class Ravan(Method[Cores, Frozen, Mean]):
    """The update is sum_i s_i b_i c_i a_i over heads i; b_i and a_i are random, common and frozen, of rank `head_rank`.

    `rank` is the number of heads, and a client's own rank the number of heads that it trains in each module, at least
    one. In a module whose rank is fixed, all heads are trained. The client trains the heads' c_i and s_i, with the
    other heads as frozen extra factors, and uploads the products s_i c_i. Each head becomes the mean over the clients
    that trained it, which is exact, and its s_i is reset to 1; an untrained head is unchanged. The update's rank is up
    to rank * head_rank, with rank * head_rank^2 trained parameters (plus the s_i).

    `choose` selects the heads. With "random" the server draws them for each client, round and module; with "weight" it
    selects those with the largest norm of c_i, in random order where norms are equal, as in the first round. With
    "gradient" the client selects those with the largest norm of the loss's gradient with respect to c_i, which costs
    one more pass over its examples; the indices of the heads are then uploaded instead of downloaded, and leak
    information about the data.

    `init` "normal" draws b_i and a_i such that their columns and rows have length one on average; "orthogonal" makes
    those of all heads of a module orthonormal, as far as its sizes allow. Each client draws them from the run's common
    seed. The paper's text was not available: the variances, and the largest norms in "weight" and "gradient", are this
    package's choice.

    Source: Raje et al. 2025, NeurIPS, arXiv:2506.05568.
    """

    rank: PositiveInt = 8
    """The number of heads; a client's own rank is the number that it trains."""
    head_rank: PositiveInt = 4
    """The rank of each head."""
    choose: Literal["random", "weight", "gradient"] = "random"
    """How a client's heads are chosen: random, by the norm of their cores (weight), or by the norm of their gradient
    (gradient)."""
    init: Literal["normal", "orthogonal"] = "normal"
    """The frozen factors: with normal entries, or orthonormal."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Cores:
        """Zero cores."""
        shapes = {name: (spec.rank(name, self.rank), self.head_rank, self.head_rank) for name in spec.modules}
        cores = {f"{name}.c": torch.zeros(shape, dtype=spec.dtype) for name, shape in shapes.items()}
        return Cores(cores, spec.rank_pattern)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Frozen:
        """b and a of all heads, the same on every client."""
        drawn: dict[str, Tensor] = {}
        for name, (out, in_) in spec.modules.items():
            ranks, rng = spec.rank(name, self.rank) * self.head_rank, generator(seed, "ravan", name)
            drawn[f"{name}.b"] = self._columns(out, ranks, rng).to(spec.dtype)
            drawn[f"{name}.a"] = self._columns(in_, ranks, rng).mT.contiguous().to(spec.dtype)
        return Frozen(drawn, {name: spec.rank(name, client.rank) for name in spec.modules})

    def send(self, server: Cores, client: ClientInfo, rnd: Round) -> Tensors:
        """All cores, and the heads that this client trains, unless it chooses them itself."""
        if self.choose == "gradient":
            return server.c
        return {**server.c, "heads": _packed(server.c, self._told(server, client, rnd))}

    def view(self, state: Frozen, download: Tensors, client: ClientInfo) -> Adapter:
        """The adapter of all heads."""
        return _heads(state, download)

    def work(self, state: Frozen, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Frozen, Upload]]:
        """Trains c and s of the client's heads, with the others frozen, and uploads s c."""
        heads, cores = _heads(state, download), pick(download, "c")
        if chooses := self.choose == "gradient":
            own = yield from _steepest(heads, state.trains)
        else:
            own = own_heads(cores, download["heads"], state.trains)
        rest = {
            name: others(part, own[name]).as_two_factors() for name, part in heads.items() if len(own[name]) < len(part.s)
        }
        trained = yield from fit(
            {name: chosen(part, own[name]) for name, part in heads.items()}, "cs", frozen_extra=rest or None
        )
        products = {f"{n}.c": p.s[:, None, None] * p.c for n, p in trained.items() if isinstance(p, Heads)}
        return state, Upload(products, {"heads": _packed(cores, own)} if chooses else {})

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """The template: each client has a fixed number of heads in every module.

        Raises:
            ValueError: the client has chosen another number of heads.
        """
        self._own(known, upload)
        return template

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """The cores of all heads, zero for untrained ones, and a count of 1 for each trained one; fp64."""
        found: dict[str, Tensor] = {}
        for name, heads in self._own(known, upload).items():
            own, whole = upload.values[f"{name}.c"], known.download[f"{name}.c"]
            found[f"{name}.c"] = torch.zeros(whole.shape, dtype=_SUM).index_copy(0, heads, own.to(_SUM))
            found[f"{name}.count"] = torch.zeros(len(whole), dtype=_SUM).index_fill(0, heads, 1.0)
        return found

    def merge(self, server: Cores, collected: Mean, rnd: Round) -> Merged[Cores]:
        """Each head's mean over the clients that trained it."""
        mean, merged = collected.tensors(), dict[str, Tensor]()
        for key, before in server.c.items():
            count = mean[f"{_module(key)}.count"][:, None, None]
            merged[key] = torch.where(count > 0, (mean[key] / count.clamp_min(1e-300)).to(before.dtype), before)
        return Merged(replace(server, c=merged))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The change of the client's heads between their frozen factors."""
        found: dict[str, LowRank] = {}
        before, own = _heads(known.initial, known.download), self._own(known, upload)
        for name, part in before.items():
            mine = chosen(part, own[name])
            found[name] = replace(mine, c=upload.values[f"{name}.c"] - mine.c).as_two_factors()
        return found

    def _own(self, known: ClientRound, upload: Upload) -> dict[str, Tensor]:
        """Module -> the numbers of the heads that the client trains: its choice, or the server's in the download."""
        packed = upload.choices["heads"] if self.choose == "gradient" else known.download["heads"]
        return own_heads(pick(known.download, "c"), packed, known.initial.trains)

    def _told(self, server: Cores, client: ClientInfo, rnd: Round) -> dict[str, Tensor]:
        """Module -> the indices of the heads that the server selects for the client, ascending."""
        found, trains = dict[str, Tensor](), server.trains(client)
        for key, c in server.c.items():
            order = torch.randperm(len(c), generator=rnd.rng(f"heads {key}", client.id))
            if self.choose == "weight":
                norms = c.to(_SUM).flatten(1).norm(dim=1)
                order = order[norms[order].argsort(descending=True, stable=True)]
            found[_module(key)] = order[: trains[_module(key)]].sort().values
        return found

    def _columns(self, n: int, k: int, rng: torch.Generator) -> Tensor:
        """Frozen columns [n, k]."""
        return frame(n, k, rng) if self.init == "orthogonal" else torch.randn(n, k, generator=rng) / n**0.5


def own_heads(cores: Tensors, packed: Tensor, trains: Mapping[str, int]) -> dict[str, Tensor]:
    """Module -> the indices of the heads that the client trains, ascending; `cores` has the c of all heads.

    Raises:
        ValueError: their number in a module differs from the number that the client trains.
    """
    totals = {_module(key): len(c) for key, c in sorted(cores.items())}
    counts = [trains[name] for name in totals]
    marks = torch.split(unpack_positions(packed, sum(counts), sum(totals.values())), list(totals.values()))
    if any(int(own.sum()) != count for own, count in zip(marks, counts, strict=True)):
        raise ValueError(f"expected {counts} heads of the modules {list(totals)}, got {[int(own.sum()) for own in marks]}")
    return {name: own.nonzero().flatten() for name, own in zip(totals, marks, strict=True)}


def _packed(cores: Tensors, own: Mapping[str, Tensor]) -> Tensor:
    """Packed positions of these heads among all heads of all modules, sorted by name, as tensors have no fixed order."""
    marks = []
    for key, c in sorted(cores.items()):
        marks.append(torch.zeros(len(c), dtype=torch.bool).index_fill(0, own[_module(key)], True))
    return pack_positions(torch.cat(marks))


def _steepest(heads: Mapping[str, Heads], trains: Mapping[str, int]) -> Local[dict[str, Tensor]]:
    """Module -> the indices of the heads whose cores have the largest gradient of the client's loss, ascending."""
    if all(trains[name] >= len(part.s) for name, part in heads.items()):
        return {name: torch.arange(len(part.s)) for name, part in heads.items()}
    slopes = yield from gradient(heads, "c")
    norms = {name: part.c.flatten(1).norm(dim=1) for name, part in slopes.items() if isinstance(part, Heads)}
    return {name: x.argsort(descending=True, stable=True)[: trains[name]].sort().values for name, x in norms.items()}


def chosen(part: Heads, heads: Tensor) -> Heads:
    """These heads only."""
    count, rank = part.c.shape[:2]
    columns = part.b.reshape(-1, count, rank)[:, heads]  # [out, these heads, head_rank]
    rows = part.a.reshape(count, rank, -1)[heads]  # [these heads, head_rank, in]
    return Heads(b=columns.flatten(1), c=part.c[heads], s=part.s[heads], a=rows.flatten(0, 1))


def others(part: Heads, heads: Tensor) -> Heads:
    """All other heads."""
    left_out = torch.ones(len(part.s), dtype=torch.bool)
    left_out[heads] = False
    return chosen(part, left_out.nonzero().flatten())


def _heads(state: Frozen, download: Tensors) -> dict[str, Heads]:
    """All heads of each module, with every scalar 1."""
    drawn = state.factors
    return {
        (name := _module(key)): Heads(b=drawn[f"{name}.b"], c=c, s=c.new_ones(len(c)), a=drawn[f"{name}.a"])
        for key, c in pick(download, "c").items()
    }


def _module(key: str) -> str:
    return key.removesuffix(".c")
