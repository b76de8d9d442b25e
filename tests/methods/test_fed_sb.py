"""The exact laws of Fed-SB."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Adapter, AdapterSpec, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, Reply, Round, Trained
from fedlora.methods.fed_sb import FedSB, decomposed
from fedlora.methods.table import TABLE
from fedlora.parts.three_factor import ThreeFactor
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, Quiet, ToyTrainer, products, toy_clients, toy_method, toy_plan, toy_simulation
from uploads import factors, off, truncated

CLIENTS = toy_clients(3, 3)
TOTAL = sum(client.examples for client in CLIENTS)
every_init = pytest.mark.parametrize("init", ["weight", "gradient", "random"])


@dataclass(frozen=True)
class OneStep(ToyTrainer):
    """One step of plain gradient descent where the loss has the same gradient everywhere."""

    gradients: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    lr: float = 0.1

    def fit_one(self, request: Fit, client: ClientInfo) -> Trained:
        after = {}
        for name, part in request.start.items():
            g = self.gradients[client.id][name]
            if "b" in request.train:
                part = replace(part, b=part.b - self.lr * g @ part.a.mT)
            if "a" in request.train:
                part = replace(part, a=part.a - self.lr * part.b.mT @ g)
            after[name] = part
        return Trained(after)


def replies(m: FedSB, server: Any, index: int, trainer: Any, spec: AdapterSpec = SPEC) -> list[Reply]:
    rnd = Round(index, 0)
    sent = {client: m.send(server, client, rnd) for client in CLIENTS}
    return list(SimulationBackend(m, spec, CLIENTS, MemoryStates(), trainer, 0).train_clients(rnd, sent, {}))


def after(m: FedSB, rounds: int, trainer: Any = None, spec: AdapterSpec = SPEC) -> Any:
    server = m.init_server(spec, 0)
    for index in range(rounds):
        found = replies(m, server, index, trainer or ToyTrainer(), spec)
        server = merge(m, server, found, spec).server
    return server


def view(m: FedSB, server: Any, spec: AdapterSpec = SPEC, seed: int = 0) -> Adapter:
    return m.view(m.init_client(spec, CLIENTS[0], seed), m.send(server, CLIENTS[0], Round(2, 0)), CLIENTS[0])


@every_init
def test_the_mean_c_gives_the_mean_of_the_products(init):
    m = FedSB(rank=3, init=init)
    server = after(m, 2)
    found = replies(m, server, 2, ToyTrainer())
    state = m.init_client(SPEC, CLIENTS[0], 0)
    merged = view(m, merge(m, server, found, SPEC).server)
    sent = [(r.weight / TOTAL, products(unpack({**state, **server, **r.upload.values}, ThreeFactor))) for r in found]
    for name, product in products(merged).items():
        assert product.norm() > 1e-3
        assert_close(product, sum(weight * one[name] for weight, one in sent), rtol=1e-5, atol=1e-7)


@every_init
def test_every_round_is_exact_and_the_one_that_only_finds_a_basis_logs_no_error(init):
    m = FedSB(rank=3, init=init)
    for index in range(3):
        server = after(m, index)
        error = merge(m, server, replies(m, server, index, ToyTrainer()), SPEC).notes.get("aggregation_error")
        assert error is None if (init, index) == ("gradient", 0) else error < 1e-5


@every_init
def test_b_and_a_never_change_and_c_alone_goes_up(init):
    m = FedSB(rank=3, init=init)
    start, later = after(m, 2), after(m, 5)
    for name, part in view(m, later).items():
        before = view(m, start)[name]
        assert torch.equal(part.b, before.b) and torch.equal(part.a, before.a) and not torch.equal(part.c, before.c)
        assert_close(part.b.mT @ part.b, torch.eye(3))
        assert_close(part.a @ part.a.mT, torch.eye(3))
    for reply in replies(m, later, 5, ToyTrainer()):
        sent = {key: tuple(x.shape) for key, x in reply.upload.flat().items()}
        assert sent == {f"{name}.c": (3, 3) for name in SPEC.modules}


@pytest.mark.parametrize("init", ["weight", "random"])
def test_training_starts_from_the_pretrained_model_and_c_has_a_gradient(init):
    m = FedSB(rank=3, init=init)
    start = view(m, m.init_server(SPEC, 0))
    assert not any(x.any() for x in products(start).values())
    trained = ToyTrainer(steps=1).fit_one(Fit(start, frozenset("c")), CLIENTS[0]).adapter
    assert all(part.c.norm() > 1e-3 for part in trained.values())


def test_b_and_a_span_the_leading_singular_vectors_of_the_pretrained_weight():
    weights = {name: SPEC.weight(name) for name in SPEC.modules}
    for name, part in view(FedSB(rank=3), FedSB(rank=3).init_server(SPEC, 0)).items():
        projected = part.b @ part.b.mT @ weights[name] @ part.a.mT @ part.a
        assert_close(projected, truncated(weights, 3)[name], rtol=1e-4, atol=1e-5)


def test_from_gradients_of_low_rank_comes_the_singular_value_decomposition_of_the_mean_step():
    """Each client's gradient has rank 1, three clients' mean has 3: two linear passes find it."""
    spec = AdapterSpec(modules={"q": (48, 20), "v": (20, 33)})
    gradients = {client.id: products(factors(1, "gradient", client.id, spec=spec)) for client in CLIENTS}
    m = FedSB(rank=3, init="gradient")
    start = view(m, after(m, 2, OneStep(gradients=gradients), spec), spec)
    step = {
        name: -0.1 * sum(client.examples / TOTAL * gradients[client.id][name].double() for client in CLIENTS)
        for name in spec.modules
    }
    assert off({name: x.double() for name, x in products(start).items()}, truncated(step, 3)) < 1e-5
    for name, part in start.items():
        assert_close(part.c, torch.linalg.svdvals(step[name])[:3].diag().float(), rtol=1e-4, atol=1e-6)


def test_from_gradients_of_full_rank_comes_a_step_not_better_than_the_best_and_not_far_from_it():
    spec = AdapterSpec(modules={"q": (48, 20), "v": (20, 33)})
    gradients = {client.id: products(factors(20, "gradient", client.id, spec=spec)) for client in CLIENTS}
    mean = {n: sum(client.examples / TOTAL * gradients[client.id][n].double() for client in CLIENTS) for n in spec.modules}
    m = FedSB(rank=8, init="gradient")
    found = products(view(m, after(m, 2, OneStep(gradients=gradients), spec), spec))
    found = {name: x.double() / -0.1 for name, x in found.items()}
    assert off(truncated(mean, 8), mean) < off(found, mean) < 1.5 * off(truncated(mean, 8), mean)


def test_at_the_full_rank_one_step_of_the_toy_is_found_whole():
    """The toy's gradient is (w - target) / numel; a client's weight in the mean is its number of examples."""
    m, trainer = FedSB(rank=9, init="gradient"), ToyTrainer(steps=1)
    for name, product in products(view(m, after(m, 2, trainer))).items():
        step = sum(client.examples / TOTAL * trainer.target(client.id)[name] for client in CLIENTS) * 2.0 / product.numel()
        assert_close(product, step, rtol=1e-4, atol=1e-5)


def test_the_first_two_rounds_of_the_gradient_train_one_epoch_of_b_and_then_of_a():
    m, requests = FedSB(rank=3, init="gradient"), []
    for index in range(3):
        server = after(m, index)
        requests.append(next(m.work({}, m.send(server, CLIENTS[0], Round(index, 0)), CLIENTS[0], Round(index, 0))))
    assert [(set(r.train), r.epochs) for r in requests] == [({"b"}, 1), ({"a"}, 1), ({"c"}, None)]
    assert not any(x.any() for r in requests[:2] for x in products(r.start).values())


def test_random_factors_come_from_the_common_seed_and_never_travel():
    m = FedSB(rank=3, init="random")
    clients = [m.init_client(SPEC, client, 0) for client in CLIENTS]
    assert all(torch.equal(one[key], clients[0][key]) for one in clients for key in one)
    assert not torch.equal(m.init_client(SPEC, CLIENTS[0], 1)["layer.2.q.b"], clients[0]["layer.2.q.b"])
    download = m.send(m.init_server(SPEC, 0), CLIENTS[0], Round(0, 0))
    assert {key: tuple(x.shape) for key, x in download.items()} == {f"{name}.c": (3, 3) for name in SPEC.modules}


@every_init
def test_the_rank_of_a_module_is_at_most_its_smaller_size(init):
    m = FedSB(rank=8, init=init)
    assert {name: part.rank for name, part in view(m, after(m, 3)).items()} == {"layer.2.q": 7, "layer.10.v": 5}


def test_without_the_pretrained_weights_the_default_is_refused():
    with pytest.raises(ValueError, match=r"no `weight`.*'random' or 'gradient'"):
        FedSB().init_server(replace(SPEC, weight=None), 0)


def test_a_decomposition_is_the_same_matrix():
    part = factors(3)["layer.2.q"]
    assert_close(decomposed(part).product(), part.product(), rtol=1e-5, atol=1e-5)
    zero = decomposed(LowRank(b=part.b, a=torch.zeros_like(part.a)))
    assert not zero.c.any() and all(x.isfinite().all() for x in pack({"": zero}).values())


@every_init
def test_a_run_accepts_the_uploads_of_every_round_and_learns(init):
    m, trainer, rows = toy_method(TABLE["fed-sb"], rank=3, init=init), ToyTrainer(), []
    plan, simulation = toy_plan(m, trainer, rounds=6), toy_simulation(m, trainer, CLIENTS)
    progress = RunState(m.init_server(SPEC, 0))
    for index in range(6):
        progress, row = one_round(plan, simulation, MemoryStates(), progress, index, Quiet())
        rows.append(row)
    assert all(row.accepted == ["0", "1", "2"] for row in rows)
    assert rows[-1].global_["accuracy"] > rows[1].global_["accuracy"] > rows[0].global_["accuracy"]
