"""FedLEASE: after a warm-up, each cluster of clients shares an expert, and routes each input through all experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, pick, unpack
from fedlora.linalg.cluster import clusters, directions, distances, pairwise
from fedlora.linalg.combine import fresh_rows
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit
from fedlora.parts.experts import Experts
from fedlora.ranges import AtMost, NonNegativeInt, PositiveInt, checked


@dataclass(frozen=True)
class First:
    """A client's latest upload of the warm-up, b and a, and its weight."""

    weight: float
    upload: Tensors


@dataclass(frozen=True)
class Allocation:
    """The server's state: `first` until the clusters exist, then the other fields.

    `members` maps clients to clusters. `downloads` has the download of each cluster's members: its expert, and a copy of
    the others. `centers` maps "module.b" to the mean directions of b of each cluster's founders [clusters, out * rank].
    """

    first: Mapping[str, First] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    downloads: tuple[Tensors, ...] = ()
    centers: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """The round's uploads: `first` of the warm-up; then the mean of each cluster, and the clusters of new clients."""

    first: Mapping[str, First] = field(default_factory=dict)
    means: Mapping[int, Mean] = field(default_factory=dict)
    joined: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
@checked
class FedLEASE(Method[Allocation, Tensors, Collected]):
    """Each cluster of clients trains one expert b a, and a router that mixes in the frozen experts of the others.

    In `warmup_rounds` rounds each client trains and uploads its own adapter, all from the same start. Then the server
    clusters the participants once, by average linkage; the distance of two clients is 1 - cosine of their b, averaged
    over modules. The number of clusters is `experts`, or, if that is 0, the one from 2 to `max_experts` with the
    largest silhouette. A cluster's expert starts at the mean of its members' adapters, and its router is initialized
    like `torch.nn.Linear`. From then on a client trains and uploads its cluster's expert and router (see
    `linalg.lowrank.Experts`); the server averages them over the participating members. An expert without participants
    is unchanged. With one cluster there is no router, and the method is FedIT; this is also the case if fewer than
    three clients participate in the warm-up, for which the silhouette is undefined.

    `warmup_rounds` is one in the paper, five in the released code. The paper weighs clients equally (`method.weights`
    "uniform"). In the released code each client continues from its own adapter instead of the mean, with all other
    experts at zero, and has its own random head that is never trained; here the head is personal and trained. The
    download includes all experts, so that the frozen ones are up to date; the paper counts only one.

    In the paper all clients participate. Here, a client that missed the warm-up trains its own adapter in its first
    round, and joins the cluster whose founders' b are nearest on average; its adapter is not added to an expert. Until
    then it is evaluated with its own adapter. `warmup_rounds` should be large enough for most clients to participate.

    Source: Wang et al. 2025, NeurIPS, arXiv:2509.15087, and its released code.
    """

    rank: PositiveInt = 8
    warmup_rounds: Annotated[PositiveInt, AtMost("rounds")] = 1
    """The number of rounds before clients are clustered."""
    max_experts: PositiveInt = 4
    """The largest number of clusters if `experts` is 0."""
    experts: Annotated[NonNegativeInt, AtMost("clients.count")] = 0
    """The number of clusters; 0: chosen by the silhouette."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Allocation:
        """An empty set of adapters."""
        return Allocation()

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Tensors:
        """An adapter with zero update, the same on every client, so that directions of b are compared for the same a."""
        return pack(lora_init(spec, self.rank, seed))

    def send(self, server: Allocation, client: ClientInfo, rnd: Round) -> Tensors:
        """The client's expert and router and the other experts; empty for a client without a cluster."""
        return server.downloads[server.members[client.id]] if client.id in server.members else {}

    def view(self, state: Tensors, download: Tensors, client: ClientInfo) -> Adapter:
        """The experts with their router, a single expert, or the client's own adapter."""
        return unpack(download, Experts) if pick(download, "g") else unpack(download or state, LowRank)

    def work(self, state: Tensors, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Tensors, Upload]]:
        """Trains and uploads the client's own adapter, which it also keeps, or its cluster's expert and router."""
        factors = "bag" if pick(download, "g") else "ba"
        trained = pick(pack((yield from fit(self.view(state, download, client), factors))), factors)
        return state if download else trained, Upload(trained)

    def collect(self, server: Allocation, collected: Collected | None, reply: Reply) -> Collected:
        """Pairs in the warm-up; then means within clusters, and the nearest cluster of each new client."""
        so_far, client, upload = collected or Collected(), reply.client.id, reply.upload.values
        if not reply.weight > 0:
            return so_far
        if not server.downloads:
            return replace(so_far, first={**so_far.first, client: First(reply.weight, upload)})
        if client not in server.members:
            return replace(so_far, joined={**so_far.joined, client: _nearest(upload, server.centers)})
        cluster = server.members[client]
        mean = so_far.means.get(cluster) or Mean()
        mean.add(reply.weight, upload, client)
        return replace(so_far, means={**so_far.means, cluster: mean})

    def merge(self, server: Allocation, collected: Collected, rnd: Round) -> Merged[Allocation]:
        """Stores pairs; clusters them after the warm-up; then each expert is the mean of its participating members."""
        if server.downloads:
            before = [pick(download, "bag") for download in server.downloads]
            experts = [collected.means[i].tensors() if i in collected.means else x for i, x in enumerate(before)]
            members = {**server.members, **collected.joined}
            after = replace(server, members=members, downloads=_downloads(experts))
        else:
            first = {**server.first, **collected.first}
            after = Allocation(first) if rnd.index + 1 < self.warmup_rounds else self._allocated(first, rnd)
        return Merged(after, notes={"experts": float(len(after.downloads))} if after.downloads else {})

    def update(self, known: ClientRound, upload: Upload) -> None:
        """None: there is no global product."""

    def _allocated(self, first: Mapping[str, First], rnd: Round) -> Allocation:
        """The clusters of the warm-up's participants, and their initial experts."""
        ids = sorted(first)
        vectors = _directions([first[client].upload for client in ids])
        found = clusters(pairwise(list(vectors.values())), self.max_experts, self.experts)
        own = torch.tensor(found)
        means = [Mean() for _ in range(max(found) + 1)]
        for client, cluster in zip(ids, found, strict=True):
            means[cluster].add(first[client].weight, first[client].upload, client)
        experts: list[Tensors] = [mean.tensors() for mean in means]
        if len(experts) > 1:
            experts = [{**expert, **_router(expert, len(experts), rnd, i)} for i, expert in enumerate(experts)]
        centers = {key: torch.stack([x[own == i].mean(0) for i in range(len(experts))]) for key, x in vectors.items()}
        return Allocation({}, dict(zip(ids, found, strict=True)), _downloads(experts), centers)


