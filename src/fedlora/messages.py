"""Messages between server and clients, and a method's requests to the trainer."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.adapter import Adapter, Tensors, pack
from fedlora.linalg.lowrank import LowRank
from fedlora.randomness import generator

S = TypeVar("S")


@dataclass(frozen=True)
class ClientInfo:
    """One data owner: a stable name, the rank of its factors, its number of training examples.

    An owner of several tasks is one client per task. `task` is the task's name if known; it is not transmitted.
    """

    id: str
    rank: int
    examples: int
    task: str = field(default="", compare=False)


@dataclass(frozen=True)
class Acknowledged:
    """A client's last upload that entered the server's state: its round, counted from 0, and its share of the weights."""

    round: int
    share: float


@dataclass(frozen=True)
class Round:
    """One round, counted from 0; `attempt` counts its repetitions after too few replies; `seed` is the run's seed.

    `registered` is the number of clients, `expected_cohort` that of the chosen ones. `acknowledged` has an entry for each
    chosen client of whom an upload has entered the state; a client knows its own entry.
    """

    index: int
    seed: int
    attempt: int = 0
    registered: int = field(default=0, compare=False)
    expected_cohort: int = field(default=0, compare=False)
    acknowledged: Mapping[str, Acknowledged] = field(default_factory=dict, compare=False)

    def rng(self, purpose: str, client: str = "") -> torch.Generator:
        """Random generator specific to one purpose and client in this round."""
        return generator(self.seed, purpose, self.index, client)


_CHOICE = "choice/"


@dataclass(frozen=True)
class Upload:
    """A client's upload. `values` can be averaged, clipped, and covered by noise or masks; `choices` cannot.

    Choices are selected positions, counts, labels and statistics of the data, under names of their own.
    """

    values: Tensors
    choices: Tensors = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """All tensors under one name each, as they are encoded."""
        return {**self.values, **{_CHOICE + name: tensor for name, tensor in self.choices.items()}}

    @staticmethod
    def of(flat: Tensors) -> "Upload":
        """Inverse of `flat`."""
        choices = {name.removeprefix(_CHOICE): x for name, x in flat.items() if name.startswith(_CHOICE)}
        return Upload({name: x for name, x in flat.items() if not name.startswith(_CHOICE)}, choices)


@dataclass(frozen=True)
class Reply:
    """Reply of one client. `weight` is its unnormalized weight in the mean, usually its number of examples.

    `loss` and `steps` are those of its training for the upload; the loss is NaN if it did not train.
    """

    client: ClientInfo
    round: Round
    upload: Upload
    weight: float
    loss: float = math.nan
    steps: int = 0


@dataclass(frozen=True)
class Statistics:
    """Sums of a task's statistics over a number of examples, by which its metrics are computed.

    Those of several batches or clients add up: counts are int64, other sums fp64.
    """

    examples: int
    sums: Mapping[str, Tensor]

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(self.examples + other.examples, {name: x + other.sums[name] for name, x in self.sums.items()})


class Mean:
    """Incremental weighted mean of mappings of tensors; stores one fp64 sum, regardless of the number of terms.

    `weight` is the sum of the weights, `count` the number of terms.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._first: tuple[str, dict[str, torch.Size], dict[str, torch.dtype]] | None = None

    @staticmethod
    def of(terms: Iterable[tuple[float, Tensors]]) -> "Mean":
        """The mean of weighted terms, which are named by their position in errors."""
        mean = Mean()
        for i, (weight, tensors) in enumerate(terms):
            mean.add(weight, tensors, str(i))
        return mean

    def add(self, weight: float, tensors: Tensors, client: str) -> None:
        """Adds one term; a term of weight 0 is checked, but has no effect.

        Raises:
            ValueError: names or shapes differ from those of the first term; both clients are named.
        """
        if self._first is None:
            self._first = client, {k: x.shape for k, x in tensors.items()}, {k: x.dtype for k, x in tensors.items()}
            self._sums = {key: torch.zeros(x.shape, dtype=torch.float64, device=x.device) for key, x in tensors.items()}
        first, shapes, _ = self._first
        if tensors.keys() != shapes.keys():
            differing = sorted(tensors.keys() ^ shapes.keys())
            raise ValueError(
                f"cannot average: clients {client} and {first} sent different tensors; only one sent {differing}"
            )
        for key, x in tensors.items():
            if x.shape != shapes[key]:
                raise ValueError(
                    f"cannot average {key!r}: client {client} sent {tuple(x.shape)}, client {first} sent "
                    f"{tuple(shapes[key])}; methods for mixed ranks must not average raw factors"
                )
            self._sums[key].add_(x, alpha=weight)
        self.weight += weight
        self.count += 1

    def tensors(self) -> dict[str, Tensor]:
        """The mean, in the dtype of the first term.

        Raises:
            ValueError: no term has a positive weight.
        """
        if self._first is None or self.weight <= 0:
            raise ValueError("cannot average: no reply has a positive weight")
        _, _, dtypes = self._first
        return {key: (x / self.weight).to(dtypes[key]) for key, x in self._sums.items()}

    def select(self, names: Mapping[str, str]) -> "Mean":
        """The mean of the tensors with these names, under the names that they map to."""
        part = Mean()
        part.weight, part.count = self.weight, self.count
        if self._first is not None:
            client, shapes, dtypes = self._first
            part._sums = {new: self._sums[old] for old, new in names.items()}
            part._first = (
                client,
                {new: shapes[old] for old, new in names.items()},
                {new: dtypes[old] for old, new in names.items()},
            )
        return part

    def names(self) -> list[str]:
        """The names of the tensors."""
        return list(self._sums)


