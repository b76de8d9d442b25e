"""Local training of clients: runs the method's work with a trainer. Shared by simulation and deployment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import (
    ClientInfo,
    Features,
    Fit,
    FitRequest,
    Gradient,
    LabelledFeatures,
    Round,
    Statistics,
    Trained,
    Upload,
)
from fedlora.method import AnyMethod, Local
from fedlora.rounds.budgets import Budgets
from fedlora.rounds.finite import NOT_FINITE, NumericalError, error_name, is_finite
from fedlora.rounds.validator import Failed


@runtime_checkable
class Trainer(Protocol):
    """Trains and evaluates with the model and the examples."""

    @property
    def clients_per_step(self) -> int:
        """Preferred number of clients trained at once."""

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> Sequence[Trained]:
        """The answers in the order of `asked`. All may be trained together."""

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """Gradient of the client's mean training loss."""

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """Base-model features of the client's training examples, without any adapter."""

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges a base update into the frozen base permanently."""

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> Sequence[Statistics | None]:
        """Statistics of each adapter on its client's held-out examples; None for a client without any."""


@dataclass(frozen=True)
class ClientStart:
    """A client's inputs to a round: its state, its download, and the number of its private steps in earlier rounds."""

    client: ClientInfo
    state: Any
    download: Tensors
    private_steps: int = 0


@dataclass(frozen=True)
class LocalResult:
    """A client's outputs of a round: its next state, its upload, and loss and steps of its last training for the upload.

    `private_steps` are those of all its trainings so far, if they are private.
    """

    state: Any
    upload: Upload
    loss: float
    steps: int
    private_steps: int = 0


def train_clients(
    method: AnyMethod, trainer: Trainer, starts: Sequence[ClientStart], rnd: Round, budgets: Budgets | None = None
) -> list[LocalResult | Failed]:
    """Runs the method's work of these clients concurrently.

    Fit requests of several clients are passed to the trainer together; gradients and features are computed one by one.
    A client whose work ends in non-finite values, or that would exceed its privacy budget, has failed, and keeps its
    previous state; the steps that it has made before count.
    """
    jobs = [method.work(one.state, one.download, one.client, rnd) for one in starts]
    done: dict[int, LocalResult | Failed] = {}
    answers: dict[int, Trained | None] = dict.fromkeys(range(len(jobs)))
    measured: dict[int, tuple[float, int]] = {}
    made = [one.private_steps for one in starts]
    budgets = budgets or Budgets()
    step = 0
    while answers:
        asked: dict[int, FitRequest] = {}
        for i, answer in answers.items():
            client = starts[i].client
            try:
                request = FitRequest(_next_fit(jobs[i], answer, client, trainer), client, step)
            except StopIteration as end:
                state, upload = end.value
                finite = is_finite((state, upload.flat()))
                done[i] = (
                    LocalResult(state, upload, *measured.get(i, (math.nan, 0)), made[i])
                    if finite
                    else Failed(client, f"its work ended in {NOT_FINITE}", made[i])
                )
            except NumericalError as error:
                done[i] = Failed(client, f"its work ended in {error_name(error)}, as from {NOT_FINITE}", made[i])
            else:
                if reason := budgets.exceeded(request, made[i]):
                    done[i] = Failed(client, reason, made[i])
                else:
                    asked[i] = request
        answers = dict(zip(asked, trainer.fit(list(asked.values()), rnd), strict=True)) if asked else {}
        for i, trained in answers.items():
            if trained is not None and asked[i].request.role == "upload":
                measured[i] = trained.loss, trained.steps
            if trained is not None and starts[i].client.id in budgets.most_steps:
                made[i] += trained.steps
        step += 1
    return [done[i] for i in range(len(starts))]


def _next_fit(job: Local[tuple[Any, Upload]], answer: Trained | None, client: ClientInfo, trainer: Trainer) -> Fit:
    """Next fit request of the job, after it receives the result of the last one.

    Raises:
        TypeError: the job makes a request that trainers do not support.
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
