"""The exact laws of Ditto."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter import Scaling, lora_init, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Round, Trained
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.ditto import Ditto, distance
from fedlora.methods.scaled import Scaled, unscaled
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, ToyTrainer, products, toy_clients
from uploads import factors

CLIENTS = toy_clients(3, 2)


def run_rounds(m: Any, rounds: int, client: list[ClientInfo] = CLIENTS) -> tuple[list[Merged[Any]], MemoryStates]:
    server, states, merged = m.init_server(SPEC, 0), MemoryStates(), []
    for index in range(rounds):
        rnd, some = Round(index, 0), client[-1:] if index % 2 else client  # the last one is always there
        simulation = SimulationBackend(m, SPEC, client, states, ToyTrainer(), 0)
        sent = {one: m.send(server, one, rnd) for one in some}
        merged.append(merge(m, server, simulation.train_clients(rnd, sent, {}), SPEC))
        server = merged[-1].server
    return merged, states


@pytest.mark.parametrize("prox_weight", [0.0, 0.1])
def test_the_shared_pair_is_fedits_bit_for_bit(prox_weight):
    one, other = run_rounds(Ditto(rank=2, prox_weight=prox_weight), 4)[0][-1], run_rounds(FactorAveraging(rank=2), 4)[0][-1]
    assert one.server.keys() == other.server.keys() and one.notes == other.notes
    assert all(torch.equal(one.server[key], other.server[key]) for key in one.server)


def test_without_a_pull_a_client_trains_as_if_it_were_alone():
    together, alone = (
        run_rounds(Ditto(rank=2, prox_weight=0.0), 4)[1],
        run_rounds(Ditto(rank=2, prox_weight=0.0), 4, CLIENTS[-1:])[1],
    )
    one, other = together.client_state(CLIENTS[-1], 4), alone.client_state(CLIENTS[-1], 4)
    assert all(
        torch.equal(one.adapter[n].b, other.adapter[n].b) and torch.equal(one.adapter[n].a, other.adapter[n].a)
        for n in SPEC.modules
    )
    pulled = run_rounds(Ditto(rank=2, prox_weight=0.1), 4)[1].client_state(CLIENTS[-1], 4)
    assert not any(torch.equal(one.adapter[name].b, pulled.adapter[name].b) for name in SPEC.modules)


def test_a_pull_without_bounds_keeps_a_client_at_the_shared_pair_that_came_down():
    """The distance falls as 1 / prox_weight; lr * prox_weight is 1/2, so that gradient descent comes to rest."""
    apart = []
    for prox_weight in (50.0, 500.0):
        m, trainer, rnd = Ditto(rank=2, prox_weight=prox_weight), ToyTrainer(lr=0.05 / prox_weight, steps=20), Round(0, 0)
        shared = factors(2, "shared", spec=SPEC)
        job = m.work(m.init_client(SPEC, CLIENTS[0], 0), pack(shared), CLIENTS[0], rnd)
        own = trainer.fit_one(job.send(Trained(next(job).start)), CLIENTS[0]).adapter
        apart.append(distance(own, shared).sqrt())
    assert_close(apart[1], apart[0] / 10, rtol=0.05, atol=0)
    assert apart[1] > 0


def test_the_pull_is_towards_what_came_down_and_not_towards_what_was_trained_since():
    m, client, rnd = Ditto(rank=2, prox_weight=3.0), CLIENTS[0], Round(0, 0)
    download, state = m.init_server(SPEC, 0), factors(2, "own", spec=SPEC)
    job = m.work(Scaled(state, SPEC.scales(2)), download, client, rnd)
    first = next(job)
    assert first.penalties == ()
    second = job.send(Trained(factors(2, "trained", spec=SPEC)))
    assert second.start is state and len(second.penalties) == 1
    assert_close(second.penalties[0](pack(state)), 1.5 * distance(state, unpack(download, LowRank)))
    assert second.penalties[0](download) == 0


def test_the_distance_is_that_of_all_factors():
    one, other = factors(2, "one", spec=SPEC), factors(2, "other", spec=SPEC)
    apart = [torch.cat([(one[n].b - other[n].b).flatten(), (one[n].a - other[n].a).flatten()]) for n in SPEC.modules]
    assert_close(distance(one, other), torch.cat(apart).square().sum())


def test_a_client_uses_the_shared_pair_until_it_has_its_own_which_starts_there():
    m, client, download = Ditto(rank=2), CLIENTS[0], Ditto(rank=2).init_server(SPEC, 1)
    state = m.init_client(SPEC, client, 0)
    shared = products(m.view(state, download, client))
    assert_close(shared, products(lora_init(SPEC, 2, 1)))
    job = m.work(state, download, client, Round(0, 0))
    next(job)
    second = job.send(Trained(factors(2, "trained", spec=SPEC)))
    assert all(torch.equal(part.a, download[f"{name}.a"]) for name, part in second.start.items())
    own = factors(2, "own", spec=SPEC)
    assert m.view(Scaled(own, SPEC.scales(2)), download, client) is own


def test_the_pull_is_on_the_factors_of_peft_whatever_alpha_is():
    spec, download, state = (
        replace(SPEC, scaling=Scaling(8.0)),
        factors(2, "shared", spec=SPEC),
        factors(2, "own", spec=SPEC),
    )
    m, scales = Ditto(rank=2, prox_weight=3.0), spec.scales(2)
    job = m.work(Scaled(state, scales), pack(download), CLIENTS[0], Round(0, 0))
    second = job.send(Trained(next(job).start))
    assert_close(second.penalties[0](pack(state)), 1.5 * distance(unscaled(state, scales), unscaled(download, scales)))
