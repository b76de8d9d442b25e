"""Row of a round: what the round log records of it, and its form as one line of JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedlora.rounds.score_summary import Summary

VERSION = 1
"""Version of the rows; it changes if a key's meaning changes, not if a key is added."""


@dataclass(frozen=True)
class ClientRow:
    """One client's part in a round."""

    bytes_up: int = 0
    """Size of its uploads, rejected ones included. Unit: bytes."""
    bytes_down: int = 0
    """Size of its downloads and base updates. Unit: bytes."""
    weight: float | None = None
    """Weight of its upload in the mean, not normalized. Absent: its upload was not accepted."""
    loss: float | None = None
    """Mean loss of its training, as it reports it. Absent: its upload was not accepted, or `privacy.unit` is set."""
    steps: int | None = None
    """Number of its optimizer steps. Absent: its upload was not accepted, or `privacy.unit` is set."""
    epsilon: float | None = None
    """Epsilon of all its trainings so far. Absent: `privacy.unit` is not record."""


@dataclass(frozen=True)
class PrivacyRow:
    """The differential privacy of a run up to a round (`privacy`)."""

    epsilon: float
    """Epsilon of all rounds so far: of the run, or the largest of its clients. Not finite without noise."""
    delta: float
    """Delta of the guarantee."""
    clip: float
    """The clip of the round."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise, in units of the clip. Absent: each client has its own."""
    within_clip: float | None = None
    """Noised fraction of the uploads whose changes were within the clip. Absent: the clip is fixed."""
    clients: int | None = None
    """Number of clients that the account protects. Absent: `privacy.unit` is record."""


@dataclass(frozen=True)
class LargestUpload:
    """The accepted upload with the largest change."""

    client: str
    """Its client."""
    norm: float
    """Frobenius norm of the change."""


@dataclass(frozen=True)
class Seconds:
    """Time spent in each part of a round."""

    train: float = 0.0
    """Waiting for the clients' training. Unit: seconds."""
    merge: float = 0.0
    """Validating, collecting and merging uploads. Unit: seconds."""
    evaluate: float = 0.0
    """Evaluating, or waiting for the clients' evaluation. Unit: seconds."""

    @property
    def total(self) -> float:
        """Their sum."""
        return self.train + self.merge + self.evaluate


@dataclass(frozen=True)
class RoundRow:
    """Row of a round. Round 0 is the model before training: it is only evaluated."""

    round: int
    """The round, counted from 1; 0 is the model before training."""
    started: datetime
    """When the clients of the first attempt were chosen. Unit: UTC, ISO 8601."""
    ended: datetime
    """When the round was complete, with its scores. The next one may have started before. Unit: UTC, ISO 8601."""
    version: int = VERSION
    """Version of the row."""
    attempts: int = 0
    """Number of attempts. The lists of clients are those of the last one. Absent: in round 0."""
    chosen: Sequence[str] = field(default_factory=list)
    """The sampled clients. Absent: in round 0."""
    accepted: Sequence[str] = field(default_factory=list)
    """Clients whose uploads were merged, in the order of their replies. Absent: in round 0."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Reason for each client rejected in any attempt. Absent: in round 0."""
    clipped: Mapping[str, float] | None = None
    """Factor, below 1, by which each clipped upload's change was scaled. Absent: no upload was clipped."""
    per_client: Mapping[str, ClientRow] = field(default_factory=dict)
    """Each client that was sent or has sent anything, in any attempt, other than for evaluation. Absent: in round 0."""
    bytes_up: int = 0
    """Size of all uploads, rejected ones included. Unit: bytes. Absent: in round 0."""
    bytes_down: int = 0
    """Size of all downloads for training, and of all base updates. Unit: bytes. Absent: in round 0."""
    bytes_eval: int | None = None
    """Size of all downloads for evaluation. Unit: bytes. Absent: no client was evaluated."""
    train_loss: float | None = None
    """Weighted mean of the accepted clients' finite losses. Absent: in round 0, or `privacy.unit` is set."""
    largest_upload: LargestUpload | None = None
    """The accepted upload with the largest change. Absent: in round 0, or `privacy.unit` is client."""
    diverged: str | None = None
    """Warning that names the probable cause. Absent: fewer than half of the clients had non-finite values."""
    aggregation_error: float | None = None
    """Relative error of the aggregate, compared to the weighted mean of the clients' updates. Absent: the method has no
    global product, in round 0, or `privacy.unit` is client."""
    global_: Mapping[str, int | float] | None = None
    """Each metric on the global test set, and the number of its `examples`. Absent: the round was not evaluated, or there
    is no global model or no test set."""
    clients: Mapping[str, Summary] | None = None
    """Each metric on the clients' held-out examples. Absent: the clients were not evaluated."""
    held_out: Mapping[str, int] | None = None
    """The number of held-out examples on which each client was evaluated. Absent: the clients were not evaluated."""
    best_round: int | None = None
    """The round, up to this one, with the best `evaluate.metric`. Absent: `evaluate.stop_after` is not set, no round was
    evaluated yet, or in a progress callback."""
    privacy: PrivacyRow | None = None
    """Differential privacy up to this round. Absent: `privacy.unit` is not set, or in round 0."""
    seconds: Seconds = field(default_factory=Seconds)
    """Time spent in each part. A round's evaluation overlaps with the next round's training on clients elsewhere."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """The method's own numbers, each as a key of its own beside those above, see the method's page. Absent: none."""

    @property
    def main_metric(self) -> str | None:
        """The task's main metric, which is the first one; None if nothing was evaluated."""
        return next(iter(self.global_ or self.clients or ()), None)


_TRAINING = frozenset(
    ("attempts", "chosen", "accepted", "rejected", "per_client", "bytes_up", "bytes_down", "train_loss", "largest_upload")
)
_ADAPTER = TypeAdapter(RoundRow)


def key(name: str) -> str:
    """JSON key of an attribute. `global` is a keyword of Python, so its attribute is `global_`."""
    return name.rstrip("_")


def to_json(row: RoundRow) -> dict[str, Any]:
    """The row as an object of strict JSON: numbers that are not finite are null, absent values have no key."""
    found = _ADAPTER.dump_python(row, mode="json", exclude_none=True)
    notes, absent = found.pop("notes"), frozenset() if row.round else _TRAINING
    entries = {key(name): value for name, value in found.items() if name not in absent}
    return {name: _without_nan(value) for name, value in {**entries, **notes}.items()}


def from_json(line: Mapping[str, Any]) -> RoundRow:
    """Inverse of `to_json`, with NaN for each null.

    Raises:
        ValueError: the row has another version, or is invalid.
    """
    if (version := line.get("version")) != VERSION:
        raise ValueError(f"expected version {VERSION} of a row, found {version}; read it with the release that wrote it")
    names = {key(one.name): one.name for one in fields(RoundRow) if one.name != "notes"}
    entries = {names[name]: _with_nan(value) for name, value in line.items() if name in names}
    notes = {name: _with_nan(value) for name, value in line.items() if name not in names}
    try:
        return _ADAPTER.validate_python({**entries, "notes": notes})
    except ValidationError as error:
        where, why = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise ValueError(f"{'.'.join(map(str, where))}: {why}") from error


def _without_nan(value: Any) -> Any:
    match value:
        case Mapping():
            return {name: _without_nan(item) for name, item in value.items()}
        case float() if not math.isfinite(value):
            return None
    return value


def _with_nan(value: Any) -> Any:
    match value:
        case Mapping():
            return {name: _with_nan(item) for name, item in value.items()}
        case None:
            return math.nan
    return value
