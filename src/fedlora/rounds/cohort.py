"""The cohort of one attempt at a round: the chosen clients, their training requests, and their replies."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from fedlora.messages import Acknowledged, ClientInfo, Reply, Round
from fedlora.rounds.backend import Backend
from fedlora.rounds.base_updates import BaseUpdateStore
from fedlora.rounds.downloads import Downloads, downloads
from fedlora.rounds.plan import Plan, RunState
from fedlora.rounds.sample import choose
from fedlora.rounds.validator import Failed, UploadValidator


@dataclass(frozen=True)
class Cohort:
    """The clients of an attempt, whose training requests are sent, and their replies as they arrive."""

    rnd: Round
    started: datetime
    chosen: Sequence[ClientInfo]
    downloads: Downloads
    validator: UploadValidator
    replies: Iterator[Reply | Failed]


def invite(
    plan: Plan, backend: Backend, store: BaseUpdateStore, state: RunState, rnd: Round, left_out: Collection[str] = ()
) -> Cohort:
    """Chooses the cohort, excluding `left_out` unless no clients remain, and sends the training requests."""
    started, everybody = datetime.now(UTC), backend.clients()
    if plan.client_level is None:
        able = [client for client in everybody if client.id not in left_out] or everybody
        chosen = choose(able, plan.sampling.fraction, rnd)
        expected = len(chosen)
    else:
        chosen = list(plan.client_level.choose(everybody, rnd))
        expected = round(plan.client_level.expected_cohort)
    last = {one.id: Acknowledged(*state.acknowledged[one.id]) for one in chosen if one.id in state.acknowledged}
    rnd = replace(rnd, registered=len(everybody), expected_cohort=expected, acknowledged=last)
    made = downloads(plan, backend, store, state, chosen, rnd)
    validator = UploadValidator(plan.method, plan.spec, rnd, made.sent, plan.sampling.max_norm, plan.sampling.max_examples)
    return Cohort(rnd, started, chosen, made, validator, backend.train_clients(rnd, made.sent, made.pending))
