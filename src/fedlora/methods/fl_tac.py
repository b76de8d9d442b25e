"""FL-TAC: one adapter per task and client; the server clusters the adapters, and averages within each cluster."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, pick, unpack
from fedlora.linalg.cluster import silhouette
from fedlora.linalg.kmeans import agreement, embedded, kmeans
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit
from fedlora.parts.dense import Dense
from fedlora.ranges import AtMost, PositiveInt, Range, checked


@dataclass(frozen=True)
class Clusters:
    """The initial adapter, the clusters' means, and the index of each client's cluster."""

    start: Tensors
    means: tuple[Tensors, ...] = ()
    belongs: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    """Divisor of `"module.b"`, by which it becomes PEFT's `lora_B` when adapters are compared."""


@dataclass(frozen=True)
@checked
class FLTAC(Method[Clusters, None, tuple[Reply, ...]]):
    """FedIT within clusters; the clusters are computed by k-means from the uploaded adapters in each round.

    A client with several tasks (`data.task`) participates as several clients, one per task, each with its own adapter;
    task names are never sent. `tasks` is the number of clusters. By default it is chosen in each round: the number from
    2 to `max_tasks` with the largest silhouette, or one cluster if no silhouette reaches `min_silhouette` (by default
    the threshold below which Kaufman and Rousseeuw 1990 see no substantial structure). Before the adapters of different
    tasks have diverged, possibly in the first round, all are thus averaged together, while a fixed number of clusters
    would be random. Random clusters are rarely corrected: clients that start from different means remain separated, and
    the silhouette increases while `misclustered` does not change. With at most `tasks` adapters, each is its own
    cluster.

    The clustered vectors are PEFT's factors, without the scale alpha / rank, and the head, which is averaged within the
    cluster like the factors (head "method-managed"). With another head rule they are the factors only. Distances are
    Euclidean, over the whole vector. The means are weighted by examples as in the released code; in the paper they are
    not (`method.weights` "uniform").

    An absent client moves to the cluster with most members of its last cluster, or keeps its last mean if no such
    member participated. A client that has never participated starts from the initial adapter. The round log has
    `clusters`, their `silhouette`, and `missing`, the number of empty clusters, which occur if adapters are equal. If
    the tasks' names are known, as in a simulation, it also has `misclustered`, the fraction of adapters in a wrong
    cluster under the best one-to-one assignment, and `merged_tasks`, the number of tasks without a cluster in which
    they are the majority.

    Source: Ping et al. 2024, arXiv:2404.15384, and its released code.
    """

    rank: PositiveInt = 8
    tasks: Annotated[PositiveInt, AtMost("clients.count")] | None = None
    """The number of clusters. If omitted, it is chosen in each round by the silhouette.

    Example: 2
    """
    max_tasks: PositiveInt = 8
    """The largest number of clusters if `tasks` is omitted."""
    min_silhouette: Annotated[float, Range(ge=-1, le=1)] = 0.25
    """The smallest silhouette at which adapters are divided into clusters."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Clusters:
        """Factors with zero update, and the head; no clusters."""
        start = pack({**lora_init(spec, self.rank, seed), **{name: Dense(w) for name, w in spec.head.items()}})
        return Clusters(start, scales={f"{name}.b": scale for name, scale in spec.scales(self.rank).items()})

    def send(self, server: Clusters, client: ClientInfo, rnd: Round) -> Tensors:
        """The mean of the client's cluster."""
        return server.means[server.belongs[client.id]] if client.id in server.belongs else server.start

    def view(self, state: None, download: Tensors, client: ClientInfo) -> Adapter:
        """Downloaded adapter."""
        return {**unpack(pick(download, "ba"), LowRank), **unpack(pick(download, "w"), Dense)}

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Upload]]:
        """Trains and uploads the whole adapter."""
        factors = {key.rpartition(".")[2] for key in download}
        return None, Upload(pack((yield from fit(self.view(state, download, client), factors))))

    def collect(self, server: Clusters, collected: tuple[Reply, ...] | None, reply: Reply) -> tuple[Reply, ...]:
        """All replies of positive weight."""
        return (*(collected or ()), *((reply,) if reply.weight > 0 else ()))

    def merge(self, server: Clusters, collected: tuple[Reply, ...], rnd: Round) -> Merged[Clusters]:
        """Clusters the adapters, and averages within the clusters."""
        came = sorted(collected, key=lambda reply: reply.client.id)
        if not came:
            raise ValueError("cannot merge: no reply has a positive weight")
        points = embedded(
            torch.stack([reply.upload.values[key].flatten() for reply in came]) / server.scales.get(key, 1.0)
            for key in came[0].upload.values
        )
        groups = self._clustered(points, rnd.rng("k-means").initial_seed())
        means = [Mean() for _ in range(int(groups.max()) + 1)]
        for reply, group in zip(came, groups.tolist(), strict=True):
            means[group].add(reply.weight, reply.upload.values, reply.client.id)
        now = {reply.client.id: group for reply, group in zip(came, groups.tolist(), strict=True)}
        notes = {"clusters": float(len(means)), "silhouette": _silhouette(points, groups), **_diagnosis(came, groups)}
        if self.tasks is not None:
            notes["missing"] = float(min(self.tasks, len(came)) - len(means))
        return Merged(_followed(server, [mean.tensors() for mean in means], now), notes=notes)

    def update(self, known: ClientRound, upload: Upload) -> None:
        """None: there is no global product."""

    def _clustered(self, points: Tensor, seed: int) -> Tensor:
        """Each point's cluster [points]."""
        if self.tasks is not None:
            return kmeans(points, self.tasks, seed)
        tried = [kmeans(points, number, seed) for number in range(2, min(self.max_tasks, len(points) - 1) + 1)]
        best = max(tried, key=lambda groups: _silhouette(points, groups), default=None)
        together = torch.zeros(len(points), dtype=torch.long)
        return together if best is None or _silhouette(points, best) < self.min_silhouette else best


def _silhouette(points: Tensor, groups: Tensor) -> float:
    return silhouette(torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist"), groups.tolist())


def _followed(server: Clusters, means: list[dict[str, Tensor]], now: Mapping[str, int]) -> Clusters:
    """The new means, with absent clients assigned to the majority of their last cluster, or to its last mean."""
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
    """Agreement of the clusters with the tasks, if all tasks are known."""
    names = [reply.client.task for reply in came]
    if "" in names:
        return {}
    known = torch.tensor([sorted(set(names)).index(name) for name in names])
    majority = {int(known[groups == group].mode().values) for group in set(groups.tolist())}
    return {"misclustered": 1 - agreement(groups, known), "merged_tasks": float(len(set(names)) - len(majority))}
