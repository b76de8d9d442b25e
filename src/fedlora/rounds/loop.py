"""The round loop: choose, send, gather, merge, evaluate, record. It knows neither methods nor machines."""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.config import Evaluate, Sampling
from fedlora.errors import RunStopped
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Reply, Round, Score
from fedlora.method import AnyMethod
from fedlora.rounds.base_updates import BaseUpdateLog, BaseUpdateStore, pending_tensors
from fedlora.rounds.codec import encoded_size
from fedlora.rounds.finite import NOT_FINITE, Largest, NumericalError, divergence, is_finite
from fedlora.rounds.progress import Progress
from fedlora.rounds.report import summary
from fedlora.rounds.sample import choose
from fedlora.rounds.validator import Failed, UploadValidator, change_norm


@runtime_checkable
class Backend(Protocol):
    """Where the clients are: in this process, or on other machines."""

    def clients(self) -> Sequence[ClientInfo]:
        """All that are registered."""

    def held(self) -> Mapping[str, Sequence[int]]:
        """The indices of the rounds whose base updates a client holds, of those clients that have told."""

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Changes the base on which the next turns and evaluation happen here, if it happens here."""

    def train_clients(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """Has the clients work on what they were sent; their answers, in the order of `sent`.

        The answers of an earlier `evaluate` may still be waited for: clients evaluate first.
        `pending` holds the changes of the base (see `base updates.pending_tensors`) that a client must apply first.
        """

    def evaluate(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Score | None]]:
        """Has the clients evaluate what they would use in round `rnd`; None of those that have no held-out examples."""


@runtime_checkable
class GlobalEvaluator(Protocol):
    """Who has the global test set."""

    def __call__(self, adapter: Adapter) -> Score:
        """The adapter's score on it."""


@dataclass(frozen=True)
class Plan:
    """Settings of all rounds of a run. `evaluator` is None if there is no global model or no global test set."""

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
    """What the server knows between rounds: the method's state, the changes of the base, the round's largest upload."""

    server: Any
    base_updates: BaseUpdateLog = field(default_factory=BaseUpdateLog)
    largest: Largest | None = None


@dataclass
class _RoundStats:
    """What is counted while a round goes on, over all its attempts; chosen, accepted, losses and largest are the last's."""

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
    """The rounds from index `first` on, each as it is complete: what the server knows after it, and its row of the log.

    A round's clients are sent their work before the scores of the round before are asked for: over a network, where
    messages take long, evaluation and the next training go out together.

    Raises:
        RunStopped: in none of a round's attempts came enough replies that could be accepted.
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
    """What the server knows after the round, and the row of the round log.

    Raises:
        RunStopped: in none of the attempts came enough replies that could be accepted.
    """
    attempt = _begin(plan, backend, store, before, Round(index, plan.seed))
    return _round(plan, backend, store, before, attempt, progress).ended(progress)


@dataclass(frozen=True)
class _Attempt:
    """A round whose messages are on their way. `base_updates` are those of the clients before they get them."""

    rnd: Round
    chosen: Sequence[ClientInfo]
    validator: UploadValidator
    base_updates: BaseUpdateLog
    bytes_down: int
    replies: Iterator[Reply | Failed]


@dataclass(frozen=True)
class _PendingEvaluation:
    """A round that lacks only its clients' scores, if it has any."""

    after: RunState
    row: dict[str, Any]
    tally: _RoundStats
    scores: Iterator[tuple[ClientInfo, Score | None]] | None

    def ended(self, progress: Progress) -> tuple[RunState, dict[str, Any]]:
        """What the server knows after the round, and the row."""
        row, tally = self.row, self.tally
        started = time.perf_counter()
        if self.scores is not None:
            row = row | {"clients": summary({client.id: score for client, score in self.scores if score is not None})}
        tally.seconds["evaluate"] += time.perf_counter() - started
        row = row | {"seconds": {phase: round(seconds, 4) for phase, seconds in tally.seconds.items()}}
        progress.round_ended(row)
        return self.after, row


def _begin(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, rnd: Round, left_out: Collection[str] = ()
) -> _Attempt:
    """Chooses the cohort, of others than `left_out` if there are any, and sends it its work."""
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
    """Merges the first attempt that has enough replies, and has the result evaluated."""
    tally, index = _RoundStats(), attempt.rnd.index
    while True:
        merged, base_updates = _merged(plan, before, attempt, tally, progress)
        if merged is not None:
            break
        before = replace(before, base_updates=base_updates)
        if attempt.rnd.attempt + 1 == plan.sampling.attempts:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in tally.rejected.items())
            cause = f"; {text}" if (text := tally.divergence(before.largest)) else ""
            raise RunStopped(
                f"round {index + 1}: in {plan.sampling.attempts} attempts, never were {plan.sampling.min_replies} uploads "
                f"(sampling.min_replies) accepted and merged ({reasons}){cause}; the rounds before are complete"
            )
        again = Round(index, plan.seed, attempt.rnd.attempt + 1)
        attempt = _begin(plan, backend, store, before, again, tally.left_out)
    row: dict[str, Any] = {
        "round": index + 1,
        "attempts": attempt.rnd.attempt + 1,
        "chosen": tally.chosen,
        "accepted": tally.accepted,
        "rejected": tally.rejected,
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "train_loss": _weighted_mean(tally.losses),
        **({"largest_upload": {"client": found.client, "norm": found.norm}} if (found := tally.largest) else {}),
        **({"diverged": text} if (text := tally.divergence(before.largest)) else {}),
        **merged.notes,
    }
    after = RunState(merged.server, base_updates, tally.largest)
    if merged.base_update is not None:
        store.save_base_update(index, merged.base_update)
        backend.merge_into_base(merged.base_update)
        after = replace(after, base_updates=base_updates.added(index))
    if (index + 1) % plan.evaluate.every and index + 1 != plan.rounds:
        return _PendingEvaluation(after, row, tally, None)
    return _evaluated(plan, backend, store, after, row, tally)


