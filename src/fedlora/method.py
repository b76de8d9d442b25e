"""What a federated method is: six functions without side effects, cut where the wire is."""

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
"""A computation on a client that asks for training, for gradients or for features, and in the end returns a T."""


@runtime_checkable
class Method(Protocol[S, C]):
    """A federated method. S is the server's state, C a client's: tensors in mappings, tuples or frozen dataclasses.

    A method is a frozen dataclass of its hyper-parameters. It keeps nothing between calls: every state is passed in and
    returned. All that crosses the wire is a flat mapping of named tensors.
    """

    @property
    def rank(self) -> int:
        """The largest rank a client may have."""

    def init_server(self, spec: AdapterSpec, seed: int) -> S:
        """The server's state before the first round."""

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> C:
        """The state of a client that has never taken part. It depends on nothing but the arguments."""

    def send(self, server: S, client: ClientInfo, rnd: Round) -> Tensors:
        """On the server: what `client` downloads."""

    def view(self, state: C, download: Tensors, client: ClientInfo) -> Adapter:
        """On the client: the adapter that `client` would use now. The only way to evaluate."""

    def work(self, state: C, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[C, Tensors]]:
        """On the client: one round's work; asks with `fit` and the like, and returns the next state and the upload."""

    def merge(self, server: S, replies: Replies, rnd: Round) -> Merged[S]:
        """On the server: the next state from the accepted replies."""


@runtime_checkable
class SelectiveUpload(Protocol):
    """What a method has besides if its clients choose which values they upload: nobody else can know how many those are."""

    def expected_upload(
        self, spec: AdapterSpec, upload: Tensors, template: Tensors, client: ClientInfo, rnd: Round
    ) -> Tensors:
        """On the server: tensors of the shapes that `upload` must have, given the positions that it names.

        `like` is what `client` would upload if training changed nothing; names and dtypes are equal, shapes may not be.

        Raises:
            ValueError: the positions are none that an honest client could choose.
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
    """Asks for local training from `start` and returns the trained adapter: `trained = yield from fit(start)`.

    See `Fit` for the arguments.
    """
    trained: Adapter = yield Fit(start, frozenset(train), epochs, frozen_extra, penalty, mask, rates)
    return trained


def gradient(start: Adapter, train: Iterable[str]) -> Local[Adapter]:
    """Asks for the gradient of the client's mean loss: `slope = yield from gradient(start, "c")`. See `Gradient`."""
    slope: Adapter = yield Gradient(start, frozenset(train))
    return slope


def features() -> Local[LabelledFeatures]:
    """Asks for the client's own training examples as features of the base model: `seen = yield from features()`."""
    seen: LabelledFeatures = yield Features()
    return seen
