"""A problem small enough to reason about: least squares on non-square modules, and a trainer without a transformer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, pack
from fedlora.config.sections import Evaluate, Sampling
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, FitRequest, Gradient, LabelledFeatures, Round, Statistics, Trained
from fedlora.method import AnyMethod
from fedlora.methods.row import Row
from fedlora.methods.wrap.head import with_head
from fedlora.methods.wrap.magnitudes import Magnitudes
from fedlora.models.requests import check_request, check_update
from fedlora.parts.dense import Dense
from fedlora.parts.dora import Dora
from fedlora.parts.experts import Experts
from fedlora.parts.table import Factors
from fedlora.randomness import generator
from fedlora.rounds.plan import Plan
from fedlora.rounds.simulate import SimulationBackend
from fedlora.train.gradient_filter import binomial5

SPEC = AdapterSpec(
    modules={"layer.2.q": (12, 7), "layer.10.v": (5, 9)},
    head={"head.weight": torch.linspace(-1, 1, 8).reshape(2, 4), "head.bias": torch.zeros(2)},
    weight=lambda name: torch.randn(SPEC.modules[name], generator=generator(0, "pretrained", name)),
    features=6,
    classes=3,
)
"""Non-square modules whose names sort differently as text and as numbers, their pretrained weights, and a head."""


@dataclass(frozen=True)
class ToyTrainer:
    """Each client has a target for every module's weight and for the head; training is gradient descent towards it.

    A client's target is a low-rank matrix shared by all, plus `skew` times one of its own; the common part is the global
    test. Untrained factors come back as the very same tensors. What is trained are PEFT's factors, b divided by the spec's
    scale. The modules' targets, and the distance from them, are in this `unit`.
    """

    spec: AdapterSpec = SPEC
    skew: float = 0.3
    steps: int = 3
    lr: float = 0.2
    seed: int = 0
    clients_per_step: int = 2
    unit: float = 1.0
    base: dict[str, Tensor] = field(default_factory=dict)
    """What was merged into the base into each module; the weight is this plus the adapter's product."""

    def target(self, client: str) -> dict[str, Tensor]:
        """The matrix that the client's product of each module should be, and its head; the common part for ''."""
        shapes = {**self.spec.modules, **{name: tuple(x.shape) for name, x in self.spec.head.items()}}
        return {name: self._target(name, shape, client) for name, shape in shapes.items()}

    def _target(self, name: str, shape: tuple[int, ...], client: str) -> Tensor:
        common = _drawn(shape, self.seed, "common", name)
        drawn = common + (self.skew * _drawn(shape, self.seed, "own", name, client) if client else 0)
        return (self._unit(name) * drawn).to(self.spec.dtype)

    def _unit(self, name: str) -> float:
        return self.unit if name in self.spec.modules else 1.0

    def _distance(self, weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        return sum_of([((w - target[name]) / self._unit(name)).square().mean() / 2 for name, w in weights.items()])

    def loss(self, adapter: Adapter, client: str, frozen_extra: Mapping[str, Tensor] | None = None) -> Tensor:
        """Half the mean squared distance from the target, summed over modules and head."""
        values = {name: w + (frozen_extra or {}).get(name, 0) for name, w in self.weights(adapter).items()}
        return self._distance(values, self.target(client))

    def weights(self, adapter: Adapter) -> dict[str, Tensor]:
        """What the model computes with: each module's base updates and product, and the head."""
        return {name: x + self.base.get(name, 0) for name, x in products(adapter, self.spec).items()}

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Adds to the base for good."""
        check_update(self.spec, change, "base update")
        for name, part in change.items():
            self.base[name] = self.base.get(name, 0) + part.product()

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> list[Trained]:
        """One after the other."""
        return [self.fit_one(one.request, one.client) for one in asked]

    def fit_one(self, request: Fit, client: ClientInfo) -> Trained:
        """Gradient descent on the factors that `request` names, where its mask lets them move, at its rates."""
        check_request(self.spec, request)
        scales = {n: self.spec.scale(n, part.rank) for n, part in request.start.items() if not isinstance(part, Dense)}
        start = {name: _times(part, 1 / scales[name]) if name in scales else part for name, part in request.start.items()}
        parts = {name: _leaves(part, request.train) for name, part in start.items()}
        trained = [(name, key) for name, tensors in parts.items() for key in tensors if key in request.train]
        leaves = [parts[name][key] for name, key in trained]
        kinds = {name: type(part) for name, part in request.start.items()}
        frozen_extra = {name: part.product() for name, part in (request.frozen_extra or {}).items()}
        target, fixed = self.target(client.id), {name: self.base.get(name, 0) + frozen_extra.get(name, 0) for name in parts}
        steps = request.steps or self.steps * (request.epochs or 1)
        for step in range(steps):
            live = {name: _times(kinds[name](**tensors), scales.get(name, 1.0)) for name, tensors in parts.items()}
            weights = {name: _matrix(part, self.spec, name) + fixed[name] for name, part in live.items()}
            loss = self._distance(weights, target)
            for penalty in request.penalties:
                loss = loss + penalty(pack(live))
            for (name, key), gradient in zip(trained, torch.autograd.grad(loss, leaves), strict=True):
                if (constant := (request.correction or {}).get(f"{name}.{key}")) is not None:
                    gradient = gradient + constant * request.start[name].unit(key, scales.get(name, 1.0))
                moves = (request.mask or {}).get(f"{name}.{key}", torch.tensor(True))
                if key not in request.trained_in(step):
                    continue
                if request.gradient_filter is not None and key in ("b", "a"):
                    gradient = binomial5(gradient, -2 if key == "b" else -1)
                rate = self.lr * 10 * (request.rates or {}).get(key, 1.0)
                parts[name][key].data.sub_(gradient.where(moves, torch.zeros_like(gradient)), alpha=rate)
        after = {name: kinds[name](**{k: x.detach() for k, x in tensors.items()}) for name, tensors in parts.items()}
        after = {name: _times(part, scales.get(name, 1.0)) for name, part in after.items()}
        return Trained(_restore(after, request), float(self.loss(after, client.id, frozen_extra)), steps)

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """By the factors that `request` names."""
        check_request(self.spec, request)
        parts = {name: _leaves(part, request.train) for name, part in request.start.items()}
        trained = [(name, key) for name, tensors in parts.items() for key in tensors if key in request.train]
        kinds = {name: type(part) for name, part in request.start.items()}
        weights = {n: _matrix(kinds[n](**x), self.spec, n) + self.base.get(n, 0) for n, x in parts.items()}
        found = torch.autograd.grad(
            self._distance(weights, self.target(client.id)), [parts[name][key] for name, key in trained]
        )
        for (name, key), slope in zip(trained, found, strict=True):
            parts[name][key] = slope
        return {name: kinds[name](**{k: x.detach() for k, x in tensors.items()}) for name, tensors in parts.items()}

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """Points around one of three centres, the label; `skew` times the client's own shift away from it."""
        labels = torch.arange(client.examples) % self.spec.classes
        centres = _drawn((self.spec.classes, self.spec.features), self.seed, "centres")
        noise = _drawn((client.examples, self.spec.features), self.seed, "noise")
        shift = _drawn((self.spec.classes, self.spec.features), self.seed, "shift", client.id)
        return LabelledFeatures((centres + self.skew * shift)[labels] + 0.1 * noise, labels, self.spec.classes)

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> list[Statistics | None]:
        """The distances from the clients' targets."""
        return [self._statistics(client.examples, adapter, client.id) for client, adapter in asked]

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """The metrics of the common target."""
        return {**toy_metrics(self._statistics(1, adapter, "")), "examples": 1}

    def _statistics(self, examples: int, adapter: Adapter, client: str) -> Statistics:
        return Statistics(examples, {"distance": examples * self.loss(adapter, client).double()})


@dataclass
class Recorder:
    """A trainer that remembers what each client trained last."""

    inner: ToyTrainer = field(default_factory=ToyTrainer)
    last: dict[str, Adapter] = field(default_factory=dict)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def spec(self) -> AdapterSpec:
        """The toy's."""
        return self.inner.spec

    @property
    def clients_per_step(self) -> int:
        """The toy's."""
        return self.inner.clients_per_step

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> list[Trained]:
        """The toy's answers, remembered."""
        answers = self.inner.fit(asked, rnd)
        for one, answer in zip(asked, answers, strict=True):
            self.last[one.client.id] = answer.adapter
            self.weights[one.client.id] = self.inner.weights(answer.adapter)
        return answers

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """The toy's."""
        return self.inner.gradient(client, request)

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """The toy's."""
        return self.inner.features(client)

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """The toy's."""
        self.inner.merge_into_base(change)

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> list[Statistics | None]:
        """The toy's."""
        return self.inner.scores(asked)

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """The toy's."""
        return self.inner.evaluate(adapter)


@dataclass
class MemoryStates:
    """The clients' states and the base updates in memory, those of every round."""

    saved: dict[tuple[str, int], Any] = field(default_factory=dict)
    base_updates: dict[int, Any] = field(default_factory=dict)

    def save_base_update(self, index: int, base_update: Any) -> None:
        """Keeps it."""
        self.base_updates[index] = base_update

    def base_update(self, index: int) -> Any:
        """The one of that round."""
        return self.base_updates[index]

    def client_state(self, client: ClientInfo, before: int) -> Any | None:
        """The latest before that round."""
        rounds = [index for name, index in self.saved if name == client.id and index < before]
        return self.saved[client.id, max(rounds)] if rounds else None

    def save_client(self, client: ClientInfo, index: int, state: Any) -> None:
        """Keeps it."""
        self.saved[client.id, index] = state


class Quiet:
    """A watcher that sees nothing."""

    def notify(self, message: str) -> None:
        """Nothing."""

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Nothing."""

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """Nothing."""

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """Nothing."""


def toy_clients(count: int = 4, rank: int | Sequence[int] = 3) -> list[ClientInfo]:
    """Clients "0", "1", ... of unequal sizes: 10, 17, 24, ... examples."""
    ranks = [rank] * count if isinstance(rank, int) else rank
    return [ClientInfo(str(i), ranks[i], 10 + 7 * i) for i in range(count)]


class DoraRow(Row):
    """A row whose method has DoRA's magnitudes; what it sends is that of LoRA's row, and the magnitudes with b."""

    @staticmethod
    def of(row: Row) -> "DoraRow":
        """The row with `lora.dora`."""
        shared = row.magnitudes == "averaged"
        up = tuple(f"{floats} + out" if shared and "out" in floats else floats for floats in row.up)
        down = tuple(f"{floats} + out" if shared else floats for floats in row.down)
        alpha = {"test_alpha_only_scales_the_updates": "magnitudes are trained as they are, whatever alpha is"}
        values = {field.name: getattr(row, field.name) for field in fields(row)}
        sent = "test_rounds_without_the_largest_client_still_teach_every_rank"  # with magnitudes, which are sent whole
        known_failures = {law: why for law, why in row.known_failures.items() if law != sent} | alpha
        own = {"name": f"{row.name} with dora", "up": up, "down": down, "known_failures": known_failures}
        return DoraRow(**{**values, **own})


def toy_method(row: Row, rank: int = 3, **settings: Any) -> AnyMethod:
    """A row's method of that rank, with its own head rule."""
    method = row.make(**row.fixed_settings, rank=rank, **settings)
    return with_head(Magnitudes(method, row.magnitudes) if isinstance(row, DoraRow) else method, row.head)


def toy_metrics(statistics: Statistics) -> dict[str, float]:
    """Minus the mean distance as `accuracy`, so that higher is better."""
    return {"accuracy": -float(statistics.sums["distance"]) / statistics.examples}


def toy_plan(
    method: Any,
    trainer: ToyTrainer | Recorder,
    *,
    fraction: float = 1.0,
    rounds: int = 3,
    metrics: Any = toy_metrics,
    **sampling: Any,
) -> Plan:
    """A plan that evaluates on all clients in every round."""
    chosen = Sampling(fraction=fraction, **sampling)
    return Plan(
        method,
        trainer.spec,
        0,
        chosen,
        Evaluate(),
        rounds,
        evaluator=lambda adapter, _: trainer.evaluate(adapter),
        metrics=metrics,
    )


def toy_simulation(method: Any, trainer: ToyTrainer | Recorder, clients: Sequence[ClientInfo]) -> SimulationBackend:
    """All clients in one process, their states in memory."""
    return SimulationBackend(method, trainer.spec, clients, MemoryStates(), trainer, seed=0)


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(terms)).sum()


