"""Replies that no training made, with uneven weights, and what a merge should make of them, dense and in fp64."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Reply, Round, Upload
from fedlora.randomness import generator
from fedlora.rounds.codec import decode, encode
from fedlora.rounds.validator import UploadValidator

from merging import known_of, merge

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
    return [Reply(w, ROUND, Upload(pack(upload)), float(w.examples)) for w, upload in zip(clients, uploads, strict=True)]


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
    sent = [(reply.weight / total, unpack(reply.upload.values, LowRank)) for reply in replies]
    return {name: sum(w * dense(parts[name]) for w, parts in sent) for name in sent[0][1]}


def mean_change(method: Any, replies: Sequence[Reply], server: Any, spec: AdapterSpec = SPEC) -> dict[str, Tensor]:
    """The weighted mean of what the products have changed by since each client's download."""
    total, found = sum(reply.weight for reply in replies), mean_product(replies)
    for reply in replies:
        known = known_of(method, server, reply, spec)
        for name, part in method.view(known.initial, known.download, known.client).items():
            found[name] = found[name] - reply.weight / total * dense(part)
    return found


def merged_by(method: Any, replies: Sequence[Reply], server: Any = None, spec: AdapterSpec = SPEC) -> Merged[Any]:
    """What the method makes of the replies, by default in its first round."""
    return merge(method, method.init_server(spec, 0) if server is None else server, replies, spec)


def update(method: Any, merged: Merged[Any], rank: int | None = None, spec: AdapterSpec = SPEC) -> dict[str, Tensor]:
    """What a client of that rank, new and without training, adds to the base as it was before the merge."""
    client = ClientInfo("new", rank or method.rank, 1)
    view = method.view(method.init_client(spec, client, 0), method.send(merged.server, client, ROUND), client)
    return {
        name: dense(part) + (dense(merged.base_update[name]) if merged.base_update else 0) for name, part in view.items()
    }


def measured_error(
    method: Any, merged: Merged[Any], replies: Sequence[Reply], server: Any, spec: AdapterSpec = SPEC
) -> float:
    """How far a merge has moved the global product from the mean of the clients' changes, relative to that mean."""
    before = update(method, Merged(server), spec=spec)
    made = {name: after - before[name] for name, after in update(method, merged, spec=spec).items()}
    return off(made, mean_change(method, replies, server, spec))


def rejection(method: Any, server: Any, reply: Reply, spec: AdapterSpec) -> str:
    """Why the server rejects the reply after it has crossed the wire; empty if it accepts it."""
    sent = {reply.client: method.send(server, reply.client, reply.round)}
    upload = Upload.of(decode(encode(reply.upload.flat())))
    found = UploadValidator(method, spec, reply.round, sent).accept(replace(reply, upload=upload))
    return found if isinstance(found, str) else ""


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
