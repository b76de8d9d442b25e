"""The round loop: choose, send, gather, merge, judge, record. It knows neither methods nor machines."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.config import Evaluate, Sampling
from fedlora.errors import RunStopped
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Replies, Reply, Round
from fedlora.method import AnyMethod
from fedlora.rounds.codec import encode
from fedlora.rounds.folds import Folds, FoldStore, catch_up
from fedlora.rounds.gate import Failed, Gate
from fedlora.rounds.report import summary
from fedlora.rounds.sample import choose
from fedlora.train.evaluate import Score


@runtime_checkable
class Exchange(Protocol):
    """Where the clients are: in this process, or on other machines."""

    def clients(self) -> Sequence[ClientInfo]:
        """All that are registered."""

    def held(self) -> Mapping[str, Sequence[int]]:
        """The indices of the rounds whose folds a client holds, of those clients that have told."""

    def fold(self, change: Mapping[str, LowRank]) -> None:
        """Changes the base on which the next turns and judgements happen here, if it happens here."""

    def turn(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], missed: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """Has the clients work on what they were sent; their answers, in the order of `sent`.

        `missed` holds the changes of the base (see `folds.catch_up`) that a client must apply first.
        """

    def judge(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], missed: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Score | None]]:
        """Has the clients judge what they would use in round `rnd`; None of those that have no held-out examples."""


@runtime_checkable
class GlobalJudge(Protocol):
    """Who has the global test set."""

    def __call__(self, adapter: Adapter) -> Score:
        """The adapter's score on it."""


@runtime_checkable
class Watcher(Protocol):
    """Who shows the progress."""

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """The cohort is known."""

    def answered(self, who: ClientInfo, refused: str | None) -> None:
        """One client's answer came; `refused` is the reason if it is not used."""

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """The round's row, before it is written."""


@dataclass(frozen=True)
class Plan:
    """What stays the same over all rounds of a run. `judge` is None if there is no global model or no global test set."""

    method: AnyMethod
    spec: AdapterSpec
    seed: int
    sampling: Sampling
    evaluate: Evaluate
    rounds: int
    uniform_weights: bool = False
    judge: GlobalJudge | None = None


@dataclass(frozen=True)
class Progress:
    """What the server knows between rounds: the method's state, and the changes of the base."""

    server: Any
    folds: Folds = field(default_factory=Folds)


@dataclass
class _Tally:
    """What is counted while a round goes on, over all its attempts."""

    chosen: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    losses: list[tuple[float, float]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "merge": 0.0, "evaluate": 0.0})


def one_round(
    plan: Plan, exchange: Exchange, store: FoldStore, before: Progress, index: int, watch: Watcher
) -> tuple[Progress, dict[str, Any]]:
    """What the server knows after the round, and the row of the round log.

    Raises:
        RunStopped: in none of the attempts came enough replies that could be accepted.
    """
    tally = _Tally()
    for attempt in range(plan.sampling.attempts):
        rnd = Round(index, plan.seed, attempt)
        merged, folds = _attempt(plan, exchange, store, before, rnd, tally, watch)
        if merged is not None:
            break
        before = Progress(before.server, folds)
    else:
        reasons = "; ".join(f"{who}: {reason}" for who, reason in tally.refused.items())
        raise RunStopped(
            f"round {index + 1}: in {plan.sampling.attempts} attempts, never were {plan.sampling.min_replies} uploads "
            f"(sampling.min_replies) accepted ({reasons}); the rounds before are complete"
        )
    row: dict[str, Any] = {
        "round": index + 1,
        "attempts": attempt + 1,
        "chosen": tally.chosen,
        "accepted": tally.accepted,
        "refused": tally.refused,
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "train_loss": _weighted_mean(tally.losses),
        **merged.notes,
    }
    after = Progress(merged.server, folds)
    if merged.fold is not None:
        store.save_fold(index, merged.fold)
        exchange.fold(merged.fold)
        after = Progress(merged.server, folds.added(index))
    started = time.perf_counter()
    if (index + 1) % plan.evaluate.every == 0 or index + 1 == plan.rounds:
        found, folds, bytes_folds = _judge(plan, exchange, store, after, index + 1, tally.accepted)
        row, after = row | found, Progress(after.server, folds)
        row["bytes_down"] += bytes_folds
    tally.seconds["evaluate"] = time.perf_counter() - started
    row["seconds"] = {phase: round(seconds, 4) for phase, seconds in tally.seconds.items()}
    watch.round_ended(row)
    return after, row


