"""Comparison of a round's uploads with each other: one liar of ten clients hardly changes what is learned."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.errors import RunStopped
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Upload
from fedlora.methods.table import TABLE
from fedlora.methods.wrap.wrapper import Wrapper
from fedlora.rounds.cohort_checks import CohortCheck, Size, check_cohort, clipped, difference_norm, spectral_norm
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState
from fedlora.rounds.simulate import SimulationBackend
from tiers import fast

from toy import MemoryStates, Quiet, ToyTrainer, toy_clients, toy_method, toy_plan


def sizes(*norms: float, weights: tuple[float, ...] = ()) -> list[Size]:
    """Clients a, b, c, ... with these norms and no change of weights."""
    weights = weights or (1.0,) * len(norms)
    return [Size("abcdefgh"[i], weights[i], float(norm), None) for i, norm in enumerate(norms)]


def test_equal_uploads_are_accepted_as_they_are():
    assert check_cohort(sizes(1, 1, 1)) == CohortCheck(dict.fromkeys("abc", 1.0))


@pytest.mark.parametrize(("norm", "factor"), [(3.0, None), (6.0, 0.5), (30.0, 0.1)])
def test_a_change_above_three_times_the_median_is_scaled_down_to_it(norm, factor):
    check = check_cohort(sizes(1, 1, 1, norm))
    assert check.clipped == ({} if factor is None else {"d": pytest.approx(factor)}) and not check.rejected


def test_a_change_above_thirty_times_the_median_is_rejected_with_both_numbers():
    check = check_cohort(sizes(1, 1, 1, 31))
    assert check.rejected == {"d": "its change has the norm 31, more than 30 times the round's median 1"}
    assert check.weights.keys() == set("abc") and not check.clipped


def test_the_spectral_norm_of_the_product_is_held_against_the_cohort_too():
    flat = [replace(one, spectral=0.5) for one in sizes(1, 1, 1, 1)]
    assert check_cohort([*flat[:3], replace(flat[3], spectral=3.0)]).clipped == {"d": pytest.approx(0.5)}
    assert "spectral norm 20" in check_cohort([*flat[:3], replace(flat[3], spectral=20.0)]).rejected["d"]


def test_no_weight_is_more_than_twice_the_median_weight():
    assert check_cohort(sizes(1, 1, 1, weights=(5.0, 10.0, 1e9))).weights == {"a": 5.0, "b": 10.0, "c": 20.0}


@pytest.mark.parametrize("norms", [(1.0,), (1.0, 1e6)])
def test_fewer_than_three_uploads_are_not_compared(norms):
    assert check_cohort(sizes(*norms)) == CohortCheck(dict.fromkeys("ab"[: len(norms)], 1.0))


def test_where_most_clients_change_nothing_nobody_is_rejected():
    assert check_cohort(sizes(0, 0, 0, 5)).rejected == {}


def test_the_spectral_norm_is_that_of_the_dense_matrix():
    part = LowRank(b=torch.randn(7, 3), a=torch.randn(3, 5))
    assert spectral_norm({"q": part}) == pytest.approx(float(torch.linalg.svdvals(part.product())[0]), rel=1e-5)


def test_a_clipped_upload_differs_from_the_template_in_the_same_direction_by_less():
    template, upload = Upload({"b": torch.randn(4, 2)}), Upload({"b": torch.randn(4, 2)})
    small = clipped(upload, template, 0.25)
    torch.testing.assert_close(small.values["b"] - template.values["b"], (upload.values["b"] - template.values["b"]) / 4)
    assert difference_norm(small, template) == pytest.approx(difference_norm(upload, template) / 4, rel=1e-5)


LIES: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
    "ten times": lambda name, before, x: before + 10 * (x - before),
    "a thousand times": lambda name, before, x: before + 1000 * (x - before),
    "minus three times": lambda name, before, x: before - 3 * (x - before),
    "the same product": lambda name, before, x: 1000 * x if name.endswith(".b") else x / 1000 if name.endswith(".a") else x,
    "one huge entry": lambda name, before, x: x.flatten().index_fill(0, torch.tensor([1]), 1e6).view(x.shape),
}


@dataclass(frozen=True)
class OneLiar(SimulationBackend):
    """Client 3 sends a lie about its change; or claims a billion examples."""

    lie: str = ""

    def clients(self) -> list[ClientInfo]:
        claims = self.lie == "a billion examples"
        return [replace(one, examples=10**9) if claims and one.id == "3" else one for one in self.registered]

    def train_clients(self, rnd: Round, sent: Any, pending: Any) -> Iterator[Any]:
        for reply in super().train_clients(rnd, sent, pending):
            lies = isinstance(reply, Reply) and reply.client.id == "3"
            yield self._lie(reply, sent[reply.client]) if lies else reply

    def _lie(self, reply: Reply, before: Any) -> Reply:
        if not self.lie:
            return reply
        if self.lie not in LIES:
            return replace(reply, weight=float(reply.client.examples))
        values = {k: LIES[self.lie](k, before[k], x) for k, x in reply.upload.values.items()}
        return replace(reply, upload=Upload(values))


@cache
def loss_after(name: str, lie: str, rounds: int, checked: bool = True) -> tuple[float, set[str]]:
    """The toy's loss on the common target after some rounds of ten clients, one of whom may lie; the rejected clients."""
    trainer, row, clients = ToyTrainer(), TABLE[name], toy_clients(10)
    method = toy_method(row)
    plan = replace(toy_plan(method, trainer, rounds=rounds, max_examples=10**10), check_cohort=checked)
    backend = OneLiar(method, trainer.spec, clients, MemoryStates(), trainer, 0, lie=lie)
    state, rejected = RunState(method.init_server(trainer.spec, 0)), set[str]()
    for index in range(rounds):
        state, row_ = one_round(plan, backend, MemoryStates(), state, index, Quiet())
        rejected |= set(row_.rejected)
    return -row_.global_["accuracy"], rejected


