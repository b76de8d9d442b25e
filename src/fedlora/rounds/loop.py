"""The round loop: choose, send, gather, merge, judge, record. It knows neither methods nor machines."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.config import Evaluate, Sampling
from fedlora.errors import RunStopped
from fedlora.messages import ClientInfo, Merged, Replies, Reply, Round
from fedlora.method import AnyMethod
from fedlora.rounds.codec import encode
from fedlora.rounds.gate import Failed, Gate
from fedlora.rounds.report import summary
from fedlora.rounds.sample import choose
from fedlora.train.evaluate import Score


@runtime_checkable
class Exchange(Protocol):
    """Where the clients are: in this process, or on other machines."""

    def clients(self) -> Sequence[ClientInfo]:
        """All that are registered."""

    def turn(self, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> Iterator[Reply | Failed]:
        """Has the clients work on what they were sent; their answers, in the order of `sent`."""

    def judge(self, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> Iterator[tuple[ClientInfo, Score]]:
        """Has the clients judge what they would use in round `rnd`, on their held-out examples."""


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


def one_round(plan: Plan, exchange: Exchange, server: Any, index: int, watch: Watcher) -> tuple[Any, dict[str, Any]]:
    """The server's next state, and the row of the round log.

    Raises:
        RunStopped: in none of the attempts came enough replies that could be accepted.
    """
    tally = _Tally()
    for attempt in range(plan.sampling.attempts):
        rnd = Round(index, plan.seed, attempt)
        merged = _attempt(plan, exchange, server, rnd, tally, watch)
        if merged is not None:
            break
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
    started = time.perf_counter()
    if (index + 1) % plan.evaluate.every == 0 or index + 1 == plan.rounds:
        row |= _judge(plan, exchange, merged.server, index + 1, tally.accepted)
    tally.seconds["evaluate"] = time.perf_counter() - started
    row["seconds"] = {phase: round(seconds, 4) for phase, seconds in tally.seconds.items()}
    watch.round_ended(row)
    return merged.server, row


def _attempt(plan: Plan, exchange: Exchange, server: Any, rnd: Round, tally: _Tally, watch: Watcher) -> Merged[Any] | None:
    """The merge of one cohort; None if too few of its replies were accepted."""
    chosen = choose(exchange.clients(), plan.sampling.fraction, rnd)
    watch.round_started(rnd, chosen)
    sent = {who: plan.method.send(server, who, rnd) for who in chosen}
    tally.bytes_down += sum(len(encode(got)) for got in sent.values())
    tally.chosen, tally.accepted, tally.losses = [who.id for who in chosen], [], []
    gate = Gate(plan.method, plan.spec, rnd, sent, plan.sampling.max_norm)

    def accepted() -> Iterator[Reply]:
        answers = exchange.turn(rnd, sent)
        while True:
            started = time.perf_counter()
            answer = next(answers, None)
            tally.seconds["train"] += time.perf_counter() - started
            if answer is None:
                return
            refused = answer.reason if isinstance(answer, Failed) else gate.refusal(answer)
            watch.answered(answer.client, refused)
            if isinstance(answer, Reply):
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
        return None
    before, started = tally.seconds["train"], time.perf_counter()
    merged: Merged[Any] = plan.method.merge(server, Replies(chain([first], replies)), rnd)
    tally.seconds["merge"] += time.perf_counter() - started - (tally.seconds["train"] - before)
    return merged if len(tally.accepted) >= plan.sampling.min_replies else None


def _judge(plan: Plan, exchange: Exchange, server: Any, index: int, accepted: Sequence[str]) -> dict[str, Any]:
    """Scores of what would be used in the round of this index."""
    rnd = Round(index, plan.seed)
    found: dict[str, Any] = {}
    if plan.judge is not None:
        anybody = ClientInfo("", plan.method.rank, 1)
        mine = plan.method.init_client(plan.spec, anybody, plan.seed)
        score = plan.judge(plan.method.view(mine, plan.method.send(server, anybody, rnd), anybody))
        found["global"] = {**score.metrics, "examples": score.examples}
    if plan.evaluate.clients != "none":
        everybody = sorted(exchange.clients(), key=lambda who: who.id)
        judges = [who for who in everybody if plan.evaluate.clients == "all" or who.id in set(accepted)]
        sent = {who: plan.method.send(server, who, rnd) for who in judges}
        found["clients"] = summary({who.id: score for who, score in exchange.judge(rnd, sent)})
    return found


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)