def _downloads(experts: Sequence[Tensors]) -> tuple[Tensors, ...]:
    """For each cluster its expert and router, and the stacked experts of the others in order."""
    return tuple({**own, **_stacked([*experts[:i], *experts[i + 1 :]])} for i, own in enumerate(experts))


def _stacked(experts: Sequence[Tensors]) -> dict[str, Tensor]:
    """`"module.others_b"` [experts, out, rank] and `"module.others_a"` [experts, rank, in]; empty without experts."""
    found: dict[str, Tensor] = {}
    for key in pick(experts[0], "ba") if experts else ():
        name, _, factor = key.rpartition(".")
        found[f"{name}.others_{factor}"] = torch.stack([expert[key] for expert in experts])
    return found


def _router(expert: Tensors, experts: int, rnd: Round, number: int) -> dict[str, Tensor]:
    """`"module.g"` [slots, in], initialized at random for each module and cluster."""
    found: dict[str, Tensor] = {}
    for key, a in pick(expert, "a").items():
        name = key.removesuffix(".a")
        found[f"{name}.g"] = fresh_rows((2 * experts - 1, a.shape[1]), rnd.rng(f"router {name}", str(number))).to(a.dtype)
    return found


def _directions(uploads: Sequence[Tensors]) -> dict[str, Tensor]:
    """`"module.b"` -> the directions of the uploads' b [uploads, out * rank]."""
    return {key: directions(torch.stack([x[key].flatten() for x in uploads])) for key in sorted(pick(uploads[0], "b"))}


def _nearest(upload: Tensors, centers: Tensors) -> int:
    """The cluster with the smallest mean distance."""
    vectors = _directions([upload])
    return int(distances(list(vectors.values()), [centers[key] for key in vectors]).argmin())
