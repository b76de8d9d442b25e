"""Round loop: sample clients, send, collect, merge, evaluate, record. Independent of the method and of the backend."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.config.sections import Evaluate, Sampling
from fedlora.errors import RunStopped
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Acknowledged, ClientInfo, Merged, Reply, Round, Statistics
from fedlora.method import AnyMethod, ClientRound, global_adapter
from fedlora.rounds.aggregation_error import ClientUpdates
from fedlora.rounds.base_updates import BaseUpdateLog, BaseUpdateStore, pending_tensors
from fedlora.rounds.codec import encoded_size
from fedlora.rounds.cohort_checks import Size, check_cohort, clipped, difference_norm, spectral_norm
from fedlora.rounds.collect import collect
from fedlora.rounds.finite import NOT_FINITE, Largest, NumericalError, is_finite
from fedlora.rounds.progress import Progress
from fedlora.rounds.round_stats import RoundStats, Training
from fedlora.rounds.row import RoundRow
from fedlora.rounds.sample import choose
from fedlora.rounds.score_summary import summary
from fedlora.rounds.spool import Spool
from fedlora.rounds.validator import Failed, UploadValidator


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
    ) -> Iterator[tuple[ClientInfo, Statistics | None]]:
        """Evaluates the adapters that clients would use in round `rnd`; None for clients without held-out examples."""


@runtime_checkable
class GlobalEvaluator(Protocol):
    """Evaluates on the global test set."""

    def __call__(self, adapter: Adapter) -> Mapping[str, int | float]:
        """Metrics of the adapter on the global test set, and the number of its `examples`."""


@dataclass(frozen=True)
class Plan:
    """Settings of all rounds of a run.

    `metrics` computes a task's metrics from statistics; of those in `lower_is_better`, smaller values are better.
    `evaluator` is None without a global model or without a global test set. With `check_cohort` uploads are compared with
    the others of their round, see `cohort_checks`; until all are there, those that do not fit in memory are in the folder
    `spool`.
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


@dataclass(frozen=True)
class RunState:
    """The server's state between rounds: the method's state, the base update log, the round's largest upload.

    `acknowledged` has the round and the share of each client's last upload that entered the state.
    """

    server: Any
    base_updates: BaseUpdateLog = field(default_factory=BaseUpdateLog)
    largest: Largest | None = None
    acknowledged: Mapping[str, tuple[int, float]] = field(default_factory=dict)


def run_rounds(
    plan: Plan,
    backend: Backend,
    store: BaseUpdateStore,
    before: RunState,
    first: int,
    progress: Progress,
    evaluate_before: bool = False,
) -> Iterator[tuple[RunState, RoundRow]]:
    """Runs the rounds from index `first`; yields after each the server's state and the row of the round log.

    With `evaluate_before`, which requires `first` to be 0, the first row is that of the model before training. A round's
    training requests are sent before the scores of the previous round are collected: over a network with high latency,
    evaluation and the next training are sent together.

    Raises:
        RunStopped: no attempt of a round received enough valid uploads.
    """
    unfinished: _Evaluation | None = None
    if evaluate_before:
        unfinished = _evaluate(plan, backend, store, before, RoundStats(0, datetime.now(UTC)))
    for index in range(first, plan.rounds):
        cohort = _invite(plan, backend, store, before, Round(index, plan.seed))
        if unfinished is not None:
            yield unfinished.finish(progress)
        unfinished = _train_and_merge(plan, backend, store, before, cohort, progress)
        before = unfinished.after
    if unfinished is not None:
        yield unfinished.finish(progress)


def one_round(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, index: int, progress: Progress
) -> tuple[RunState, RoundRow]:
    """Runs one round; returns the server's state after it, and the row of the round log.

    Raises:
        RunStopped: no attempt received enough valid uploads.
    """
    return next(run_rounds(replace(plan, rounds=index + 1), backend, store, before, index, progress))


@dataclass(frozen=True)
class _Cohort:
    """The clients of an attempt, whose training requests are sent. `base_updates` is the log before their delivery."""

    rnd: Round
    started: datetime
    chosen: Sequence[ClientInfo]
    validator: UploadValidator
    base_updates: BaseUpdateLog
    bytes_down: Counter[str]
    replies: Iterator[Reply | Failed]


@dataclass(frozen=True)
class _Evaluation:
    """A round that is complete except for its clients' scores, if it has any."""

    after: RunState
    stats: RoundStats
    plan: Plan
    scores: Iterator[tuple[ClientInfo, Statistics | None]] | None = None

    def finish(self, progress: Progress) -> tuple[RunState, RoundRow]:
        """Collects the scores; returns the server's state after the round, and the row."""
        if self.scores is not None:
            with self.stats.timed("evaluate"):
                scores = ((client.id, found) for client, found in self.scores if found is not None)
                self.stats.clients = summary(scores, self.plan.metrics, self.plan.lower_is_better)
        row = self.stats.row()
        progress.round_ended(row)
        return self.after, row


