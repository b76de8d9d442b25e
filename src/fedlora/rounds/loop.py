"""Round loop: sample clients, send, collect, merge, evaluate, record. Independent of the method and of the backend."""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.config.sections import Evaluate, Sampling
from fedlora.errors import RunStopped
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Reply, Round, Score
from fedlora.method import AnyMethod
from fedlora.rounds.base_updates import BaseUpdateLog, BaseUpdateStore, pending_tensors
from fedlora.rounds.codec import encoded_size
from fedlora.rounds.finite import NOT_FINITE, Largest, NumericalError, divergence, is_finite
from fedlora.rounds.progress import Progress
from fedlora.rounds.sample import choose
from fedlora.rounds.score_summary import summary
from fedlora.rounds.validator import Failed, UploadValidator, change_norm


@runtime_checkable
class Backend(Protocol):
    """Access to the clients, in this process or on other machines."""

    def clients(self) -> Sequence[ClientInfo]:
        """All registered clients."""

    def held(self) -> Mapping[str, Sequence[int]]:
        """Indices of the rounds whose base updates a client has applied, for each client that has reported them."""

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges a base update into the local base, which later training and evaluation in this process use."""

    def train_clients(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """Trains the clients on their downloads; yields replies and failures in the order of `sent`.

        The scores of an earlier `evaluate` may not have been collected yet: clients evaluate first. `pending` holds the
        base updates (see `base_updates.pending_tensors`) that a client must apply first.
        """

    def evaluate(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Score | None]]:
        """Evaluates the adapters that clients would use in round `rnd`; None for clients without held-out examples."""


@runtime_checkable
class GlobalEvaluator(Protocol):
    """Evaluates on the global test set."""

    def __call__(self, adapter: Adapter) -> Score:
        """Score of the adapter on the global test set."""


@dataclass(frozen=True)
class Plan:
    """Settings of all rounds of a run. `evaluator` is None without a global model or without a global test set."""

    method: AnyMethod
    spec: AdapterSpec
    seed: int
    sampling: Sampling
    evaluate: Evaluate
    rounds: int
    uniform_weights: bool = False
    evaluator: GlobalEvaluator | None = None


@dataclass(frozen=True)
class RunState:
    """The server's state between rounds: the method's state, the base update log, the round's largest upload."""

    server: Any
    base_updates: BaseUpdateLog = field(default_factory=BaseUpdateLog)
    largest: Largest | None = None


@dataclass
class _RoundStats:
    """Statistics of a round over all its attempts; chosen, accepted, losses and largest are of the last attempt."""

    chosen: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    largest: Largest | None = None
    losses: list[tuple[float, float]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "merge": 0.0, "evaluate": 0.0})

    def divergence(self, last: Largest | None) -> str:
        """See `finite.divergence`."""
        return divergence((None if client in self.accepted else self.rejected.get(client) for client in self.chosen), last)


def run_rounds(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, first: int, progress: Progress
) -> Iterator[tuple[RunState, dict[str, Any]]]:
    """Runs the rounds from index `first`; yields after each the server's state and the row of the round log.

    A round's training requests are sent before the scores of the previous round are collected: over a network with high
    latency, evaluation and the next training are sent together.

    Raises:
        RunStopped: no attempt of a round received enough valid uploads.
    """
    evaluating: _PendingEvaluation | None = None
    for index in range(first, plan.rounds):
        attempt = _begin(plan, backend, store, before, Round(index, plan.seed))
        if evaluating is not None:
            yield evaluating.ended(progress)
        evaluating = _round(plan, backend, store, before, attempt, progress)
        before = evaluating.after
    if evaluating is not None:
        yield evaluating.ended(progress)


def one_round(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, index: int, progress: Progress
) -> tuple[RunState, dict[str, Any]]:
    """Runs one round; returns the server's state after it, and the row of the round log.

    Raises:
        RunStopped: no attempt received enough valid uploads.
    """
    attempt = _begin(plan, backend, store, before, Round(index, plan.seed))
    return _round(plan, backend, store, before, attempt, progress).ended(progress)


@dataclass(frozen=True)
class _Attempt:
    """A round whose messages are in flight. `base_updates` is the log before their delivery."""

    rnd: Round
    chosen: Sequence[ClientInfo]
    validator: UploadValidator
    base_updates: BaseUpdateLog
    bytes_down: int
    replies: Iterator[Reply | Failed]


