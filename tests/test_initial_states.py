"""Initial states are computed once, for all parts of a round."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedlora.initial_states import RememberedStates
from fedlora.messages import ClientInfo
from fedlora.methods.flora import FLoRA
from fedlora.methods.table import TABLE
from fedlora.methods.wrap.wrapper import Wrapper
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState

from toy import SPEC, MemoryStates, Quiet, ToyTrainer, toy_clients, toy_method, toy_plan, toy_simulation


@dataclass(frozen=True)
class Counting(Wrapper):
    calls: Counter[str] = field(default_factory=Counter, compare=False)

    def init_client(self, spec: Any, client: ClientInfo, seed: int) -> Any:
        self.calls[client.id] += 1
        return self.inner.init_client(spec, client, seed)


@pytest.mark.parametrize("name", TABLE)
def test_no_initial_state_is_computed_more_than_once_in_a_round_with_evaluation(name):
    counting = Counting(toy_method(TABLE[name]))
    method, trainer = RememberedStates(counting), ToyTrainer()
    backend, plan, states = toy_simulation(method, trainer, toy_clients(4)), toy_plan(method, trainer), MemoryStates()
    state = RunState(method.init_server(SPEC, 0))
    for index in range(2):
        state, _ = one_round(plan, backend, states, state, index, Quiet())
        assert max(counting.calls.values()) == 1


def test_beyond_the_limit_the_least_recently_used_is_forgotten():
    counting = Counting(FLoRA(rank=3))
    one, other = toy_clients(2)
    size = sum(x.numel() * 4 for part in counting.inner.init_client(SPEC, one, 0).values() for x in (part.b, part.a))
    method = RememberedStates(counting, limit=int(1.5 * size))
    for client in (one, other, other, one):
        state = method.init_client(SPEC, client, 0)
        assert all(torch.equal(part.a, state[n].a) for n, part in FLoRA(rank=3).init_client(SPEC, client, 0).items())
    assert counting.calls == {one.id: 2, other.id: 1}