def _invite(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, rnd: Round, left_out: Collection[str] = ()
) -> _Cohort:
    """Chooses the cohort, excluding `left_out` unless no clients remain, and sends the training requests."""
    started, everybody = datetime.now(UTC), backend.clients()
    chosen = choose([client for client in everybody if client.id not in left_out] or everybody, plan.sampling.fraction, rnd)
    last = {one.id: Acknowledged(*before.acknowledged[one.id]) for one in chosen if one.id in before.acknowledged}
    rnd = replace(rnd, registered=len(everybody), expected_cohort=len(chosen), acknowledged=last)
    sent = {client: plan.method.send(before.server, client, rnd) for client in chosen}
    base_updates = before.base_updates.known(backend.held())
    pending = pending_base_updates(plan.spec, store, base_updates, chosen)
    validator = UploadValidator(plan.method, plan.spec, rnd, sent, plan.sampling.max_norm, plan.sampling.max_examples)
    bytes_down = _sizes(sent) + _sizes(pending)
    return _Cohort(rnd, started, chosen, validator, base_updates, bytes_down, backend.train_clients(rnd, sent, pending))


def _train_and_merge(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, cohort: _Cohort, progress: Progress
) -> _Evaluation:
    """Merges the first attempt with enough valid uploads, and starts the evaluation of the result."""
    index = cohort.rnd.index
    stats = RoundStats(index + 1, cohort.started)
    while True:
        progress.round_started(cohort.rnd, cohort.chosen)
        stats.begin([one.id for one in cohort.chosen], cohort.bytes_down)
        gathered = _gather(plan, before.server, cohort, stats, progress)
        merged = _merge(plan, before.server, cohort, gathered, stats, progress)
        before = replace(before, base_updates=cohort.base_updates.delivered(gathered.answered))
        if merged is not None:
            break
        if cohort.rnd.attempt + 1 == plan.sampling.attempts:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in stats.rejected.items())
            cause = f"; {text}" if (text := stats.divergence(before.largest)) else ""
            raise RunStopped(
                f"round {index + 1}: no attempt ({plan.sampling.attempts} made) received {plan.sampling.min_replies} valid "
                f"uploads (sampling.min_replies): {reasons}{cause}; the previous rounds are complete"
            )
        again = Round(index, plan.seed, cohort.rnd.attempt + 1)
        cohort = _invite(plan, backend, store, before, again, stats.left_out)
    stats.diverged, stats.notes = stats.divergence(before.largest), merged.notes
    acknowledged = {**before.acknowledged, **{one: (index, share) for one, share in stats.shares().items()}}
    after = RunState(merged.server, before.base_updates, stats.largest, acknowledged)
    if merged.base_update is not None:
        store.save_base_update(index, merged.base_update)
        backend.merge_into_base(merged.base_update)
        after = replace(after, base_updates=after.base_updates.added(index))
    if (index + 1) % plan.evaluate.every and index + 1 != plan.rounds:
        return _Evaluation(after, stats, plan)
    return _evaluate(plan, backend, store, after, stats)


@dataclass
class _Gathered:
    """What the server keeps of a cohort's replies; `failure` is the numerical error that ended the collection, if any."""

    answered: list[str] = field(default_factory=list)
    collected: Any = None
    updates: ClientUpdates = field(default_factory=ClientUpdates)
    failure: str = ""


def _gather(plan: Plan, server: Any, cohort: _Cohort, stats: RoundStats, progress: Progress) -> _Gathered:
    """Receives, validates and collects the replies: one at a time, or all at the end if the cohort is checked."""
    found, sizes, spool = _Gathered(), list[Size](), Spool(plan.spool)
    spool.clear()  # of an attempt that was killed
    while True:
        with stats.timed("train"):
            answer = next(cohort.replies, None)
        if answer is None:
            break
        if isinstance(answer, Reply):
            found.answered.append(answer.client.id)
            stats.bytes_up[answer.client.id] += encoded_size(answer.upload.flat())
        with stats.timed("merge"):
            before = answer.reason if isinstance(answer, Failed) else cohort.validator.accept(answer)
        progress.answered(answer.client, before if isinstance(before, str) else None)
        if isinstance(answer, Failed) or isinstance(before, str):
            stats.rejected[answer.client.id] = str(before)
            continue
        reply = replace(answer, weight=1.0) if plan.uniform_weights else answer
        with stats.timed("merge"):
            norm = difference_norm(reply.upload, before.template)
            if plan.check_cohort:
                update = plan.method.update(before.known, reply.upload)
                spectral = None if update is None else spectral_norm(update)
                sizes.append(Size(reply.client.id, reply.weight, norm, spectral))
                spool.add(reply)
            else:
                _collect(plan, server, found, reply, norm, before.known, stats)
    if plan.check_cohort:
        with stats.timed("merge"):
            _collect_checked(plan, server, cohort, found, spool, sizes, stats, progress)
            spool.clear()
    return found


