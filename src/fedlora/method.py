"""Interface of a federated method: six pure functions, split at the client/server boundary."""

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Features, Fit, Gradient, LabelledFeatures, Merged, Replies, Round

T = TypeVar("T")
S = TypeVar("S")
C = TypeVar("C")

Local = Generator[Fit | Gradient | Features, Any, T]
"""Client computation that yields requests for training, gradients or features, and returns a T."""


@runtime_checkable
class Method(Protocol[S, C]):
    """Federated method. S is the server's state, C a client's: tensors in mappings, tuples or frozen dataclasses.

    A method is a frozen dataclass of its hyperparameters. It is stateless between calls: every state is passed in and
    returned. Downloads and uploads are flat mappings of named tensors.
    """

    @property
    def rank(self) -> int:
        """Maximum rank of a client."""

    def init_server(self, spec: AdapterSpec, seed: int) -> S:
        """Returns the server's state before the first round."""

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> C:
        """Returns the state of a client that has never participated. It depends on the arguments only."""

    def send(self, server: S, client: ClientInfo, rnd: Round) -> Tensors:
        """On the server: returns the download of `client`."""

    def view(self, state: C, download: Tensors, client: ClientInfo) -> Adapter:
        """On the client: returns the adapter that `client` would use now. Evaluation always uses it."""

    def work(self, state: C, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[C, Tensors]]:
        """On the client: one round's work; requests training with `fit` etc., returns the next state and the upload."""

    def merge(self, server: S, replies: Replies, rnd: Round) -> Merged[S]:
        """On the server: returns the next state, given the accepted replies."""


@runtime_checkable
class SelectiveUpload(Protocol):
    """Optional interface of methods whose clients choose the uploaded values: the server cannot infer their count."""

    def expected_upload(
        self, spec: AdapterSpec, upload: Tensors, template: Tensors, client: ClientInfo, rnd: Round
    ) -> Tensors:
        """On the server: returns tensors with the shapes that `upload` must have, given the positions in it.

        `template` is the upload of `client` if training changed nothing; it has the same names and dtypes, but shapes may
        differ.

        Raises:
            ValueError: invalid positions, which an honest client cannot choose.
        """


AnyMethod = Method[Any, Any]


def fit(
    start: Adapter,
    train: Iterable[str] = "ba",
    epochs: int | None = None,
    frozen_extra: Mapping[str, LowRank] | None = None,
    penalty: Callable[[Tensors], Tensor] | None = None,
    mask: Mapping[str, Tensor] | None = None,
    rates: Mapping[str, float] | None = None,
) -> Local[Adapter]:
    """Requests local training from `start` and returns the trained adapter: `trained = yield from fit(start)`.

    See `Fit` for the arguments.
    """
    trained: Adapter = yield Fit(start, frozenset(train), epochs, frozen_extra, penalty, mask, rates)
    return trained


def gradient(start: Adapter, train: Iterable[str]) -> Local[Adapter]:
    """Requests the gradient of the client's mean loss: `slope = yield from gradient(start, "c")`. See `Gradient`."""
    slope: Adapter = yield Gradient(start, frozenset(train))
    return slope


def features() -> Local[LabelledFeatures]:
    """Requests base-model features of the client's training examples: `seen = yield from features()`."""
    seen: LabelledFeatures = yield Features()
    return seen