def products(adapter: Adapter, spec: AdapterSpec = SPEC) -> dict[str, Tensor]:
    """The dense matrix of each module and the head as it is: what may be compared."""
    return {name: _matrix(part, spec, name) for name, part in adapter.items()}


def _matrix(part: Factors, spec: AdapterSpec, name: str) -> Tensor:
    """What the part makes of each unit vector: that is its matrix, if it has one; of DoRA's, the change of the weight."""
    if isinstance(part, Dora):
        weight = spec.weight(name).to(part.a.dtype)
        return part.changed(weight) - weight
    if isinstance(part, Experts):
        shares = part.weights(torch.eye(part.a.shape[1], dtype=part.a.dtype)).repeat_interleave(part.rank, -1)
        pair = part.concat_factors()
        return pair.b @ (shares.to(part.a.dtype).mT * pair.a)
    return part.w if isinstance(part, Dense) else part.product()


@cache
def _drawn(shape: tuple[int, ...], seed: int, *names: str) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *names))


def _leaves(part: Factors, train: frozenset[str]) -> dict[str, Tensor]:
    tensors = vars(part)
    return {key: x.clone().requires_grad_() if key in train else x for key, x in tensors.items()}


def _times(part: Factors, scale: float) -> Factors:
    """The part whose trained factors these are, at that scale."""
    return type(part)(**{factor: x * part.unit(factor, scale) for factor, x in vars(part).items()})


def _restore(after: Adapter, request: Fit) -> Adapter:
    """The trained factors, and the untrained ones as they were given."""
    kept = {
        name: {key: x for key, x in vars(part).items() if key not in request.train} for name, part in request.start.items()
    }
    return {name: type(part)(**{**vars(part), **kept[name]}) for name, part in after.items()}