def _collect_checked(
    plan: Plan,
    server: Any,
    cohort: _Cohort,
    found: _Gathered,
    spool: Spool,
    sizes: Sequence[Size],
    stats: RoundStats,
    progress: Progress,
) -> None:
    """Collects the spooled replies after their comparison with each other."""
    check, norms = check_cohort(sizes), {size.client: size.norm for size in sizes}
    for reply in spool:
        client = reply.client.id
        if client in check.rejected:
            stats.rejected[client] = check.rejected[client]
            progress.answered(reply.client, check.rejected[client])
            continue
        before, factor = cohort.validator.expected(reply.client), check.clipped.get(client, 1.0)
        if factor < 1:
            stats.clipped[client] = factor
            reply = replace(reply, upload=clipped(reply.upload, before.template, factor))
        reply = replace(reply, weight=check.weights[client])
        _collect(plan, server, found, reply, factor * norms[client], before.known, stats)


def _collect(
    plan: Plan, server: Any, found: _Gathered, reply: Reply, norm: float, known: ClientRound, stats: RoundStats
) -> None:
    """Collects one accepted reply; after a numerical error, nothing more is collected."""
    if stats.largest is None or norm > stats.largest.norm:
        stats.largest = Largest(reply.client.id, norm, known.round.index + 1)
    stats.accepted[reply.client.id] = Training(reply.weight, reply.loss, reply.steps)
    if found.failure:
        return
    try:
        found.collected = collect(plan.method, server, found.collected, reply, known)
        found.updates = found.updates.add(reply.weight, plan.method.update(known, reply.upload))
    except NumericalError as error:
        found.failure = _kind(error)


def _merge(
    plan: Plan, server: Any, cohort: _Cohort, gathered: _Gathered, stats: RoundStats, progress: Progress
) -> Merged[Any] | None:
    """Merge of what one cohort sent; None if it sent too little or the result is not finite.

    If the result is not finite, the client of the largest upload is named, and left out of further attempts.
    """
    failure = gathered.failure
    if len(stats.accepted) < plan.sampling.min_replies and not failure:
        return None
    with stats.timed("merge"):
        try:
            merged = None if failure else plan.method.merge(server, gathered.collected, cohort.rnd)
        except NumericalError as error:
            merged, failure = None, _kind(error)
        if merged is not None and is_finite((merged.server, merged.base_update)):
            if gathered.updates.mean is not None:
                before, after = (global_adapter(plan.method, plan.spec, x, cohort.rnd) for x in (server, merged.server))
                stats.aggregation_error = gathered.updates.error(before, after, merged.base_update)
            return merged
    if stats.largest is not None:
        client = next(client for client in cohort.chosen if client.id == stats.largest.client)
        stats.rejected[client.id] = (
            f"merging ended in {failure or NOT_FINITE}, "
            f"and its upload has the largest change: norm {stats.largest.norm:.4g}"
        )
        stats.left_out.add(client.id)
        progress.answered(client, stats.rejected[client.id])
    return None


def _kind(error: Exception) -> str:
    return type(error).__name__.lstrip("_")


def pending_base_updates(
    spec: AdapterSpec, store: BaseUpdateStore, base_updates: BaseUpdateLog, clients: Sequence[ClientInfo]
) -> dict[ClientInfo, Tensors]:
    """Pending base updates of each client that has any; clients with the same pending base updates share the tensors."""
    made: dict[tuple[int, ...], Tensors] = {}
    for pending in {base_updates.pending(client.id) for client in clients} - {()}:
        made[pending] = pending_tensors({index: store.base_update(index) for index in pending}, spec)
    return {client: made[pending] for client in clients if (pending := base_updates.pending(client.id))}


def _evaluate(plan: Plan, backend: Backend, store: BaseUpdateStore, after: RunState, stats: RoundStats) -> _Evaluation:
    """Evaluates the adapters of the next round: on the server immediately, on clients when their scores are collected.

    Base updates sent for the evaluation are counted in this round, and not sent again in the next.
    """
    with stats.timed("evaluate"):
        rnd, base_updates = Round(stats.round, plan.seed), after.base_updates.known(backend.held())
        scores = None
        if plan.evaluator is not None:
            stats.global_metrics = plan.evaluator(global_adapter(plan.method, plan.spec, after.server, rnd))
        everybody = () if plan.evaluate.clients == "none" else sorted(backend.clients(), key=lambda client: client.id)
        evaluated = [one for one in everybody if plan.evaluate.clients == "all" or one.id in stats.accepted]
        if evaluated:
            sent = {client: plan.method.send(after.server, client, rnd) for client in evaluated}
            pending = pending_base_updates(plan.spec, store, base_updates, evaluated)
            scores = backend.evaluate(rnd, sent, pending)
            stats.bytes_eval = _sizes(sent).total()
            stats.bytes_down += _sizes(pending)
            base_updates = base_updates.delivered(client.id for client in evaluated)
    return _Evaluation(replace(after, base_updates=base_updates), stats, plan, scores)


def _sizes(sent: Mapping[ClientInfo, Tensors]) -> Counter[str]:
    return Counter({client.id: encoded_size(tensors) for client, tensors in sent.items()})