def _merged(
    plan: Plan, before: RunState, attempt: _Attempt, tally: _RoundStats, progress: Progress
) -> tuple[Merged[Any] | None, BaseUpdateLog]:
    """The merge of one cohort, None if too few of its replies were accepted or its result is not finite; and who now has
    which base updates."""
    progress.round_started(attempt.rnd, attempt.chosen)
    tally.bytes_down += attempt.bytes_down
    tally.chosen, tally.accepted, tally.losses, tally.largest = [client.id for client in attempt.chosen], [], [], None
    answered: list[str] = []

    def accepted() -> Iterator[Reply]:
        while True:
            started = time.perf_counter()
            answer = next(attempt.replies, None)
            tally.seconds["train"] += time.perf_counter() - started
            if answer is None:
                return
            rejected = answer.reason if isinstance(answer, Failed) else attempt.validator.rejection_reason(answer)
            progress.answered(answer.client, rejected)
            if isinstance(answer, Reply):
                answered.append(answer.client.id)
                tally.bytes_up += encoded_size(answer.upload)
            if rejected is not None or isinstance(answer, Failed):
                tally.rejected[answer.client.id] = str(rejected)
                continue
            norm = change_norm(answer.upload, attempt.validator.sent[answer.client])
            if tally.largest is None or norm > tally.largest.norm:
                tally.largest = Largest(answer.client.id, norm, attempt.rnd.index + 1)
            weight = 1.0 if plan.uniform_weights else answer.weight
            tally.accepted.append(answer.client.id)
            tally.losses.append((weight, answer.notes.get("loss", float("nan"))))
            yield Reply(answer.client, answer.round, answer.upload, weight, answer.notes)

    replies = accepted()
    first = next(replies, None)
    if first is None:
        return None, attempt.base_updates.delivered(answered)
    trained, started = tally.seconds["train"], time.perf_counter()
    merged: Merged[Any] | None = None
    try:
        merged = plan.method.merge(before.server, Replies(chain([first], replies)), attempt.rnd)
        failure = "" if is_finite((merged.server, merged.base_update)) else NOT_FINITE
    except NumericalError as error:
        failure = type(error).__name__.lstrip("_")
        for _ in replies:  # the rest of the cohort
            pass
    tally.seconds["merge"] += time.perf_counter() - started - (tally.seconds["train"] - trained)
    if failure and tally.largest is not None:
        client = next(client for client in attempt.chosen if client.id == tally.largest.client)
        tally.rejected[client.id] = (
            f"merging ended in {failure}, and its upload changed most: by the norm {tally.largest.norm:.4g}"
        )
        tally.left_out.add(client.id)
        progress.answered(client, tally.rejected[client.id])
    enough = not failure and len(tally.accepted) >= plan.sampling.min_replies
    return (merged if enough else None), attempt.base_updates.delivered(answered)


def pending_base_updates(
    spec: AdapterSpec, store: BaseUpdateStore, base_updates: BaseUpdateLog, clients: Sequence[ClientInfo]
) -> dict[ClientInfo, Tensors]:
    """What each client that lacks some base updates must be sent; clients that lack the same ones share the tensors."""
    made: dict[tuple[int, ...], Tensors] = {}
    for pending in {base_updates.pending(client.id) for client in clients} - {()}:
        made[pending] = pending_tensors({index: store.base_update(index) for index in pending}, spec)
    return {client: made[pending] for client in clients if (pending := base_updates.pending(client.id))}


def _evaluated(
    plan: Plan, backend: Backend, store: BaseUpdateStore, after: RunState, row: dict[str, Any], tally: _RoundStats
) -> _PendingEvaluation:
    """Evaluates what would be used in the next round: the server at once, the clients when their scores are asked for.

    Base updates that had to be sent for it count as this round's, and are not sent again for the next.
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
        evaluated = [client for client in everybody if plan.evaluate.clients == "all" or client.id in set(tally.accepted)]
        sent = {client: plan.method.send(after.server, client, rnd) for client in evaluated}
        pending = pending_base_updates(plan.spec, store, base_updates, evaluated)
        scores = backend.evaluate(rnd, sent, pending)
        bytes_down = row["bytes_down"] + sum(map(encoded_size, pending.values()))
        row = row | {"bytes_eval": sum(map(encoded_size, sent.values())), "bytes_down": bytes_down}
        base_updates = base_updates.delivered(client.id for client in evaluated)
    tally.seconds["evaluate"] += time.perf_counter() - started
    return _PendingEvaluation(replace(after, base_updates=base_updates), row, tally, scores)


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Of the finite values: one client may report anything."""
    finite = [(weight, value) for weight, value in pairs if math.isfinite(value)]
    return sum(weight * value for weight, value in finite) / sum(weight for weight, _ in finite) if finite else math.nan
