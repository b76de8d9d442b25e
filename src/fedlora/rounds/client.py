"""The clients' turns: the method's work, its requests answered by a trainer. The same on one machine and on many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Features, Fit, FitRequest, Gradient, LabelledFeatures, Round, Score
from fedlora.method import AnyMethod, Local
from fedlora.rounds.finite import NOT_FINITE, NumericalError, is_finite
from fedlora.rounds.validator import Failed


@runtime_checkable
class Trainer(Protocol):
    """Who has the model and the examples."""

    @property
    def clients_per_step(self) -> int:
        """How many clients are best trained at once."""

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> Sequence[tuple[Adapter, Mapping[str, float]]]:
        """The trained adapters in the order of `asked`, and notes such as the loss. All may be trained together."""

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """The gradient of the client's mean training loss."""

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """The client's training examples as the base sees them without any adapter."""

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Changes the frozen base for good."""

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> Sequence[Score | None]:
        """Each adapter on its client's held-out examples; None if it has none."""


@dataclass(frozen=True)
class ClientStart:
    """What a client begins its round with: its state, and what it was sent."""

    client: ClientInfo
    state: Any
    download: Tensors


@dataclass(frozen=True)
class LocalResult:
    """What a client has after its work: its next state, its upload, and the notes of its last training."""

    state: Any
    upload: Tensors
    notes: Mapping[str, float]


def turns(method: AnyMethod, trainer: Trainer, begun: Sequence[ClientStart], rnd: Round) -> list[LocalResult | Failed]:
    """Runs the method's work of all these clients to its end, in step: trainings that they ask for at a time are answered
    at once, and questions for gradients and features each by itself.

    A client whose work ends in values that are not finite has failed, and its state is the one before.
    """
    jobs = [method.work(one.state, one.download, one.client, rnd) for one in begun]
    done: dict[int, LocalResult | Failed] = {}
    replies: dict[int, tuple[Adapter | None, Mapping[str, float]]] = dict.fromkeys(range(len(jobs)), (None, {}))
    step = 0
    while replies:
        asked: dict[int, FitRequest] = {}
        for i, (adapter, notes) in replies.items():
            try:
                asked[i] = FitRequest(_next_fit(jobs[i], adapter, begun[i].client, trainer), begun[i].client, step)
            except StopIteration as end:
                state, upload = end.value
                finite = is_finite((state, upload))
                done[i] = (
                    LocalResult(state, upload, notes)
                    if finite
                    else Failed(begun[i].client, f"its work ended in {NOT_FINITE}")
                )
            except NumericalError as error:
                kind = type(error).__name__.lstrip("_")
                done[i] = Failed(begun[i].client, f"its work ended in {kind}, as from {NOT_FINITE}")
        replies = dict(zip(asked, trainer.fit(list(asked.values()), rnd), strict=True)) if asked else {}
        step += 1
    return [done[i] for i in range(len(begun))]


def _next_fit(job: Local[tuple[Any, Tensors]], answer: Adapter | None, client: ClientInfo, trainer: Trainer) -> Fit:
    """The next training that the job asks for, given the answer to the last.

    Raises:
        TypeError: the job asks for something that no trainer answers.
    """
    request = job.send(answer)
    while not isinstance(request, Fit):
        if isinstance(request, Features):
            request = job.send(trainer.features(client))
        elif isinstance(request, Gradient):
            request = job.send(trainer.gradient(client, request))
        else:
            raise TypeError(f"expected a request Fit, Gradient or Features, got {type(request).__name__}")
    return request
