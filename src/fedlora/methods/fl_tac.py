"""FL-TAC: an adapter for each task of each client, averaged with those that the server takes for the same task's."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Dense, Tensors, lora_init, pack, pick, unpack
from fedlora.linalg.cluster import silhouette
from fedlora.linalg.kmeans import agreement, embedded, kmeans
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Reply, Round, RunningMean
from fedlora.method import Local, fit
from fedlora.ranges import AtMost, PositiveInt, Range, checked


@dataclass(frozen=True)
class Clusters:
    """The adapter that all start from, the clusters' means, and the number of each client's cluster."""

    start: Tensors
    means: tuple[Tensors, ...] = ()
    belongs: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    """What `"module.b"` is divided by before adapters are compared: then it is PEFT's."""


@dataclass(frozen=True)
@checked
class FLTAC:
    """FedIT within clusters, which k-means finds anew in each round among all adapters that came.

    A client with several tasks (`data.task`) takes part as several clients, one for each, with an adapter each; no task's
    name travels. `tasks` is the number of clusters. By default it is chosen in each round: that of the largest silhouette
    from 2 to `most_tasks`, and one cluster where no silhouette reaches `apart` (by default what Kaufman and Rousseeuw 1990
    call no substantial structure). As long as adapters of different tasks have not gone apart, as perhaps in the first
    round, all are then averaged together; with a number given they are divided by chance. Clusters that differ by chance
    are hardly ever mended: who starts from different means stays apart, and the silhouette grows while `misclustered`
    stays. With no more adapters than `tasks`, each is a cluster of its own.

    The vectors are b and a as PEFT has them, without the scale alpha / rank, and the head (head "own"), which is averaged
    within the cluster like the factors. Under another head rule they are b and a alone. Distances are Euclidean, of all
    together. The means are weighted by examples as in the released code; the paper's are not: `method.weights` "uniform".

    A client that was absent goes where most of its last cluster went, or keeps what it had if none of that took part. One
    that has never taken part starts from the beginning. The round log has `clusters`, their `silhouette`, and `missing`
    clusters that came out empty as adapters were equal; where the tasks' names are known, as in a simulation, also
    `misclustered`, the part of the adapters in a wrong cluster under the best one-to-one naming, and `merged_tasks`,
    those that are in the majority nowhere.

    Source: Ping et al. 2024, arXiv:2404.15384, and its released code.
    """

    rank: PositiveInt = 8
    tasks: Annotated[PositiveInt, AtMost("clients.count")] | None = None
    """The number of clusters. If omitted, it is chosen in each round by the silhouette.

    Example: 2
    """
    most_tasks: PositiveInt = 8
    """The largest number of clusters where `tasks` is omitted."""
    apart: Annotated[float, Range(ge=-1, le=1)] = 0.25
    """The smallest silhouette at which adapters are divided into clusters."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Clusters:
        """Factors of update zero and the head; no clusters."""
        start = pack({**lora_init(spec, self.rank, seed), **{name: Dense(w) for name, w in spec.head.items()}})
        return Clusters(start, scales={f"{name}.b": scale for name, scale in spec.scales(self.rank).items()})

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> None:
        """Nothing: an adapter lives for a round."""

    def send(self, server: Clusters, client: ClientInfo, rnd: Round) -> Tensors:
        """The mean of the client's cluster."""
        return server.means[server.belongs[client.id]] if client.id in server.belongs else server.start

    def view(self, state: None, download: Tensors, client: ClientInfo) -> Adapter:
        """What came."""
        return {**unpack(pick(download, "ba"), LowRank), **unpack(pick(download, "w"), Dense)}

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Tensors]]:
        """Trains and uploads all of it."""
        factors = {key.rpartition(".")[2] for key in download}
        return None, pack((yield from fit(self.view(state, download, client), factors)))

    def merge(self, server: Clusters, replies: Replies, rnd: Round) -> Merged[Clusters]:
        """Clusters the adapters, and averages within the clusters."""
        came = sorted((reply for reply in replies if reply.weight > 0), key=lambda reply: reply.client.id)
        if not came:
            raise ValueError("cannot merge: no reply has a positive weight")
        points = embedded(
            torch.stack([reply.upload[key].flatten() for reply in came]) / server.scales.get(key, 1.0)
            for key in came[0].upload
        )
        groups = self._clustered(points, rnd.rng("k-means").initial_seed())
        means = [RunningMean() for _ in range(int(groups.max()) + 1)]
        for reply, group in zip(came, groups.tolist(), strict=True):
            means[group].add(reply.weight, reply.upload, reply.client.id)
        now = {reply.client.id: group for reply, group in zip(came, groups.tolist(), strict=True)}
        notes = {"clusters": float(len(means)), "silhouette": _silhouette(points, groups), **_diagnosis(came, groups)}
        if self.tasks is not None:
            notes["missing"] = float(min(self.tasks, len(came)) - len(means))
        return Merged(_followed(server, [mean.mean() for mean in means], now), notes=notes)

    def _clustered(self, points: Tensor, seed: int) -> Tensor:
        """Each point's cluster [points]."""
        if self.tasks is not None:
            return kmeans(points, self.tasks, seed)
        tried = [kmeans(points, number, seed) for number in range(2, min(self.most_tasks, len(points) - 1) + 1)]
        best = max(tried, key=lambda groups: _silhouette(points, groups), default=None)
        together = torch.zeros(len(points), dtype=torch.long)
        return together if best is None or _silhouette(points, best) < self.apart else best


def _silhouette(points: Tensor, groups: Tensor) -> float:
    return silhouette(torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist"), groups.tolist())


def _followed(server: Clusters, means: list[dict[str, Tensor]], now: Mapping[str, int]) -> Clusters:
    """The new means, and those who were absent with most of their last cluster, or with its last mean."""
    belongs, kept = dict(now), list[Tensors](means)
    for group, mean in enumerate(server.means):
        members = [client for client, number in server.belongs.items() if number == group]
        went = Counter(sorted(now[client] for client in members if client in now)).most_common(1)
        absent = [client for client in members if client not in now]
        if absent and not went:
            kept.append(mean)
        belongs |= dict.fromkeys(absent, went[0][0] if went else len(kept) - 1)
    return replace(server, means=tuple(kept), belongs=belongs)


def _diagnosis(came: Sequence[Reply], groups: Tensor) -> dict[str, float]:
    """How far the clusters are the tasks, if all of these are known."""
    names = [reply.client.task for reply in came]
    if "" in names:
        return {}
    known = torch.tensor([sorted(set(names)).index(name) for name in names])
    majority = {int(known[groups == group].mode().values) for group in set(groups.tolist())}
    return {"misclustered": 1 - agreement(groups, known), "merged_tasks": float(len(set(names)) - len(majority))}
