"""CE-LoRA: personal b and a, and a small core c between them; each client downloads its own mixture of all cores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, pick, unpack
from fedlora.linalg.mixture import Mixtures, components, fit_mixtures, validation_error
from fedlora.linalg.subspace import similarity
from fedlora.linalg.transport import mixture_distance
from fedlora.messages import ClientInfo, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, features, fit
from fedlora.parts.three_factor import ThreeFactor
from fedlora.randomness import generator
from fedlora.ranges import PositiveFloat, PositiveInt, UnitInterval, checked

_ASKED = "data/asked"
_FAR = torch.finfo(torch.float64).max  # the distance to a client without any mixture: states must be finite


@dataclass(frozen=True)
class Cores:
    """The initial core, each client's last uploaded core, and the Gaussian mixtures of the clients' data.

    `apart` [clients, clients] has the distances between the clients' data, in the order of `data`.
    """

    start: Tensors
    last: Mapping[str, Tensors] = field(default_factory=dict)
    data: Mapping[str, Mixtures] = field(default_factory=dict)
    apart: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))


@dataclass(frozen=True)
@checked
class CELoRA(Method[Cores, Tensors, Mapping[str, Upload]]):
    """The update is b c a. A client trains all three, keeps b and a, and exchanges c: rank^2 floats per module, each way.

    Client i downloads sum_j S_ij c_j over all clients that have ever uploaded a core, each with its last one, so absent
    clients stay in the mixture. S is `data_weight` (the paper's lambda) times the similarity of the data plus
    1 - `data_weight` times that of the cores, with each row divided by its sum (`normalizer` "l1") or passed through a
    softmax. Without `include_self` a client's own core is excluded, unless it is the only one. Numbers of examples have no
    influence. A client that has never uploaded a core gets the plain mean. Mixing costs O(clients^2 rank^3) per module and
    round.

    The similarity of cores is the mean over modules of their linear centered kernel alignment, in [0, 1]. The similarity of
    data is exp(-d_ij / `tau`), `tau` by default the median of d over all pairs of clients. With its first core a client
    also uploads Gaussian mixtures of its examples' base-model features, one for each label, unless `data_weight` is 0; d is
    the cost of optimal transport between labels, with the transport cost between Gaussians as cost
    (`linalg/transport.py`), and is computed once for each pair of clients. The mixtures reveal much more about a client's
    examples than its cores do: for a label with at most three examples they are the features themselves.

    b starts at 0, c at the identity and a with normal entries of deviation `std`: the released code's 1e-3, with which
    training starts slowly and depends on an optimizer that normalizes its steps. Cores are comparable only while the
    clients' b and a stay close; hence `shared_a`: all draw the same a. Layer norms are trained too, and stay on the client
    like the head.

    The server side is missing in the released code, and the paper's text was not available: the forms of d and S, the
    defaults of their settings, and the treatment of absent and new clients are this package's.

    Source: Li et al. 2025, arXiv:2503.23869, and its released code.
    """

    rank: PositiveInt = 8
    std: PositiveFloat = 1e-3
    """Standard deviation of the initial a."""
    shared_a: bool = True
    """Whether all clients start from the same a."""
    data_weight: UnitInterval = 0.5
    """The weight of the data's similarity; the cores' similarity has weight 1 - `data_weight`. With 0, no statistics of
    the data are sent."""
    tau: PositiveFloat | None = None
    """Scale of the distances between the clients' data. If omitted, the median over all pairs of clients.

    Example: 1.0
    """
    include_self: bool = True
    """Whether a client's own core is part of its mixture."""
    normalizer: Literal["l1", "softmax"] = "l1"
    """How similarities become weights: divided by their sum (l1), or by softmax."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Cores:
        """The identity core; no client has uploaded a core yet."""
        return Cores({f"{name}.c": torch.eye(spec.rank(name, self.rank), dtype=spec.dtype) for name in spec.modules})

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Tensors:
        """b = 0 and a random a."""
        drawn: dict[str, Tensor] = {}
        for name, (out, in_) in spec.modules.items():
            rank, owner = spec.rank(name, self.rank), "" if self.shared_a else client.id
            a = self.std * torch.randn(rank, in_, generator=generator(seed, "ce_lora", name, owner))
            drawn |= {f"{name}.b": torch.zeros(out, rank, dtype=spec.dtype), f"{name}.a": a.to(spec.dtype)}
        return drawn

    def send(self, server: Cores, client: ClientInfo, rnd: Round) -> Tensors:
        """The client's mixture of cores; also an empty tensor that requests the mixtures of its data, until they are
        known."""
        ask = {_ASKED: torch.zeros(0, dtype=torch.uint8)} if self.data_weight and client.id not in server.data else {}
        if not server.last:
            return {**server.start, **ask}
        ids = sorted(server.last)
        shares = self._shares(server, ids, client.id) if client.id in server.last else _even(len(ids))
        return {**{key: mixed([server.last[one][key] for one in ids], shares) for key in server.start}, **ask}

    def view(self, state: Tensors, download: Tensors, client: ClientInfo) -> Adapter:
        """The client's own b and a, with the mixture as c."""
        return unpack({**state, **pick(download, "c")}, ThreeFactor)

    def work(self, state: Tensors, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Tensors, Upload]]:
        """Trains all three factors; keeps b and a; uploads c, and Gaussian mixtures of its data if requested."""
        data: Tensors = {}
        if _ASKED in download:
            seen = yield from features()
            points, seed = seen.features.to(next(iter(state.values())).dtype), rnd.rng("mixtures", client.id).initial_seed()
            data = vars(fit_mixtures(points, seen.labels, seen.classes, seed))
        trained = pack((yield from fit(self.view(state, download, client), "bca")))
        return pick(trained, "ba"), Upload(pick(trained, "c"), data)

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """The template, with the number of mixture components that follows from the numbers of examples of each label."""
        came, expected = upload.choices, template.choices
        if not expected or came["counts"].shape != expected["counts"].shape:
            return template
        counts = came["counts"]
        if bool((counts < 0).any()) or int(counts.sum()) != known.client.examples:
            raise ValueError(f"examples of each label that do not add up to its {known.client.examples}")
        total = int(components(counts).sum())
        shapes = {key: x if key == "counts" else x.new_empty(total, *x.shape[1:]) for key, x in expected.items()}
        if all(came[key].shape == x.shape for key, x in shapes.items()) and (reason := validation_error(Mixtures(**came))):
            raise ValueError(reason)
        return replace(template, choices=shapes)

    def collect(self, server: Cores, collected: Mapping[str, Upload] | None, reply: Reply) -> Mapping[str, Upload]:
        """All uploads of positive weight, by client."""
        return {**(collected or {}), **({reply.client.id: reply.upload} if reply.weight > 0 else {})}

    def merge(self, server: Cores, collected: Mapping[str, Upload], rnd: Round) -> Merged[Cores]:
        """Stores the uploaded cores and mixtures; cores are mixed in `send`."""
        last = {**server.last, **{client: upload.values for client, upload in collected.items()}}
        new = {client: Mixtures(**upload.choices) for client, upload in collected.items() if upload.choices}
        if not new:
            return Merged(replace(server, last=last))
        data = {**server.data, **new}
        return Merged(replace(server, last=last, data=data, apart=_distances(data, server.apart)))

    def update(self, known: ClientRound, upload: Upload) -> None:
        """None: there is no global product."""

    def _shares(self, server: Cores, ids: Sequence[str], one: str) -> Tensor:
        """The row of S [clients] for client `one`, in the order of `ids`; it sums to 1."""
        alike = (1 - self.data_weight) * _cores_alike([server.last[client] for client in ids], ids.index(one))
        if self.data_weight:
            place = {client: i for i, client in enumerate(server.data)}
            alike = alike + self.data_weight * self._data_alike(server.apart, place[one])[[place[client] for client in ids]]
        others = torch.tensor([client != one for client in ids])
        if not self.include_self and len(ids) > 1:
            alike = torch.where(others, alike, -torch.inf if self.normalizer == "softmax" else 0.0)
        if self.normalizer == "softmax":
            return alike.softmax(0)
        total = alike.sum()
        return alike / total if total > 0 else _even(len(ids))

    def _data_alike(self, apart: Tensor, one: int) -> Tensor:
        """exp(-d / tau) for the row of d [clients] of client `one`; 1 where d is 0, even if the median is."""
        pairs = apart[~torch.eye(len(apart), dtype=torch.bool)]
        pairs = pairs[pairs < _FAR]
        tau = self.tau or (float(median(pairs)) if len(pairs) else 1.0)
        return torch.where(apart[one] > 0, torch.exp(-apart[one] / tau), 1.0)