def _attempt(
    plan: Plan, exchange: Exchange, store: FoldStore, before: Progress, rnd: Round, tally: _Tally, watch: Watcher
) -> tuple[Merged[Any] | None, Folds]:
    """The merge of one cohort, None if too few of its replies were accepted; and who now has which folds."""
    chosen = choose(exchange.clients(), plan.sampling.fraction, rnd)
    watch.round_started(rnd, chosen)
    sent = {who: plan.method.send(before.server, who, rnd) for who in chosen}
    folds = before.folds.known(exchange.held())
    missed = _missed(plan, store, folds, chosen)
    tally.bytes_down += _encoded_bytes([*sent.values(), *missed.values()])
    tally.chosen, tally.accepted, tally.losses = [who.id for who in chosen], [], []
    answered: list[str] = []
    gate = Gate(plan.method, plan.spec, rnd, sent, plan.sampling.max_norm)

    def accepted() -> Iterator[Reply]:
        answers = exchange.turn(rnd, sent, missed)
        while True:
            started = time.perf_counter()
            answer = next(answers, None)
            tally.seconds["train"] += time.perf_counter() - started
            if answer is None:
                return
            refused = answer.reason if isinstance(answer, Failed) else gate.refusal(answer)
            watch.answered(answer.client, refused)
            if isinstance(answer, Reply):
                answered.append(answer.client.id)
                tally.bytes_up += len(encode(answer.upload))
            if refused is not None or isinstance(answer, Failed):
                tally.refused[answer.client.id] = str(refused)
                continue
            weight = 1.0 if plan.uniform_weights else answer.weight
            tally.accepted.append(answer.client.id)
            tally.losses.append((weight, answer.notes.get("loss", float("nan"))))
            yield Reply(answer.client, answer.round, answer.upload, weight, answer.notes)

    replies = accepted()
    first = next(replies, None)
    if first is None:
        return None, folds.delivered(answered)
    trained, started = tally.seconds["train"], time.perf_counter()
    merged: Merged[Any] = plan.method.merge(before.server, Replies(chain([first], replies)), rnd)
    tally.seconds["merge"] += time.perf_counter() - started - (tally.seconds["train"] - trained)
    return (merged if len(tally.accepted) >= plan.sampling.min_replies else None), folds.delivered(answered)


def _missed(plan: Plan, store: FoldStore, folds: Folds, clients: Sequence[ClientInfo]) -> dict[ClientInfo, Tensors]:
    """What each client that lacks some folds must be sent; clients that lack the same ones share the tensors."""
    made: dict[tuple[int, ...], Tensors] = {}
    for lacking in {folds.missed(who.id) for who in clients} - {()}:
        made[lacking] = catch_up({index: store.fold(index) for index in lacking}, plan.spec)
    return {who: made[lacking] for who in clients if (lacking := folds.missed(who.id))}


def _encoded_bytes(payloads: Sequence[Tensors]) -> int:
    """The encoded size of all payloads together; one that goes to several clients is encoded once to measure it."""
    sizes: dict[tuple[tuple[str, int], ...], int] = {}
    total = 0
    for payload in payloads:
        key = tuple((name, id(tensor)) for name, tensor in payload.items())
        if key not in sizes:
            sizes[key] = len(encode(payload))
        total += sizes[key]
    return total


def _judge(
    plan: Plan, exchange: Exchange, store: FoldStore, after: Progress, index: int, accepted: Sequence[str]
) -> tuple[dict[str, Any], Folds, int]:
    """Scores of what would be used in the round of this index, and the bytes sent for them; who now has which folds, and
    the bytes of those that had to be sent, which are not sent again for the round."""
    rnd, folds = Round(index, plan.seed), after.folds.known(exchange.held())
    found: dict[str, Any] = {}
    bytes_folds = 0
    if plan.judge is not None:
        anybody = ClientInfo("", plan.method.rank, 1)
        mine = plan.method.init_client(plan.spec, anybody, plan.seed)
        score = plan.judge(plan.method.view(mine, plan.method.send(after.server, anybody, rnd), anybody))
        found["global"] = {**score.metrics, "examples": score.examples}
    if plan.evaluate.clients != "none":
        everybody = sorted(exchange.clients(), key=lambda who: who.id)
        judges = [who for who in everybody if plan.evaluate.clients == "all" or who.id in set(accepted)]
        sent = {who: plan.method.send(after.server, who, rnd) for who in judges}
        missed = _missed(plan, store, folds, judges)
        scores = {who.id: score for who, score in exchange.judge(rnd, sent, missed)}
        found["clients"] = summary({who: score for who, score in scores.items() if score is not None})
        found["bytes_judge"] = _encoded_bytes([*sent.values()])
        folds, bytes_folds = folds.delivered(scores), _encoded_bytes([*missed.values()])
    return found, folds, bytes_folds


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Of the finite values: one client may report anything."""
    finite = [(weight, value) for weight, value in pairs if math.isfinite(value)]
    return sum(weight * value for weight, value in finite) / sum(weight for weight, _ in finite) if finite else math.nan
