"""Differential privacy of single examples: what each client may do, and which experiments it does not cover."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedlora.config.privacy import Privacy
from fedlora.config.sections import Train
from fedlora.messages import Fit, FitRequest
from fedlora.train.steps import number_of_steps

if TYPE_CHECKING:  # which names the methods, and these the trainers
    from fedlora.config.experiment import Experiment


@dataclass(frozen=True)
class RecordPrivacy:
    """One client's DP-SGD: each example is in a step's sample with probability `rate`, the norms of the examples' gradients
    are at most `clip`, and the noise has the standard deviation `noise_multiplier` * `clip`.

    `steps` is the largest number of steps in the whole run, which was promised. The expected batch, by which the sum is
    divided, is `rate` times the number of the client's examples, which counts as public.
    """

    clip: float
    noise_multiplier: float
    rate: float
    steps: int


def record_privacy(privacy: Privacy, train: Train, examples: int, steps: int) -> RecordPrivacy:
    """The privacy of a client with this number of examples, which makes at most `steps` steps in the run.

    The noise is the smallest with which `privacy.epsilon` holds after all steps, or `privacy.noise_multiplier`.
    """
    assert privacy.delta is not None
    rate = min(1.0, train.batch_size / examples)
    noise_multiplier = privacy.noise_multiplier
    if noise_multiplier is None:
        from fedlora.privacy.account import noise_for  # type: ignore[import-not-found, unused-ignore]  # imports slowly

        assert privacy.epsilon is not None
        noise_multiplier = noise_for(privacy.epsilon, privacy.delta, rate, steps)
    return RecordPrivacy(privacy.clip, noise_multiplier, rate, steps)


@dataclass(frozen=True)
class Budgets:
    """The clients' promised numbers of steps, and the number of steps that the trainer makes for a request."""

    clients: Mapping[str, RecordPrivacy] = field(default_factory=dict)
    steps: Callable[[FitRequest], int] | None = None

    def exceeded(self, asked: FitRequest, spent: int) -> str | None:
        """The reason why a client that has made `spent` steps sits out instead of training; None if it trains."""
        if asked.client.id not in self.clients:
            return None
        assert self.steps is not None
        allowed, steps = self.clients[asked.client.id].steps, self.steps(asked)
        if spent + steps <= allowed:
            return None
        return f"its privacy budget is spent: it has made {spent} of {allowed} steps, and this training would make {steps}"


def planned_steps(requests: Iterable[object], train: Train, examples: int) -> int:
    """Number of steps of one participation of a client with this number of examples, whose work makes these requests."""
    return sum(number_of_steps(request, train, examples) for request in requests if isinstance(request, Fit))


def reasons_against(experiment: "Experiment") -> Iterator[str]:
    """Yields why settings of an experiment do not fit `privacy.unit = "record"`, and what to do."""
    if experiment.privacy.unit != "record":
        return
    train = experiment.train
    if experiment.method.whole_model:
        yield (
            "method.scope = 'all': the gradient of each example by all parameters would have to be kept; choose another "
            "method.scope, or another method"
        )
    if train.batches == "by-length":
        yield "train.batches = 'by-length': privacy.unit = 'record' samples each example on its own; remove it"
    if train.clip_norm is not None:
        yield f"train.clip_norm = {train.clip_norm:g}: privacy.clip limits each example's gradient already; remove it"
    if experiment.task.class_weights:
        yield "task.class_weights: privacy.unit = 'record' needs the mean over examples, with equal weights; remove it"
    if experiment.evaluate.stop_after is not None:
        yield "evaluate.stop_after: when a run stops would depend on the examples, without noise; remove it"
