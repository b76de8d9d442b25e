"""Replies that no training made, with uneven weights, and what a merge should make of them, dense and in fp64."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Reply, Round
from fedlora.randomness import generator

SPEC = AdapterSpec(modules={"layer.2.q": (48, 20), "layer.10.v": (20, 33), "layer.3.q": (48, 20)})
ROUND = Round(1, 0)


def factors(rank: int, *names: str | int, spec: AdapterSpec = SPEC, size: float = 1.0) -> dict[str, LowRank]:
    """Random factors that depend on the names only."""
    drawn = {}
    for module, (out, in_) in spec.modules.items():
        r, rng = spec.rank(module, rank), generator(0, module, *names)
        b, a = torch.randn(out, r, generator=rng), torch.randn(r, in_, generator=rng)
        drawn[module] = LowRank(b=(size * b).to(spec.dtype), a=(size * a).to(spec.dtype))
    return drawn


def replies_of(uploads: Sequence[Mapping[str, LowRank]], ranks: Sequence[int] | None = None) -> list[Reply]:
    """One reply for each, of weights 10, 17, 24, ..."""
    ranks = ranks or [next(iter(upload.values())).rank for upload in uploads]
    clients = [ClientInfo(str(i), rank, 10 + 7 * i) for i, rank in enumerate(ranks)]
    return [Reply(w, ROUND, pack(upload), float(w.examples)) for w, upload in zip(clients, uploads, strict=True)]


def replies_of_ranks(*ranks: int, spec: AdapterSpec = SPEC, seed: int = 0) -> list[Reply]:
    """Clients that have nothing in common."""
    return replies_of([factors(rank, "client", i, seed, spec=spec) for i, rank in enumerate(ranks)], ranks)


def drifted(count: int, rank: int, drift: float = 0.3, seed: int = 0, spec: AdapterSpec = SPEC) -> list[Reply]:
    """Clients that went apart from a common start."""
    start, moves = factors(rank, "start", seed, spec=spec), range(count)
    return replies_of([plus(start, factors(rank, "move", i, seed, spec=spec, size=drift)) for i in moves])


def plus(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The sums of the factors, each on its own."""
    return {name: LowRank(b=part.b + other[name].b, a=part.a + other[name].a) for name, part in one.items()}


def mean_product(replies: Sequence[Reply]) -> dict[str, Tensor]:
    """The weighted mean of the products."""
    total = sum(reply.weight for reply in replies)
    sent = [(reply.weight / total, unpack(reply.upload, LowRank)) for reply in replies]
    return {name: sum(w * dense(parts[name]) for w, parts in sent) for name in sent[0][1]}


def merged_by(method: Any, replies: Sequence[Reply], server: Any = None, spec: AdapterSpec = SPEC) -> Merged[Any]:
    """What the method makes of replies that come as a stream."""
    server = method.init_server(spec, 0) if server is None else server
    return method.merge(server, Replies(iter(replies)), ROUND)


def update(method: Any, merged: Merged[Any], rank: int | None = None, spec: AdapterSpec = SPEC) -> dict[str, Tensor]:
    """What a client of that rank, new and without training, adds to the base as it was before the merge."""
    client = ClientInfo("new", rank or method.rank, 1)
    view = method.view(method.init_client(spec, client, 0), method.send(merged.server, client, ROUND), client)
    return {
        name: dense(part) + (dense(merged.base_update[name]) if merged.base_update else 0) for name, part in view.items()
    }


def off(download: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The Frobenius distance over all modules, relative."""
    assert download.keys() == wanted.keys()
    apart = sum(float((download[name] - wanted[name]).square().sum()) for name in wanted)
    return (apart / sum(float(x.square().sum()) for x in wanted.values())) ** 0.5


def truncated(matrices: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The nearest matrices of that rank."""
    found = {}
    for name, matrix in matrices.items():
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        found[name] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return found


def dense(part: LowRank) -> Tensor:
    """The product in fp64."""
    return part.b.double() @ part.a.double()