@pytest.mark.parametrize(
    "lie", fast([*LIES, "a billion examples"], "a thousand times", "the same product", "one huge entry")
)
@pytest.mark.parametrize("name", fast(["fedit", "flexlora"], "fedit"))
def test_with_one_liar_of_ten_the_loss_is_within_a_tenth_of_the_honest_runs(name, lie):
    rounds = 40 if lie == "minus three times" else 8  # it slows the others down, but hardly moves where they end
    honest, rejected = loss_after(name, "", rounds)
    assert rejected == set() and loss_after(name, lie, rounds)[0] < 1.1 * honest


@pytest.mark.parametrize("lie", ["a thousand times", "one huge entry"])
def test_without_the_checks_such_a_liar_does_harm(lie):
    honest, _ = loss_after("fedit", "", 8, checked=False)
    try:
        loss, _ = loss_after("fedit", lie, 8, checked=False)
    except RunStopped:
        return  # nothing finite is left
    assert not loss < 2 * honest


@dataclass(frozen=True)
class CountingWork(Wrapper):
    """Counts how often each client's work is begun: to train, and for its template."""

    calls: Counter[str] = field(default_factory=Counter, compare=False)

    def work(self, state: Any, download: Any, client: ClientInfo, rnd: Round) -> Any:
        self.calls[client.id] += 1
        return self.inner.work(state, download, client, rnd)


def test_the_template_of_an_upload_is_computed_once_and_again_only_to_clip_it():
    trainer, method = ToyTrainer(), CountingWork(toy_method(TABLE["fedit"]))
    backend = OneLiar(method, trainer.spec, toy_clients(10), MemoryStates(), trainer, 0, lie="ten times")
    plan = replace(toy_plan(method, trainer), check_cohort=True)
    _, row = one_round(plan, backend, MemoryStates(), RunState(method.init_server(trainer.spec, 0)), 0, Quiet())
    assert row.clipped is not None and row.clipped.keys() == {"3"}
    assert method.calls == {client: 3 if client in row.clipped else 2 for client in row.accepted}
