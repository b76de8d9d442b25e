"""Clients are told which of their uploads entered the state, and with which share."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from fedlora.messages import Acknowledged, Round
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.wrap.wrapper import Wrapper
from fedlora.rounds.codec import decode_state, encode_state
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState

from toy import SPEC, MemoryStates, Quiet, ToyTrainer, toy_clients, toy_plan, toy_simulation


@dataclass(frozen=True)
class Noting(Wrapper):
    """Notes what each client knows in each round."""

    told: dict[tuple[int, str], Acknowledged | None] = field(default_factory=dict, compare=False)
    rounds: list[Round] = field(default_factory=list, compare=False)

    def work(self, state: Any, download: Any, client: Any, rnd: Round) -> Any:
        if state is not None:  # not for a template
            self.told[rnd.index, client.id] = rnd.acknowledged.get(client.id)
            self.rounds.append(rnd)
        return self.inner.work(state, download, client, rnd)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_client_knows_its_last_accepted_upload_and_its_share_of_the_weights(uniform, tmp_path):
    method, trainer, clients = Noting(FactorAveraging(rank=3)), ToyTrainer(), toy_clients(4)
    plan = toy_plan(method, trainer, fraction=0.5, rounds=6)
    plan = plan.__class__(**{**vars(plan), "uniform_weights": uniform})
    backend, state, last = toy_simulation(method, trainer, clients), RunState(method.init_server(SPEC, 0)), {}
    for index in range(6):
        state, row = one_round(plan, backend, MemoryStates(), state, index, Quiet())
        (tmp_path / "state").write_bytes(encode_state(state))
        state = decode_state(str(tmp_path / "state"))[0]  # it survives a checkpoint
        for client in row.chosen:
            assert method.told[index, client] == last.get(client)
        weights = {one.id: 1 if uniform else one.examples for one in clients if one.id in row.accepted}
        for client, weight in weights.items():
            last[client] = Acknowledged(index, weight / sum(weights.values()))
        for rnd in method.rounds[-2:]:
            assert (rnd.registered, rnd.expected_cohort) == (4, 2)
    assert any(found is not None for found in method.told.values())
