"""The exact laws of FedDPA."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.messages import Merged, Round, Trained
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.fed_dpa import FedDPA
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, ToyTrainer, products, toy_clients

CLIENTS = toy_clients(3, 2)
METHOD = FedDPA(rank=2, personal_rank=3)


def run_rounds(m: Any, rounds: int) -> tuple[Merged[Any], MemoryStates]:
    server, states = m.init_server(SPEC, 0), MemoryStates()
    for index in range(rounds):
        rnd, client = Round(index, 0), CLIENTS[index % 2 :]  # client 0 misses every other round
        simulation = SimulationBackend(m, SPEC, CLIENTS, states, ToyTrainer(), 0)
        sent = {one: m.send(server, one, rnd) for one in client}
        merged = merge(m, server, simulation.train_clients(rnd, sent, {}), SPEC)
        server = merged.server
    return merged, states


def test_the_shared_pair_is_fedits_bit_for_bit():
    one, other = run_rounds(METHOD, 4)[0], run_rounds(FactorAveraging(rank=2), 4)[0]
    assert one.server.keys() == other.server.keys()
    assert all(torch.equal(one.server[key], other.server[key]) for key in one.server)
    assert one.notes == pytest.approx(other.notes, rel=1e-6)  # rounding: a new client's personal pair is in the global view


def test_the_personal_pair_is_trained_beside_the_shared_one_as_trained_and_stays_at_home():
    client, rnd = CLIENTS[0], Round(0, 0)
    state, download = METHOD.init_client(SPEC, client, 0), METHOD.init_server(SPEC, 0)
    job = METHOD.work(state, download, client, rnd)
    first = next(job)
    assert first.frozen_extra is None and {part.rank for part in first.start.values()} == {2}
    shared = ToyTrainer().fit_one(first, client).adapter
    second = job.send(Trained(shared))
    assert second.start == state and second.frozen_extra == shared
    own = ToyTrainer().fit_one(second, client).adapter
    with pytest.raises(StopIteration) as done:
        job.send(Trained(own))
    state, upload = done.value.value
    assert state == own and upload.flat().keys() == download.keys()
    assert all(torch.equal(upload.values[f"{name}.b"], part.b) for name, part in shared.items())


def test_a_client_uses_the_sum_of_both_pairs_and_a_new_one_the_shared_pair():
    merged, states = run_rounds(METHOD, 3)
    shared = products(FactorAveraging(rank=2).view({}, merged.server, CLIENTS[1]))
    state = states.client_state(CLIENTS[1], 3)
    new = METHOD.init_client(SPEC, CLIENTS[1], 0)
    for name, both in products(METHOD.view(state, merged.server, CLIENTS[1])).items():
        assert state[name].product().norm() > 0.01
        assert_close(both, shared[name] + state[name].product(), rtol=1e-5, atol=1e-6)
        assert_close(products(METHOD.view(new, merged.server, CLIENTS[1]))[name], shared[name], rtol=1e-5, atol=1e-6)


def test_both_pairs_fit_a_client_better_than_the_shared_one():
    merged, states = run_rounds(METHOD, 6)
    trainer = ToyTrainer()
    for client in CLIENTS:
        own = METHOD.view(states.client_state(client, 6), merged.server, client)
        shared = METHOD.view(METHOD.init_client(SPEC, client, 0), merged.server, client)
        assert trainer.loss(own, client.id) < 0.9 * trainer.loss(shared, client.id)