@dataclass(frozen=True)
class Merged(Generic[S]):
    """Result of a merge: the server's next state, an optional base update, and numbers for the round log."""

    server: S
    base_update: Mapping[str, LowRank] | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


Role = Literal["upload", "probe", "personal"]
GradientFilter = Literal["binomial5"]


@dataclass(frozen=True)
class Trained:
    """Answer to a `Fit`: the trained adapter, the mean loss over the last epoch, and the number of steps."""

    adapter: Adapter
    loss: float = math.nan
    steps: int = 0


@dataclass(frozen=True)
class Fit:
    """Request for local training from `start`; the answer is a `Trained`.

    `train` names the trained factors (`b`, `a`, `c` of ThreeFactor and Heads, `s` of Heads, `g` of Experts, `a` of Tied,
    `delta` of WeightChange, `m` of Dora, `w` of Dense); the others are frozen. `steps` is a number of batches, `epochs` one
    of passes over the examples; if both are None, the run's setting applies. `frozen_extra` are frozen factors that act in
    addition to `start`. `role` is the purpose: "upload", "probe" (the result only informs the client's choices) or
    "personal" (it stays on the client).

    `penalties` are added to the loss of each step; their argument has all current tensors of the adapter, including the
    head, named as by `pack`. They must be picklable, since they may be evaluated in another process: module-level
    functions, or `functools.partial`s of one. `correction` has a constant for `"module.factor"`, of the factor's shape,
    which is added to its gradient in each step.

    `mask` selects the trainable entries of `"module.factor"`, as a bool tensor that broadcasts to the factor: [1, rank]
    for b, [rank, 1] for a. All other entries get no gradient, are excluded from norms and weight decay, and are
    returned unchanged; a factor without a mask is trained completely. `rates` multiplies the learning rate of a factor
    in all modules: {"b": 5.0}.

    `alternate` names trained factors that take turns: the first step trains only the first of them, the second step the
    second, and so on; factors in `train` that are not among them are trained in every step. A factor whose turn it is not
    is frozen: it has no gradient, and its optimizer state stays as it is. `gradient_filter` smooths the gradients of b
    along out and of a along in before the optimizer's step, see `train.gradient_filter`.

    A trainer rejects a request that it does not support completely, with a ValueError: see `models.requests`.
    """

    start: Adapter
    train: frozenset[str]
    epochs: int | None = None
    frozen_extra: Mapping[str, LowRank] | None = None
    penalties: tuple[Callable[[Tensors], Tensor], ...] = ()
    mask: Mapping[str, Tensor] | None = None
    rates: Mapping[str, float] | None = None
    role: Role = "upload"
    steps: int | None = None
    correction: Mapping[str, Tensor] | None = None
    alternate: tuple[str, ...] = ()
    gradient_filter: GradientFilter | None = None

    def trained_in(self, step: int) -> frozenset[str]:
        """The factors that are trained in a step, counted from 0."""
        if not self.alternate:
            return self.train
        return (self.train - frozenset(self.alternate)) | {self.alternate[step % len(self.alternate)]}

    def restore(self, trained: Adapter) -> Adapter:
        """Returns `trained` with all masked-out entries reset to their values in `start`, exactly."""
        mask, before = self.mask or {}, pack(self.start)
        moved = {key: x.where(mask[key].to(x.device), before[key]) for key, x in pack(trained).items() if key in mask}
        return {
            name: replace(part, **{f: moved[f"{name}.{f}"] for f in vars(part) if f"{name}.{f}" in moved})  # type: ignore[arg-type]
            for name, part in trained.items()
        }


@dataclass(frozen=True)
class Gradient:
    """Request for the gradient of the client's mean training loss at `start`, without dropout.

    The result is an adapter with the gradient in place of the factors in `train`.
    """

    start: Adapter
    train: frozenset[str]


@dataclass(frozen=True)
class Features:
    """Request for base-model features of the client's training examples; the result is `LabelledFeatures`."""


@dataclass(frozen=True)
class LabelledFeatures:
    """A client's training examples: last-layer features and label index of each, and the number of classes."""

    features: Float[Tensor, "examples width"]
    labels: Int[Tensor, " examples"]
    classes: int


@dataclass(frozen=True)
class FitRequest:
    """Training request of one client; `step` counts its requests in this round."""

    request: Fit
    client: ClientInfo
    step: int
