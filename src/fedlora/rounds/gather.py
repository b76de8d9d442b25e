"""Gathering of one cohort's replies: received, validated, compared with each other if the plan says so, and collected."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.messages import Reply
from fedlora.method import ClientRound
from fedlora.rounds.aggregation_error import ClientUpdates
from fedlora.rounds.client_privacy import ClientPrivacy, ClippedSum, NoisedMean
from fedlora.rounds.codec import encoded_size
from fedlora.rounds.cohort import Cohort
from fedlora.rounds.cohort_checks import Size, check_cohort, clipped, difference_norm, spectral_norm
from fedlora.rounds.collect import collect
from fedlora.rounds.finite import Largest, NumericalError, error_name
from fedlora.rounds.frame import common_frame
from fedlora.rounds.plan import Plan, RunState
from fedlora.rounds.progress import Progress
from fedlora.rounds.round_stats import RoundStats, Training
from fedlora.rounds.row import PrivacyRow
from fedlora.rounds.spool import Spool
from fedlora.rounds.validator import Failed, template_upload


@dataclass
class Gathered:
    """What the server keeps of a cohort's replies.

    `answered` has the clients that sent an upload, rejected ones included; `failure` the numerical error that ended the
    collection, if any. `released` is the noised mean of client-level privacy, which is then all that was collected.
    """

    answered: list[str] = field(default_factory=list)
    collected: Any = None
    updates: ClientUpdates = field(default_factory=ClientUpdates)
    failure: str = ""
    released: NoisedMean | None = None


@dataclass(frozen=True)
class _Accepted:
    """A valid reply, what was known of its client's round before, and the norm of its change."""

    reply: Reply
    known: ClientRound
    norm: float


def gather(plan: Plan, state: RunState, cohort: Cohort, stats: RoundStats, progress: Progress) -> Gathered:
    """Collects the cohort's valid replies: each on its arrival, or all at the end if the cohort is checked.

    After a numerical error nothing more is collected.
    """
    gathered = Gathered()
    accepted = _received(plan, cohort, gathered, stats, progress)
    if plan.client_level is not None:
        return _noised(plan, plan.client_level, state, cohort, gathered, accepted, stats)
    for one in _compared(plan, cohort, accepted, stats, progress) if plan.check_cohort else accepted:
        client, reply = one.reply.client.id, one.reply
        if stats.largest is None or one.norm > stats.largest.norm:
            stats.largest = Largest(client, one.norm, cohort.rnd.index + 1)
        hidden = plan.hides_training
        stats.accepted[client] = Training(reply.weight) if hidden else Training(reply.weight, reply.loss, reply.steps)
        if gathered.failure:
            continue
        try:
            gathered.collected = collect(plan.method, state.server, gathered.collected, reply, one.known)
            gathered.updates = gathered.updates.add(reply.weight, plan.method.update(one.known, reply.upload))
        except NumericalError as error:
            gathered.failure = error_name(error)
    return gathered


def _noised(
    plan: Plan,
    privacy: ClientPrivacy,
    state: RunState,
    cohort: Cohort,
    gathered: Gathered,
    accepted: Iterator[_Accepted],
    stats: RoundStats,
) -> Gathered:
    """Collects the noised mean of the valid replies, all with the same weight."""
    frame = common_frame(plan.method, plan.spec, state.server, cohort.rnd)
    clipped = ClippedSum(frame, privacy.clip if state.clip is None else state.clip)
    for one in accepted:
        clipped.add(plan.method.expand(one.known, one.reply.upload))
        stats.accepted[one.reply.client.id] = Training(1.0)
    released = privacy.release(clipped, cohort.rnd)
    gathered.released, gathered.collected, gathered.updates = released, released.mean, ClientUpdates(None)
    spent = privacy.epsilon(cohort.rnd.index + 1)
    stats.privacy = PrivacyRow(
        spent, privacy.delta, released.clip, privacy.noise_multiplier, released.share, privacy.clients
    )
    return gathered


def _received(plan: Plan, cohort: Cohort, gathered: Gathered, stats: RoundStats, progress: Progress) -> Iterator[_Accepted]:
    """Waits for the replies, and yields the valid ones; the others are rejected by name."""
    while True:
        with stats.timed("train"):
            answer = next(cohort.replies, None)
        if answer is None:
            return
        client = answer.client
        if isinstance(answer, Reply):
            gathered.answered.append(client.id)
            stats.bytes_up[client.id] += encoded_size(answer.upload.flat())
        expected = answer.reason if isinstance(answer, Failed) else cohort.validator.accept(answer)
        progress.answered(client, expected if isinstance(expected, str) else None)
        if isinstance(answer, Failed) or isinstance(expected, str):
            stats.rejected[client.id] = str(expected)
            continue
        reply = replace(answer, weight=1.0) if plan.uniform_weights else answer
        yield _Accepted(reply, expected.known, difference_norm(reply.upload, expected.template))


def _compared(
    plan: Plan, cohort: Cohort, accepted: Iterator[_Accepted], stats: RoundStats, progress: Progress
) -> Iterator[_Accepted]:
    """Keeps the replies until all are there; then yields those that stand the comparison, clipped and weighted by it."""
    sizes, spool = list[Size](), Spool(plan.spool)
    spool.clear()  # of an attempt that was killed
    for one in accepted:
        # It is computed again for the collection: that takes less time than the spectral norm, keeping it more memory than
        # the upload itself.
        update = plan.method.update(one.known, one.reply.upload)
        spectral = None if update is None else spectral_norm(update)
        sizes.append(Size(one.reply.client.id, one.reply.weight, one.norm, spectral))
        spool.add(one.reply)
    check, norms = check_cohort(sizes), {size.client: size.norm for size in sizes}
    for reply in spool:
        client = reply.client.id
        if client in check.rejected:
            stats.rejected[client] = check.rejected[client]
            progress.answered(reply.client, check.rejected[client])
            continue
        known, factor = cohort.validator.known(reply.client), check.clipped.get(client, 1.0)
        if factor < 1:
            stats.clipped[client] = factor
            reply = replace(reply, upload=clipped(reply.upload, template_upload(plan.method, known), factor))
        yield _Accepted(replace(reply, weight=check.weights[client]), known, factor * norms[client])
    spool.clear()
