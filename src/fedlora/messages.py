"""What servers and clients say to each other, and what a method asks of whoever trains for it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

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

    An owner of several tasks takes part once for each. `task` is the task's name where it is known; it does not travel.
    """

    id: str
    rank: int
    examples: int
    task: str = field(default="", compare=False)


@dataclass(frozen=True)
class Round:
    """One round, counted from 0; `attempt` counts its repetitions after too few replies; `seed` is the run's."""

    index: int
    seed: int
    attempt: int = 0

    def rng(self, purpose: str, client: str = "") -> torch.Generator:
        """The generator for one purpose and client in this round, and in no other."""
        return generator(self.seed, purpose, self.index, client)


@dataclass(frozen=True)
class Reply:
    """What came back from one client. `weight` is its share in the mean before normalisation, usually its examples."""

    client: ClientInfo
    round: Round
    upload: Tensors
    weight: float
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The means of a task's metrics over a number of examples."""

    examples: int
    metrics: Mapping[str, float]


class RunningMean:
    """A weighted mean of mappings of tensors, one at a time: memory for one sum in fp64, whatever the number of terms."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._total = 0.0
        self._first: tuple[str, dict[str, torch.Size], dict[str, torch.dtype]] | None = None

    def add(self, weight: float, tensors: Tensors, client: str) -> None:
        """Adds one term; a term of weight 0 changes nothing but is still checked.

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
        self._total += weight

    def mean(self) -> dict[str, Tensor]:
        """The mean so far, in the dtype of the first term.

        Raises:
            ValueError: no term had a positive weight.
        """
        if self._first is None or self._total <= 0:
            raise ValueError("cannot average: no reply has a positive weight")
        _, _, dtypes = self._first
        return {key: (x / self._total).to(dtypes[key]) for key, x in self._sums.items()}


class Replies:
    """The accepted replies of a round, ordered by client id. They may come from a stream: read them once."""

    def __init__(self, replies: Iterable[Reply]) -> None:
        self._replies = replies

    def __iter__(self) -> Iterator[Reply]:
        return iter(self._replies)

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean of the uploads, tensor by tensor, in constant memory.

        Raises:
            ValueError: two uploads differ in names or shapes, or there is nothing to average.
        """
        running = RunningMean()
        for reply in self:
            running.add(reply.weight, reply.upload, reply.client.id)
        return running.mean()


@dataclass(frozen=True)
class Merged(Generic[S]):
    """What a merge returns: the server's next state, a change of the frozen base if any, and numbers for the round log."""

    server: S
    base_update: Mapping[str, LowRank] | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """A request for local training: start here, train these factors, answer with the trained adapter.

    `train` names factors (`b`, `a`, in Tri and Heads also `c` and `s`, in Experts `g`, `w` of Full); the others stay as
    they are. `epochs` None means the run's own setting. `frozen_extra` are frozen factors that act beside those in `start`.
    `penalty` is added to the loss of each step; it gets all tensors of the adapter as they are then, as `pack` names them,
    heads included. It has to be picklable, as it may be computed in another process: a function of a module, or a
    `functools.partial` of one.

    `mask` says which entries of `"module.factor"` may move, as a bool tensor that broadcasts to the factor: [1, rank] for
    b, [rank, 1] for a. The others get no gradient, count in no norm, do not decay, and come back bit for bit; a factor
    without a mask is trained as a whole. `rates` multiplies the learning rate of a factor in all modules: {"b": 5.0}.

    A trainer refuses a request that it cannot honour as a whole, with a ValueError: see `train.requests`.
    """

    start: Adapter
    train: frozenset[str]
    epochs: int | None = None
    frozen_extra: Mapping[str, LowRank] | None = None
    penalty: Callable[[Tensors], Tensor] | None = None
    mask: Mapping[str, Tensor] | None = None
    rates: Mapping[str, float] | None = None

    def restore(self, trained: Adapter) -> Adapter:
        """`trained`, with the entries that may not move as they were in `start`, whatever its way through a model."""
        mask, before = self.mask or {}, pack(self.start)
        moved = {key: x.where(mask[key].to(x.device), before[key]) for key, x in pack(trained).items() if key in mask}
        return {
            name: replace(part, **{f: moved[f"{name}.{f}"] for f in vars(part) if f"{name}.{f}" in moved})  # type: ignore[arg-type]
            for name, part in trained.items()
        }


@dataclass(frozen=True)
class Gradient:
    """A request for the gradient of the client's mean training loss at `start`, without dropout: an adapter that has it in
    place of the factors that `train` names."""

    start: Adapter
    train: frozenset[str]


@dataclass(frozen=True)
class Features:
    """A request for the base model's features of the client's own training examples, as `LabelledFeatures`."""


@dataclass(frozen=True)
class LabelledFeatures:
    """A client's training examples: what the last layer makes of each, its label's number, and how many labels exist."""

    features: Float[Tensor, "examples width"]
    labels: Int[Tensor, " examples"]
    classes: int


@dataclass(frozen=True)
class FitRequest:
    """One client's request for training; `step` counts its requests in this round."""

    request: Fit
    client: ClientInfo
    step: int