@dataclass(frozen=True)
class _PendingEvaluation:
    """A round that is complete except for its clients' scores, if it has any."""

    after: RunState
    row: dict[str, Any]
    stats: _RoundStats
    scores: Iterator[tuple[ClientInfo, Score | None]] | None

    def ended(self, progress: Progress) -> tuple[RunState, dict[str, Any]]:
        """Collects the scores; returns the server's state after the round, and the row."""
        row, stats = self.row, self.stats
        started = time.perf_counter()
        if self.scores is not None:
            row = row | {"clients": summary({client.id: score for client, score in self.scores if score is not None})}
        stats.seconds["evaluate"] += time.perf_counter() - started
        row = row | {"seconds": {phase: round(seconds, 4) for phase, seconds in stats.seconds.items()}}
        progress.round_ended(row)
        return self.after, row


def _begin(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, rnd: Round, left_out: Collection[str] = ()
) -> _Attempt:
    """Chooses the cohort, excluding `left_out` unless no clients remain, and sends the training requests."""
    everybody = backend.clients()
    chosen = choose([client for client in everybody if client.id not in left_out] or everybody, plan.sampling.fraction, rnd)
    sent = {client: plan.method.send(before.server, client, rnd) for client in chosen}
    base_updates = before.base_updates.known(backend.held())
    pending = pending_base_updates(plan.spec, store, base_updates, chosen)
    validator = UploadValidator(plan.method, plan.spec, rnd, sent, plan.sampling.max_norm, plan.sampling.max_examples)
    bytes_down = sum(map(encoded_size, [*sent.values(), *pending.values()]))
    return _Attempt(rnd, chosen, validator, base_updates, bytes_down, backend.train_clients(rnd, sent, pending))


def _round(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, attempt: _Attempt, progress: Progress
) -> _PendingEvaluation:
    """Merges the first attempt with enough replies, and starts the evaluation of the result."""
    stats, index = _RoundStats(), attempt.rnd.index
    while True:
        merged, base_updates = _merged(plan, before, attempt, stats, progress)
        if merged is not None:
            break
        before = replace(before, base_updates=base_updates)
        if attempt.rnd.attempt + 1 == plan.sampling.attempts:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in stats.rejected.items())
            cause = f"; {text}" if (text := stats.divergence(before.largest)) else ""
            raise RunStopped(
                f"round {index + 1}: no attempt ({plan.sampling.attempts} made) received {plan.sampling.min_replies} valid "
                f"uploads (sampling.min_replies): {reasons}{cause}; the previous rounds are complete"
            )
        again = Round(index, plan.seed, attempt.rnd.attempt + 1)
        attempt = _begin(plan, backend, store, before, again, stats.left_out)
    row: dict[str, Any] = {
        "round": index + 1,
        "attempts": attempt.rnd.attempt + 1,
        "chosen": stats.chosen,
        "accepted": stats.accepted,
        "rejected": stats.rejected,
        "bytes_up": stats.bytes_up,
        "bytes_down": stats.bytes_down,
        "train_loss": _weighted_mean(stats.losses),
        **({"largest_upload": {"client": found.client, "norm": found.norm}} if (found := stats.largest) else {}),
        **({"diverged": text} if (text := stats.divergence(before.largest)) else {}),
        **merged.notes,
    }
    after = RunState(merged.server, base_updates, stats.largest)
    if merged.base_update is not None:
        store.save_base_update(index, merged.base_update)
        backend.merge_into_base(merged.base_update)
        after = replace(after, base_updates=base_updates.added(index))
    if (index + 1) % plan.evaluate.every and index + 1 != plan.rounds:
        return _PendingEvaluation(after, row, stats, None)
    return _evaluated(plan, backend, store, after, row, stats)


