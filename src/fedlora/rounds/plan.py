"""Settings of all rounds of a run, and the server's state between them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec
from fedlora.config.sections import Evaluate, Sampling
from fedlora.messages import ClientInfo, Statistics
from fedlora.method import AnyMethod
from fedlora.rounds.base_updates import BaseUpdateLog
from fedlora.rounds.client_privacy import ClientPrivacy
from fedlora.rounds.finite import Largest


@runtime_checkable
class GlobalEvaluator(Protocol):
    """Evaluates on the global test set."""

    def __call__(self, adapter: Adapter, rounds: int) -> Mapping[str, int | float]:
        """Metrics of the adapter after this number of rounds on the global test set, and the number of its `examples`."""


@dataclass(frozen=True)
class RecordLevel:
    """Record-level differential privacy as the round log states it.

    `epsilon` returns that of all trainings of a client in the first rounds.
    """

    clip: float
    delta: float
    epsilon: Callable[[ClientInfo, int], float]


@dataclass(frozen=True)
class Plan:
    """Settings of all rounds of a run.

    `metrics` computes a task's metrics from statistics; of those in `lower_is_better`, smaller values are better.
    `evaluator` is None without a global model or without a global test set. With `check_cohort` uploads are compared with
    the others of their round, see `cohort_checks`; until all are there, those that do not fit in memory are in the folder
    `spool`. With `hides_training`, the losses and the steps of clients are not recorded.

    With `client_level`, the method merges noised means; `sampling.attempts` and `sampling.min_replies` do not apply, and
    what would depend on single uploads is not recorded.
    """

    method: AnyMethod
    spec: AdapterSpec
    seed: int
    sampling: Sampling
    evaluate: Evaluate
    rounds: int
    uniform_weights: bool = False
    evaluator: GlobalEvaluator | None = None
    metrics: Callable[[Statistics], Mapping[str, float]] = field(kw_only=True)
    lower_is_better: Collection[str] = field(default=("loss",), kw_only=True)
    check_cohort: bool = False
    spool: Path | None = None
    hides_training: bool = False
    client_level: ClientPrivacy | None = None
    record_level: RecordLevel | None = None

    def evaluates_after(self, rounds: int) -> bool:
        """Whether the model is evaluated after this number of rounds."""
        return rounds % self.evaluate.every == 0 or rounds == self.rounds


@dataclass(frozen=True)
class RunState:
    """The server's state between rounds: the method's state, the base update log, the round's largest upload.

    `acknowledged` has the round and the share of each client's last upload that entered the state. `clip` is that of the
    next round if it is adapted.
    """

    server: Any
    base_updates: BaseUpdateLog = field(default_factory=BaseUpdateLog)
    largest: Largest | None = None
    acknowledged: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    clip: float | None = None
