"""Interface of a federated method: pure functions, split at the client/server boundary."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, low_rank, pack, unpack
from fedlora.linalg.combine import difference
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import (
    ClientInfo,
    Features,
    Fit,
    Gradient,
    LabelledFeatures,
    Merged,
    Reply,
    Role,
    Round,
    Trained,
    Upload,
)

T = TypeVar("T")
S = TypeVar("S")
C = TypeVar("C")
R = TypeVar("R")

Local = Generator[Fit | Gradient | Features, Any, T]
"""Client computation that yields requests for training, gradients or features, and returns a T."""


@dataclass(frozen=True)
class ClientRound:
    """One client's round as server and client both know it, before the client's work.

    `initial` is the state of the client before its first round, from `init_client`; its state now is known to itself alone.
    """

    spec: AdapterSpec
    client: ClientInfo
    round: Round
    download: Tensors
    initial: Any


class Method(ABC, Generic[S, C, R]):
    """Federated method: a frozen dataclass of its hyperparameters with pure functions.

    S is the server's state, C a client's: tensors in mappings, tuples or frozen dataclasses. R is what the server collects
    in a round. By default that is the `Mean` of the uploads, from which alone `merge` then computes the next state; such a
    method works with secure aggregation. A method is stateless between calls: every state is passed in and returned. Only
    `collect` may add to its argument in place.

    `init_server` and `merge` have no default. By default the server's state is the download, a client has no state, and
    it trains and uploads b and a of the downloaded adapter.
    """

    rank: int
    """The largest rank of a client."""

    @property
    def trains_whole_model(self) -> bool:
        """Whether all parameters outside the adapted modules' weights are trained with the head, one client at a time."""
        return False

    @abstractmethod
    def init_server(self, spec: AdapterSpec, seed: int) -> S:
        """Returns the server's state before the first round."""

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> C:
        """Returns the state of a client that has never participated. It depends on the arguments only."""
        return None  # type: ignore[return-value]

    def send(self, server: S, client: ClientInfo, rnd: Round) -> Tensors:
        """On the server: returns the download of `client`, a flat mapping of named tensors."""
        return cast(Tensors, server)

    def view(self, state: C, download: Tensors, client: ClientInfo) -> Adapter:
        """On the client: returns the adapter that `client` would use now. Evaluation always uses it."""
        return unpack(download, LowRank)

    def work(self, state: C, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[C, Upload]]:
        """On the client: one round's work; requests training with `fit` etc., returns the next state and the upload."""
        return state, Upload(pack((yield from fit(self.view(state, download, client)))))

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """On the server: returns tensors with the shapes that `upload` must have, given the choices in it.

        `template` is the upload of the client if training changed nothing. Names and dtypes are known to be those of the
        template; shapes may differ.

        Raises:
            ValueError: invalid choices, which an honest client cannot make.
        """
        return template

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """Returns the upload's values in the frame common to all clients: the same names and shapes for every client.

        Linear in the values, with zeros where nothing was sent.
        """
        return upload.values

    @property
    def collects_mean(self) -> bool:
        """Whether `merge` needs only the `Mean` of the expanded uploads; then `collect` is not called."""
        return type(self).collect is Method.collect

    def collect(self, server: S, collected: R | None, reply: Reply) -> R:
        """On the server: returns what was collected, with one more upload; `collected` is None for the round's first."""
        raise TypeError(f"{type(self).__name__} merges the mean of the uploads and collects nothing else")

    @abstractmethod
    def merge(self, server: S, collected: R, rnd: Round) -> Merged[S]:
        """On the server: returns the next state, given what was collected from the accepted uploads.

        Raises:
            ValueError: no accepted upload has a positive weight.
        """

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank] | None:
        """Returns the change of each module's weight that the upload stands for; None if it stands for none.

        By default, the uploaded factors b and a replace the downloaded ones. Only the logged `aggregation_error` and the
        comparison of uploads with each other depend on the result.
        """
        before = low_rank(self.view(known.initial, known.download, known.client))
        return changes(unpack({**pack(before), **upload.values}, LowRank), before)


def changes(after: Mapping[str, LowRank], before: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The change of each module's product; see `linalg.combine.difference`."""
    return {name: difference(part, before[name]) for name, part in after.items()}


AnyMethod = Method[Any, Any, Any]


def global_adapter(method: AnyMethod, spec: AdapterSpec, server: Any, rnd: Round) -> Adapter:
    """The adapter of a client of the largest rank that has never participated."""
    anybody = ClientInfo("", method.rank, 1)
    state = method.init_client(spec, anybody, rnd.seed)
    return method.view(state, method.send(server, anybody, rnd), anybody)


def fit(
    start: Adapter,
    train: Iterable[str] = "ba",
    epochs: int | None = None,
    frozen_extra: Mapping[str, LowRank] | None = None,
    penalty: Callable[[Tensors], Tensor] | None = None,
    mask: Mapping[str, Tensor] | None = None,
    rates: Mapping[str, float] | None = None,
    role: Role = "upload",
) -> Local[Adapter]:
    """Requests local training from `start` and returns the trained adapter: `trained = yield from fit(start)`.

    See `Fit` for the arguments.
    """
    penalties = () if penalty is None else (penalty,)
    trained: Trained = yield Fit(start, frozenset(train), epochs, frozen_extra, penalties, mask, rates, role)
    return trained.adapter


def gradient(start: Adapter, train: Iterable[str]) -> Local[Adapter]:
    """Requests the gradient of the client's mean loss: `slope = yield from gradient(start, "c")`. See `Gradient`."""
    slope: Adapter = yield Gradient(start, frozenset(train))
    return slope


def features() -> Local[LabelledFeatures]:
    """Requests base-model features of the client's training examples: `seen = yield from features()`."""
    seen: LabelledFeatures = yield Features()
    return seen
