"""Differential privacy of single examples: what each client may do, and which experiments it does not cover."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fedlora.config.privacy import Privacy
from fedlora.config.sections import Train
from fedlora.messages import Fit
from fedlora.privacy.events import Gaussian, Ledger
from fedlora.train.record_privacy import RecordPrivacy
from fedlora.train.steps import number_of_steps

if TYPE_CHECKING:
    from fedlora.config.experiment import Experiment


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


def ledger(privacy: RecordPrivacy, steps: int) -> Ledger:
    """The releases of a client that has made this many steps."""
    return [Gaussian(privacy.noise_multiplier, privacy.rate, steps)] if steps else []


def planned_steps(requests: Iterable[object], train: Train, examples: int) -> int:
    """Number of steps of one participation of a client with this number of examples, whose work makes these requests."""
    return sum(number_of_steps(request, train, examples) for request in requests if isinstance(request, Fit))


def reasons_against(experiment: "Experiment") -> Iterator[str]:
    """Yields why settings of an experiment do not fit `privacy.unit = "record"`, and what to do."""
    if experiment.privacy.unit != "record":
        return
    train, data = experiment.train, experiment.data
    if experiment.task.kind == "causal-lm" and data.messages is data.prompt is data.response is None:
        yield (
            "task.kind = 'causal-lm' with plain texts (data.text): they are joined and cut into blocks, so that a text is "
            "not an example of its own; set data.prompt and data.response, or data.messages"
        )
    if train.batches == "by-length":
        yield "train.batches = 'by-length': privacy.unit = 'record' samples each example on its own; remove it"
    if train.clip_norm is not None:
        yield f"train.clip_norm = {train.clip_norm:g}: privacy.clip limits each example's gradient already; remove it"
    if experiment.task.class_weights:
        yield "task.class_weights: privacy.unit = 'record' needs the mean over examples, with equal weights; remove it"
