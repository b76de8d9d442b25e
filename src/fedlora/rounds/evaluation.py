"""Evaluation of the model between two rounds."""

from collections.abc import Iterator
from dataclasses import replace

from fedlora.messages import Round, Statistics
from fedlora.method import global_adapter
from fedlora.rounds.backend import Backend, Scores
from fedlora.rounds.base_updates import BaseUpdateStore
from fedlora.rounds.downloads import downloads, sizes
from fedlora.rounds.plan import Plan, RunState
from fedlora.rounds.round_stats import RoundStats
from fedlora.rounds.score_summary import summary


def start_evaluation(
    plan: Plan, backend: Backend, store: BaseUpdateStore, state: RunState, stats: RoundStats
) -> tuple[RunState, Scores | None]:
    """Evaluates the adapters of the next round on the server, and sends the clients' evaluation requests.

    Returns the state, and the clients' scores as they arrive; None if no client is evaluated. Base updates sent for the
    evaluation are counted in this round, and not sent again in the next.
    """
    if not plan.evaluates_after(stats.round):
        return state, None
    with stats.timed("evaluate"):
        rnd = Round(stats.round, plan.seed)
        if plan.evaluator is not None:
            adapter = global_adapter(plan.method, plan.spec, state.server, rnd)
            stats.global_metrics = plan.evaluator(adapter, stats.round)
        everybody = () if plan.evaluate.clients == "none" else sorted(backend.clients(), key=lambda client: client.id)
        evaluated = [one for one in everybody if plan.evaluate.clients == "all" or one.id in stats.accepted]
        if not evaluated:
            return state, None
        made = downloads(plan, backend, store, state, evaluated, rnd)
        scores = backend.evaluate(rnd, made.sent, made.pending)
        stats.bytes_eval = sizes(made.sent).total()
        stats.bytes_down += sizes(made.pending)
        delivered = made.base_updates.delivered(client.id for client in evaluated)
        return replace(state, base_updates=delivered), scores


def collect_scores(plan: Plan, scores: Scores, stats: RoundStats) -> None:
    """Waits for the clients' scores, and adds their summary and their numbers of examples to the round's statistics."""
    held_out: dict[str, int] = {}

    def found() -> Iterator[tuple[str, Statistics]]:
        for client, statistics in scores:
            if statistics is not None:
                held_out[client.id] = statistics.examples
                yield client.id, statistics

    with stats.timed("evaluate"):
        stats.clients = summary(found(), plan.metrics, plan.lower_is_better)
        stats.held_out = held_out