def _merged(
    plan: Plan, before: RunState, attempt: _Attempt, stats: _RoundStats, progress: Progress
) -> tuple[Merged[Any] | None, BaseUpdateLog]:
    """Merge of one cohort, None if too few replies were accepted or the result is not finite; and the new log."""
    progress.round_started(attempt.rnd, attempt.chosen)
    stats.bytes_down += attempt.bytes_down
    stats.chosen, stats.accepted, stats.losses, stats.largest = [client.id for client in attempt.chosen], [], [], None
    answered: list[str] = []

    def accepted() -> Iterator[Reply]:
        while True:
            started = time.perf_counter()
            answer = next(attempt.replies, None)
            stats.seconds["train"] += time.perf_counter() - started
            if answer is None:
                return
            rejected = answer.reason if isinstance(answer, Failed) else attempt.validator.rejection_reason(answer)
            progress.answered(answer.client, rejected)
            if isinstance(answer, Reply):
                answered.append(answer.client.id)
                stats.bytes_up += encoded_size(answer.upload)
            if rejected is not None or isinstance(answer, Failed):
                stats.rejected[answer.client.id] = str(rejected)
                continue
            norm = change_norm(answer.upload, attempt.validator.sent[answer.client])
            if stats.largest is None or norm > stats.largest.norm:
                stats.largest = Largest(answer.client.id, norm, attempt.rnd.index + 1)
            weight = 1.0 if plan.uniform_weights else answer.weight
            stats.accepted.append(answer.client.id)
            stats.losses.append((weight, answer.notes.get("loss", float("nan"))))
            yield Reply(answer.client, answer.round, answer.upload, weight, answer.notes)

    replies = accepted()
    first = next(replies, None)
    if first is None:
        return None, attempt.base_updates.delivered(answered)
    trained, started = stats.seconds["train"], time.perf_counter()
    merged: Merged[Any] | None = None
    try:
        merged = plan.method.merge(before.server, Replies(chain([first], replies)), attempt.rnd)
        failure = "" if is_finite((merged.server, merged.base_update)) else NOT_FINITE
    except NumericalError as error:
        failure = type(error).__name__.lstrip("_")
        for _ in replies:  # the rest of the cohort
            pass
    stats.seconds["merge"] += time.perf_counter() - started - (stats.seconds["train"] - trained)
    if failure and stats.largest is not None:
        client = next(client for client in attempt.chosen if client.id == stats.largest.client)
        stats.rejected[client.id] = (
            f"merging ended in {failure}, and its upload has the largest change: norm {stats.largest.norm:.4g}"
        )
        stats.left_out.add(client.id)
        progress.answered(client, stats.rejected[client.id])
    enough = not failure and len(stats.accepted) >= plan.sampling.min_replies
    return (merged if enough else None), attempt.base_updates.delivered(answered)


def pending_base_updates(
    spec: AdapterSpec, store: BaseUpdateStore, base_updates: BaseUpdateLog, clients: Sequence[ClientInfo]
) -> dict[ClientInfo, Tensors]:
    """Pending base updates of each client that has any; clients with the same pending base updates share the tensors."""
    made: dict[tuple[int, ...], Tensors] = {}
    for pending in {base_updates.pending(client.id) for client in clients} - {()}:
        made[pending] = pending_tensors({index: store.base_update(index) for index in pending}, spec)
    return {client: made[pending] for client in clients if (pending := base_updates.pending(client.id))}


def _evaluated(
    plan: Plan, backend: Backend, store: BaseUpdateStore, after: RunState, row: dict[str, Any], stats: _RoundStats
) -> _PendingEvaluation:
    """Evaluates the adapters of the next round: on the server immediately, on clients when their scores are collected.

    Base updates sent for the evaluation are counted in this round, and not sent again in the next.
    """
    started = time.perf_counter()
    rnd, base_updates = Round(row["round"], plan.seed), after.base_updates.known(backend.held())
    scores = None
    if plan.evaluator is not None:
        anybody = ClientInfo("", plan.method.rank, 1)
        state = plan.method.init_client(plan.spec, anybody, plan.seed)
        score = plan.evaluator(plan.method.view(state, plan.method.send(after.server, anybody, rnd), anybody))
        row = row | {"global": {**score.metrics, "examples": score.examples}}
    if plan.evaluate.clients != "none":
        everybody = sorted(backend.clients(), key=lambda client: client.id)
        evaluated = [client for client in everybody if plan.evaluate.clients == "all" or client.id in set(stats.accepted)]
        sent = {client: plan.method.send(after.server, client, rnd) for client in evaluated}
        pending = pending_base_updates(plan.spec, store, base_updates, evaluated)
        scores = backend.evaluate(rnd, sent, pending)
        bytes_down = row["bytes_down"] + sum(map(encoded_size, pending.values()))
        row = row | {"bytes_eval": sum(map(encoded_size, sent.values())), "bytes_down": bytes_down}
        base_updates = base_updates.delivered(client.id for client in evaluated)
    stats.seconds["evaluate"] += time.perf_counter() - started
    return _PendingEvaluation(replace(after, base_updates=base_updates), row, stats, scores)


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Weighted mean of the finite values, since a client may report others."""
    finite = [(weight, value) for weight, value in pairs if math.isfinite(value)]
    return sum(weight * value for weight, value in finite) / sum(weight for weight, _ in finite) if finite else math.nan
