"""Round loop: sample clients, send, collect, merge, evaluate, record. Independent of the method and of the backend."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fedlora.errors import RunStopped
from fedlora.messages import Merged, Round
from fedlora.method import global_adapter
from fedlora.rounds.backend import Backend
from fedlora.rounds.base_updates import BaseUpdateStore
from fedlora.rounds.cohort import Cohort, invite
from fedlora.rounds.downloads import sizes
from fedlora.rounds.evaluation import collect_scores, start_evaluation
from fedlora.rounds.finite import NOT_FINITE, NumericalError, error_name, is_finite
from fedlora.rounds.gather import Gathered, gather
from fedlora.rounds.plan import Plan, RunState
from fedlora.rounds.progress import Progress
from fedlora.rounds.round_stats import RoundStats
from fedlora.rounds.row import PrivacyRow, RoundRow


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

    With `evaluate_before`, which requires `first` to be 0, the first row is that of the model before training.

    Raises:
        RunStopped: no attempt of a round received enough valid uploads.
    """
    state, cohort = before, None
    if evaluate_before:
        state, cohort, row = _evaluate(plan, backend, store, state, RoundStats(0, datetime.now(UTC)), progress)
        yield state, row
    for index in range(first, plan.rounds):
        cohort = cohort or invite(plan, backend, store, state, Round(index, plan.seed))
        stats = RoundStats(index + 1, cohort.started, hides_training=plan.hides_training)
        state = _train_and_merge(plan, backend, store, state, cohort, stats, progress)
        state, cohort, row = _evaluate(plan, backend, store, state, stats, progress)
        yield state, row


def one_round(
    plan: Plan, backend: Backend, store: BaseUpdateStore, before: RunState, index: int, progress: Progress
) -> tuple[RunState, RoundRow]:
    """Runs one round; returns the server's state after it, and the row of the round log.

    Raises:
        RunStopped: no attempt received enough valid uploads.
    """
    return next(run_rounds(replace(plan, rounds=index + 1), backend, store, before, index, progress))


def _train_and_merge(
    plan: Plan,
    backend: Backend,
    store: BaseUpdateStore,
    state: RunState,
    cohort: Cohort,
    stats: RoundStats,
    progress: Progress,
) -> RunState:
    """The state after the first attempt with enough valid uploads, whose cohort is invited; later ones invite others."""
    index = cohort.rnd.index
    while True:
        progress.round_started(cohort.rnd, cohort.chosen)
        down = cohort.downloads
        stats.begin([one.id for one in cohort.chosen], sizes(down.sent) + sizes(down.pending))
        with stats.timed("merge"):
            gathered = gather(plan, state, cohort, stats, progress)
            merged = _merge(plan, state.server, cohort, gathered, stats, progress)
        state = replace(state, base_updates=down.base_updates.delivered(gathered.answered))
        if merged is not None:
            break
        if plan.client_level is not None:
            raise RunStopped(
                f"round {stats.round}: merging the noised mean ended in {gathered.failure or NOT_FINITE}; the noise may be "
                "too large for the method: lower privacy.clip; the previous rounds are complete"
            )
        if cohort.rnd.attempt + 1 == plan.sampling.attempts:
            raise RunStopped(_too_few(plan, state, stats))
        again = Round(index, plan.seed, cohort.rnd.attempt + 1)
        cohort = invite(plan, backend, store, state, again, stats.left_out)
    if (records := plan.record_level) is not None:
        stats.epsilons = {one.id: records.epsilon(one, stats.round) for one in backend.clients()}
        stats.privacy = PrivacyRow(max(stats.epsilons.values(), default=0.0), records.delta, records.clip)
    stats.diverged, stats.notes = stats.divergence(state.largest), merged.notes
    shares = stats.shares()
    if plan.client_level is not None:
        shares = dict.fromkeys(shares, 1 / plan.client_level.expected_cohort)
    acknowledged = {**state.acknowledged, **{one: (index, share) for one, share in shares.items()}}
    clip = None if gathered.released is None else gathered.released.next_clip
    after = RunState(merged.server, state.base_updates, stats.largest, acknowledged, clip)
    if merged.base_update is None:
        return after
    store.save_base_update(index, merged.base_update)
    backend.merge_into_base(merged.base_update)
    return replace(after, base_updates=after.base_updates.added(index))


def _merge(
    plan: Plan, server: Any, cohort: Cohort, gathered: Gathered, stats: RoundStats, progress: Progress
) -> Merged[Any] | None:
    """Merge of what one cohort sent; None if it sent too little or the result is not finite.

    If the result is not finite, the client of the largest upload is named, and left out of further attempts.
    """
    too_few = len(stats.accepted) < plan.sampling.min_replies and plan.client_level is None
    if too_few and not gathered.failure:
        return None
    try:
        merged = None if gathered.failure else plan.method.merge(server, gathered.collected, cohort.rnd)
    except NumericalError as error:
        merged, gathered.failure = None, error_name(error)
    if merged is not None and is_finite((merged.server, merged.base_update)):
        if gathered.updates.mean is not None:
            before, after = (global_adapter(plan.method, plan.spec, x, cohort.rnd) for x in (server, merged.server))
            stats.aggregation_error = gathered.updates.error(before, after, merged.base_update)
        return merged
    if stats.largest is not None:
        client = next(client for client in cohort.chosen if client.id == stats.largest.client)
        stats.rejected[client.id] = (
            f"merging ended in {gathered.failure or NOT_FINITE}, "
            f"and its upload has the largest change: norm {stats.largest.norm:.4g}"
        )
        stats.left_out.add(client.id)
        progress.answered(client, stats.rejected[client.id])
    return None


def _too_few(plan: Plan, state: RunState, stats: RoundStats) -> str:
    """Why the run stops."""
    reasons = "; ".join(f"{client}: {reason}" for client, reason in stats.rejected.items())
    cause = f"; {text}" if (text := stats.divergence(state.largest)) else ""
    return (
        f"round {stats.round}: no attempt ({plan.sampling.attempts} made) received {plan.sampling.min_replies} valid "
        f"uploads (sampling.min_replies): {reasons}{cause}; the previous rounds are complete"
    )


def _evaluate(
    plan: Plan, backend: Backend, store: BaseUpdateStore, state: RunState, stats: RoundStats, progress: Progress
) -> tuple[RunState, Cohort | None, RoundRow]:
    """Evaluates the state, and completes the row; returns the cohort of the next round, if there is one, too.

    It is invited before the clients' scores are awaited, unless these may end the run: nodes poll, and find both requests
    in one exchange. With client-level privacy it is invited after the round is committed: a round that is repeated after a
    crash, with other noise, must not have been sent before.
    """
    state, scores = start_evaluation(plan, backend, store, state, stats)
    more = stats.round < plan.rounds and plan.evaluate.stop_after is None and plan.client_level is None
    cohort = invite(plan, backend, store, state, Round(stats.round, plan.seed)) if more else None
    if scores is not None:
        collect_scores(plan, scores, stats)
    row = stats.row()
    progress.round_ended(row)
    return state, cohort, row
