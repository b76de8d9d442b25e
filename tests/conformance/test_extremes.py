"""Whatever finite numbers one client uploads, in every method: it is refused, or the server's next state is finite."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.config.sections import Evaluate, Sampling
from fedlora.messages import ClientInfo, Reply, Round, Upload
from fedlora.rounds.codec import encode_state, outline
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import Plan, RunState

from test_laws import CASES, PERIOD, SPEC, Sent, people, run_rounds
from toy import MemoryStates, Quiet, toy_method, toy_metrics

HOSTILE = "1"
ALLOWED, TOO_LARGE = (1e10, -1e10, 1e-38, 1e-45, 0.0), (1.001e10, 1e19, 1e30, 3e38, -3e38)


def whole(value: float) -> Callable[[Tensor], Tensor]:
    """Every entry."""
    return lambda x: torch.full_like(x, value)


def single(value: float) -> Callable[[Tensor], Tensor]:
    """One entry of each tensor."""
    return lambda x: x.flatten().index_fill(0, torch.arange(min(1, x.numel())), value).view(x.shape)


def alternating(value: float) -> Callable[[Tensor], Tensor]:
    """Every entry, with both signs."""
    return lambda x: (value * (1 - 2 * (torch.arange(x.numel()) % 2))).view(x.shape).to(x.dtype)


def cases(values: tuple[float, ...]) -> list[Any]:
    """Where and how large, for all rows in every round of a period; but for the full tier in the first round after it."""
    found = []
    for row, index, bend, value in product(CASES, (0, PERIOD, PERIOD + 1), (whole, single, alternating), values):
        some = index == PERIOD and bend is not alternating and value in (1e10, 1e-45, 0.0, 1e19, -3e38)
        quick = some and bend is whole and value in (1e10, 1e19)
        marks = [] if quick else [pytest.mark.slow] if some else [pytest.mark.full]
        found.append(pytest.param(row, index, bend(value), id=f"{row}-{index}-{bend.__name__}-{value:g}", marks=marks))
    return found


@dataclass(frozen=True)
class Answers:
    """A backend whose clients have answered already; the hostile one's floats are bent."""

    replies: list[Reply]
    bend: Callable[[Tensor], Tensor]

    def clients(self) -> list[ClientInfo]:
        return [reply.client for reply in self.replies]

    def held(self) -> dict[str, list[int]]:
        return {}

    def merge_into_base(self, change: Any) -> None:
        pass

    def train_clients(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Reply]:
        for reply in self.replies:
            if reply.client in sent:
                hostile = reply.client.id == HOSTILE
                flat = reply.upload.flat().items()
                upload = Upload.of({k: self.bend(x) if hostile and x.is_floating_point() else x for k, x in flat})
                yield replace(reply, round=rnd, upload=upload)

    def evaluate(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Any]:
        yield from ()


@cache
def honest(name: str, index: int) -> tuple[Any, Any, list[Reply]]:
    """A row's method, its server's state after so many rounds, and the honest replies of the next."""
    row, ranks = CASES[name]
    game, method = run_rounds(row, people(ranks), rounds=index), toy_method(row)
    sent = {client: method.send(game.progress.server, client, Round(index, 0)) for client in people(ranks)}
    return method, game.progress.server, list(game.backend.train_clients(Round(index, 0), sent, {}))


def after(name: str, index: int, bend: Callable[[Tensor], Tensor], without: str = "") -> tuple[Any, dict[str, Any], Any]:
    """The state after one more round, the row, and all that is downloaded then or was put into the base."""
    method, server, replies = honest(name, index)
    replies = [reply for reply in replies if reply.client.id != without]
    if not any(x.is_floating_point() for reply in replies for x in reply.upload.flat().values()):
        pytest.skip("nothing is uploaded")
    plan, base_updates = (
        Plan(method, SPEC, 0, Sampling(), Evaluate(clients="none"), index + 2, metrics=toy_metrics),
        MemoryStates(),
    )
    progress, row = one_round(plan, Answers(replies, bend), base_updates, RunState(server), index, Quiet())
    sent = [method.send(progress.server, reply.client, Round(index + 1, 0)) for reply in replies]
    return progress.server, row, [*map(dict, sent), *base_updates.base_updates.values()]


def finite(state: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in outline(state)[1] if x.is_floating_point())


@pytest.mark.parametrize(("name", "index", "bend"), cases(TOO_LARGE))
def test_an_upload_with_too_large_an_entry_is_refused_by_name_and_the_round_is_as_without_it(name, index, bend):
    server, row, _ = after(name, index, bend)
    without, _, _ = after(name, index, bend, without=HOSTILE)
    assert row.rejected.keys() == {HOSTILE} and row.attempts == 1
    assert any(reason in row.rejected[HOSTILE] for reason in ("of magnitude", "invalid selection"))
    assert encode_state(server) == encode_state(without)


@pytest.mark.parametrize(("name", "index", "bend"), cases(ALLOWED))
def test_after_any_other_upload_the_state_is_finite_or_the_round_goes_on_without_it(name, index, bend):
    server, row, further = after(name, index, bend)
    assert finite(server) and finite(further)
    if HOSTILE not in row.accepted:
        assert row.rejected.keys() == {HOSTILE} and row.accepted == ["0", "2"]
        assert ("largest change" in row.rejected[HOSTILE]) == (row.attempts == 2)
