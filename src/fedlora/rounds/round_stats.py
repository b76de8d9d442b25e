"""Statistics of a round in progress, from which its row is made."""

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

from fedlora.rounds.finite import Largest, divergence
from fedlora.rounds.row import ClientRow, LargestUpload, PrivacyRow, RoundRow, Seconds
from fedlora.rounds.score_summary import Summary


@dataclass(frozen=True)
class Training:
    """A client's training for an accepted upload, and the upload's weight; None where it is not recorded."""

    weight: float
    loss: float | None = None
    steps: int | None = None


@dataclass
class RoundStats:
    """Statistics of a round over all its attempts; chosen, accepted, clipped and largest are of the last attempt.

    `round` counts from 1; 0 is the model before training.
    """

    round: int
    started: datetime
    hides_training: bool = field(default=False, kw_only=True)
    attempts: int = 0
    chosen: list[str] = field(default_factory=list)
    accepted: dict[str, Training] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, float] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    largest: Largest | None = None
    diverged: str = ""
    bytes_up: Counter[str] = field(default_factory=Counter)
    bytes_down: Counter[str] = field(default_factory=Counter)
    bytes_eval: int | None = None
    aggregation_error: float | None = None
    privacy: PrivacyRow | None = None
    epsilons: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    global_metrics: Mapping[str, float] | None = None
    clients: Mapping[str, Summary] | None = None
    held_out: Mapping[str, int] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "merge": 0.0, "evaluate": 0.0})

    def begin(self, chosen: Sequence[str], bytes_down: Mapping[str, int]) -> None:
        """Starts the statistics of an attempt, given what each chosen client is sent."""
        self.chosen, self.accepted, self.clipped = list(chosen), {}, {}
        self.largest = None
        self.attempts += 1
        self.bytes_down.update(bytes_down)

    def shares(self) -> dict[str, float]:
        """The share of each accepted upload in the weights of the round."""
        total = sum(one.weight for one in self.accepted.values())
        return {client: one.weight / total for client, one in self.accepted.items()} if total > 0 else {}

    def row(self) -> RoundRow:
        """Row of the round, which ends now."""
        each = {
            client: ClientRow(
                self.bytes_up[client],
                self.bytes_down[client],
                **asdict(self.accepted[client]) if client in self.accepted else {},
                epsilon=self.epsilons.get(client),
            )
            for client in self.bytes_down | self.bytes_up
        }
        largest = self.largest
        return RoundRow(
            round=self.round,
            started=self.started,
            ended=datetime.now(UTC),
            attempts=self.attempts,
            chosen=self.chosen,
            accepted=list(self.accepted),
            rejected=self.rejected,
            clipped=self.clipped or None,
            per_client=each,
            bytes_up=self.bytes_up.total(),
            bytes_down=self.bytes_down.total(),
            bytes_eval=self.bytes_eval,
            train_loss=_weighted_mean(self.accepted.values()) if self.round and not self.hides_training else None,
            largest_upload=None if largest is None else LargestUpload(largest.client, largest.norm),
            diverged=self.diverged or None,
            aggregation_error=self.aggregation_error,
            global_=self.global_metrics,
            clients=self.clients,
            held_out=self.held_out,
            privacy=self.privacy,
            seconds=Seconds(**{phase: round(seconds, 4) for phase, seconds in self.seconds.items()}),
            notes=self.notes,
        )

    def divergence(self, last: Largest | None) -> str:
        """See `finite.divergence`."""
        return divergence((None if client in self.accepted else self.rejected.get(client) for client in self.chosen), last)

    @contextmanager
    def timed(self, phase: Literal["train", "merge", "evaluate"]) -> Iterator[None]:
        """Adds the time of its body, without that of phases timed within it, to a phase."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        yield
        within = sum(self.seconds.values()) - before
        self.seconds[phase] += time.perf_counter() - started - within


def _weighted_mean(trainings: Collection[Training]) -> float:
    """Weighted mean of the finite losses, since a client may report others."""
    finite = [(one.weight, one.loss) for one in trainings if one.loss is not None and math.isfinite(one.loss)]
    return sum(weight * loss for weight, loss in finite) / sum(weight for weight, _ in finite) if finite else math.nan
