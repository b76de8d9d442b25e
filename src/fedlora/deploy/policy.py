"""Comparison of a server's experiment with a node's policy, and the privacy with which the node trains."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora.config.experiment import Experiment
from fedlora.config.policy import Policy, PrivacyLimits
from fedlora.deploy.privacy_ledger import Budget
from fedlora.deploy.reasons import Reason
from fedlora.federated_data import columns_of
from fedlora.rounds.sample import cohort_size

NoiseFor = Callable[[float, float, float, int], float]
"""The smallest noise multiplier for an epsilon, a delta, a rate and a number of steps."""


@dataclass(frozen=True)
class Refusal:
    """A setting that the policy does not allow: the code for the server, and the text for the node's owner."""

    reason: Reason
    text: str


def refusals(policy: Policy, experiment: Experiment) -> Iterator[Refusal]:
    """Everything in the experiment that only the server can change, and that is weaker than the policy.

    Clip, noise and the epsilon of records are not among them: the node trains with its own, see `own_noise`.
    """
    allowed: dict[Reason, tuple[str, Sequence[str] | None, Sequence[str]]] = {
        Reason.METHOD: ("methods", policy.methods, [experiment.method.name]),
        Reason.TASK: ("tasks", policy.tasks, [experiment.task.kind]),
        Reason.MODEL_NOT_ALLOWED: ("models", policy.models, [experiment.model]),
        Reason.COLUMNS: ("columns", policy.columns, column_names(experiment)),
    }
    for reason, (key, values, asked) in allowed.items():
        if values is not None and (other := [value for value in asked if value not in values]):
            yield Refusal(reason, f"asks for {other[0]!r}, policy.{key} allows {', '.join(values) or 'nothing'}")
    if policy.rounds is not None and experiment.rounds > policy.rounds:
        yield Refusal(Reason.ROUNDS, f"asks for rounds = {experiment.rounds}, policy.rounds = {policy.rounds}")
    if (cohort := _smallest_cohort(experiment)) < policy.cohort:
        yield Refusal(Reason.COHORT, f"makes a model of {cohort} upload(s), policy.cohort = {policy.cohort}")
    if policy.secure == "required":
        yield Refusal(Reason.SECURE, "has no secure sums, policy.secure = 'required'")
    yield from _weaker_privacy(policy.privacy, experiment)


def column_names(experiment: Experiment) -> list[str]:
    """The columns of the node's data that the task reads, as they are named there."""
    return [getattr(experiment.data, column.name) for column in columns_of(experiment)]


def _smallest_cohort(experiment: Experiment) -> int:
    if experiment.privacy.unit == "client":
        return cohort_size(experiment.clients.size or 1, experiment.sampling.fraction)
    return experiment.sampling.min_replies


def _weaker_privacy(limits: PrivacyLimits, experiment: Experiment) -> Iterator[Refusal]:
    asked = experiment.privacy
    if limits.unit == "none":
        return
    if asked.unit != limits.unit:
        yield Refusal(Reason.UNIT, f"has privacy.unit = {asked.unit!r}, policy.privacy.unit = {limits.unit!r}")
    if asked.public_counts and not limits.public_counts:
        yield Refusal(Reason.COUNTS, "has privacy.public_counts = true, policy.privacy.public_counts = false")


def own_clip(asked: float, limits: PrivacyLimits) -> float:
    """The clip of this node's training: the experiment's, or the policy's if that is smaller."""
    return asked if limits.clip is None else min(asked, limits.clip)


def own_noise(asked: float, rate: float, steps: int, limits: PrivacyLimits, noise_for: NoiseFor) -> float:
    """The noise multiplier of this node's training: the experiment's, or the policy's if that is larger.

    The policy's is that by which `steps` steps, each with a batch at this rate, have the largest epsilon of one run.
    `rate` and `steps` are from the node's own number of examples, so that large batches or many steps add noise.
    """
    if limits.run_limit is None or limits.delta is None:
        return asked
    return max(asked, noise_for(limits.run_limit, limits.delta, rate, steps))


def budgets(limits: PrivacyLimits) -> list[Budget]:
    """The limits of epsilon."""
    if limits.delta is None:
        return []
    of: Sequence[tuple[Literal["one run", "all runs"], float | None]]
    of = [("one run", limits.run_limit), ("all runs", limits.epsilon)]
    return [Budget(runs, epsilon, limits.delta) for runs, epsilon in of if epsilon is not None]