def median(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The median; for an even number of values, the mean of the two middle ones (`Tensor.median` is the lower one)."""
    return (x.median() - (-x).median()) / 2


def mixed(cores: Sequence[Tensor], shares: Tensor) -> Tensor:
    """sum_j shares_j cores_j [rank, rank], summed in fp64."""
    return torch.einsum("k,kij->ij", shares, torch.stack([c.to(shares.dtype) for c in cores])).to(cores[0].dtype)


def _cores_alike(cores: Sequence[Tensors], one: int) -> Tensor:
    """The similarity of each core to core number `one` [clients], in [0, 1]."""
    stacked = [torch.stack([core[key] for core in cores]) for key in cores[0]]
    return torch.stack([similarity(c[one].expand_as(c), c) for c in stacked]).mean(0)


def _distances(data: Mapping[str, Mixtures], known: Tensor) -> Tensor:
    """Distances between all clients' data [clients, clients]; those in `known`, of the first clients, are reused."""
    apart = known.new_zeros(len(data), len(data))
    apart[: len(known), : len(known)] = known
    ids = list(data)
    for j in range(len(known), len(ids)):
        for i in range(j):
            one, other = sorted((ids[i], ids[j]))  # so that rounding does not depend on the order of clients
            apart[i, j] = apart[j, i] = min(mixture_distance(data[one], data[other]), _FAR)
    return apart


def _even(clients: int) -> Tensor:
    return torch.full((clients,), 1 / clients, dtype=torch.float64)
