"""FedProx, around every method."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import AdapterSpec, Scaling, lora_init, pack, units
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Fit, Round, Trained
from fedlora.method import AnyMethod
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.ditto import Ditto
from fedlora.methods.lora_a2 import LoRAA2
from fedlora.methods.table import TABLE
from fedlora.methods.wrap.fedprox import FedProx, proximal, trained
from fedlora.parts.dense import Dense
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.three_factor import ThreeFactor
from fedlora.parts.tied import Tied
from fedlora.parts.weight_change import WeightChange
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState

from toy import SPEC, MemoryStates, Quiet, ToyTrainer, products, toy_clients, toy_method, toy_plan, toy_simulation


def weights_after(method: AnyMethod, rounds: int = 2, spec: AdapterSpec = SPEC) -> dict[str, dict[str, Tensor]]:
    """Each client's weights after some rounds."""
    trainer, clients, states = ToyTrainer(spec=spec), toy_clients(3), MemoryStates()
    plan, simulation = toy_plan(method, trainer, rounds=rounds), toy_simulation(method, trainer, clients)
    state = RunState(method.init_server(spec, 0))
    for index in range(rounds):
        state, _ = one_round(plan, simulation, states, state, index, Quiet())
    rnd = Round(rounds, 0)
    views = {one.id: simulation.view(one, method.send(state.server, one, rnd), rnd) for one in clients}
    return {client: trainer.weights(view) for client, view in views.items()}


@pytest.mark.parametrize("name", TABLE)
def test_without_a_weight_it_is_the_method_itself_bit_for_bit(name):
    method = toy_method(TABLE[name])
    plain, wrapped = weights_after(method), weights_after(FedProx(method, mu=0.0))
    assert all(torch.equal(x, wrapped[client][key]) for client, own in plain.items() for key, x in own.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_with_a_weight_every_method_runs_and_learns_something_else(name):
    method = toy_method(TABLE[name])
    plain, wrapped = weights_after(method), weights_after(FedProx(method, mu=0.1))
    assert any(not torch.equal(x, wrapped[client][key]) for client, own in plain.items() for key, x in own.items())
    assert all(bool(x.isfinite().all()) for own in wrapped.values() for x in own.values())


def test_the_heavier_the_penalty_the_closer_the_factors_stay_to_their_start():
    start = FactorAveraging(rank=3).view({}, pack(lora_init(SPEC, 3, 0)), toy_clients(1)[0])
    moved = []
    for mu in (0.0, 0.1, 0.3):
        job = FedProx(FactorAveraging(rank=3), mu=mu).work(
            FedProx(FactorAveraging(rank=3)).init_client(SPEC, toy_clients(1)[0], 0),
            pack(start),
            toy_clients(1)[0],
            Round(0, 0),
        )
        after = ToyTrainer(steps=20).fit_one(next(job), toy_clients(1)[0]).adapter
        moved.append(sum(float((x - pack(start)[key]).square().sum()) for key, x in pack(after).items()))
    assert moved[0] > 1.05 * moved[1] > 1.05**2 * moved[2] > 0


def request(**parts: Any) -> Fit:
    return Fit(parts, frozenset("bacsgw") | {"delta"})


def some(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


PARTS = {
    "two factors": lambda: LowRank(some(5, 3), some(3, 4)),
    "three factors": lambda: ThreeFactor(some(5, 3), some(3, 3), some(3, 4)),
    "heads": lambda: Heads(some(5, 4), some(2, 2, 2), some(2), some(4, 4)),
    "experts": lambda: Experts(some(5, 3), some(3, 4), some(3, 4), some(1, 5, 3), some(1, 3, 4)),
    "a tied factor": lambda: Tied(some(3, 4), some(0, 4), some(5, 4)),
    "a change of the weight": lambda: WeightChange(some(5, 4)),
    "head": lambda: Dense(some(5, 4)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_the_penalty_is_half_the_squared_distance_of_pefts_factors_in_every_kind_of_part(kind):
    start, live = request(q=PARTS[kind]()), request(q=PARTS[kind]())
    scaling = Scaling(alpha=16.0)
    expected = 0.0
    for factor, x in vars(live.start["q"]).items():
        if factor in start.train:
            scale = (
                scaling.of("q", x.shape[-1])
                if factor == "b"
                else scaling.of("q", 3) ** 0.5
                if kind == "a tied factor"
                else 1.0
            )
            expected += float(((x - getattr(start.start["q"], factor)) / scale).square().sum())
    assert float(proximal(0.3, trained(start), units(start.start, scaling), pack(live.start))) == pytest.approx(
        0.15 * expected
    )


def test_alpha_only_scales_the_updates():
    def run(unit: float) -> dict[str, dict[str, Tensor]]:
        trainer = ToyTrainer(spec=replace(SPEC, scaling=Scaling(3 * unit)), unit=unit)
        method = FedProx(FactorAveraging(rank=3), mu=0.2)
        client, spec = toy_clients(1)[0], trainer.spec
        job = method.work(method.init_client(spec, client, 0), method.init_server(spec, 0), client, Round(0, 0))
        return {"": products(trainer.fit_one(next(job), client).adapter)}

    assert_close({name: 4 * x for name, x in run(1.0)[""].items()}, run(4.0)[""], rtol=1e-4, atol=1e-5)


def test_only_trainings_for_an_upload_are_penalized():
    client = toy_clients(1, 1)[0]
    ditto = FedProx(Ditto(rank=3, prox_weight=0.0))
    job = ditto.work(ditto.init_client(SPEC, client, 0), ditto.init_server(SPEC, 0), client, Round(0, 0))
    first = next(job)
    personal = job.send(Trained(first.start))
    assert (len(first.penalties), first.role, len(personal.penalties), personal.role) == (1, "upload", 0, "personal")
    choosing = FedProx(LoRAA2(rank=4))
    server = choosing.init_server(SPEC, 0)
    job = choosing.work(
        choosing.init_client(SPEC, client, 0), choosing.send(server, client, Round(0, 0)), client, Round(0, 0)
    )
    probe = next(job)
    assert probe.role == "probe" and probe.penalties == ()
    assert len(job.send(Trained(probe.start)).penalties) == 1
