"""The exact laws of FedLoRU, pFedLoRU and mFedLoRU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.linalg.combine import stack
from fedlora.messages import ClientInfo, Merged, Reply, Round, Trained
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.fedloru import FedLoRU, MFedLoRU, PFedLoRU
from fedlora.rounds.base_updates import BaseUpdateLog, caught_up, pending_tensors
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, Recorder, ToyTrainer, products, toy_clients
from uploads import off

CLIENTS = toy_clients(3, 2)
accumulations = pytest.mark.parametrize("accumulate", ["keep", "reinit"])


def replies(m: Any, server: Any, index: int, trainer: ToyTrainer, states: MemoryStates, client=CLIENTS) -> list[Reply]:
    rnd = Round(index, 0)
    sent = {one: m.send(server, one, rnd) for one in client}
    return list(SimulationBackend(m, trainer.spec, client, states, trainer, 0).train_clients(rnd, sent, {}))


def run_rounds(
    m: Any, rounds: int, client: list[ClientInfo] = CLIENTS
) -> tuple[list[Merged[Any]], ToyTrainer, MemoryStates]:
    server, trainer, states, merged = m.init_server(SPEC, 0), ToyTrainer(), MemoryStates(), []
    for index in range(rounds):
        merged.append(merge(m, server, replies(m, server, index, trainer, states, client), SPEC))
        server = merged[-1].server
        trainer.merge_into_base(merged[-1].base_update or {})
    return merged, trainer, states


def view(m: Any, merged: list[Merged[Any]], state: Any = None) -> dict[str, torch.Tensor]:
    state = m.init_client(SPEC, CLIENTS[0], 0) if state is None else state
    return products(m.view(state, m.send(merged[-1].server, CLIENTS[0], Round(len(merged), 0)), CLIENTS[0]))


def test_that_never_accumulates_is_fedit_bit_for_bit():
    m, fedit = FedLoRU(rank=2, every=0), FactorAveraging(rank=2)
    one, other = view(m, run_rounds(m, 3)[0]), view(fedit, run_rounds(fedit, 3)[0])
    assert all(torch.equal(one[name], other[name]) for name in other)


@accumulations
def test_every_tau_rounds_the_mean_product_goes_into_the_base_and_the_model_stays(accumulate):
    m, plain = FedLoRU(rank=2, every=2, accumulate=accumulate), FedLoRU(rank=2, every=0)
    merged, _, _ = run_rounds(m, 2)
    assert [x.base_update is not None for x in merged] == [False, True]
    for name, before in view(plain, run_rounds(plain, 2)[0]).items():
        assert_close(merged[1].base_update[name].product(), before)
        assert not view(m, merged)[name].any()


@pytest.mark.parametrize(("accumulate", "jump"), [("keep", 1.0), ("reinit", 0.0)])
def test_training_goes_on_with_a_jump_by_the_product_or_with_none(accumulate, jump):
    m = FedLoRU(rank=2, every=1, accumulate=accumulate)
    merged, _, _ = run_rounds(m, 1)
    request = next(m.work(None, m.send(merged[0].server, CLIENTS[0], Round(1, 0)), CLIENTS[0], Round(1, 0)))
    for name, start in products(request.start).items():
        assert merged[0].base_update[name].product().norm() > 0.01
        assert_close(start, jump * merged[0].base_update[name].product())


@accumulations
def test_the_base_changes_by_the_sum_of_what_was_accumulated_of_rank_r_each(accumulate):
    merged, trainer, _ = run_rounds(FedLoRU(rank=2, every=2, accumulate=accumulate), 5)
    base_updates = [x.base_update for x in merged if x.base_update is not None]
    assert len(base_updates) == 2
    for name, base in trainer.base.items():
        assert_close(base, sum(base_update[name].product() for base_update in base_updates))
        assert torch.linalg.matrix_rank(base, rtol=1e-5) <= 2 * 2


@accumulations
@pytest.mark.parametrize("kind", [FedLoRU, PFedLoRU, MFedLoRU])
def test_the_logged_error_is_the_distance_of_the_models_change_from_the_mean_of_the_clients_models(kind, accumulate):
    m, trainer, states = kind(rank=2, every=2, accumulate=accumulate), Recorder(), MemoryStates()
    server, total = m.init_server(SPEC, 0), sum(one.examples for one in CLIENTS)
    for index in range(4):
        before = trainer.inner.weights(m.view({}, m.send(server, CLIENTS[0], Round(index, 0)), CLIENTS[0]))
        merged = merge(m, server, replies(m, server, index, trainer, states), SPEC)
        server = merged.server
        trainer.merge_into_base(merged.base_update or {})
        after = trainer.inner.weights(m.view({}, m.send(server, CLIENTS[0], Round(index + 1, 0)), CLIENTS[0]))
        own = [(one.examples / total, trainer.weights[one.id]) for one in CLIENTS]
        mean = {name: sum(w * (x[name] - before[name]) for w, x in own) for name in before}
        measured = off({name: after[name] - before[name] for name in before}, mean)
        assert merged.notes["aggregation_error"] == pytest.approx(measured, rel=1e-3)


def test_a_client_that_was_away_is_sent_every_accumulation_it_missed():
    merged, trainer, _ = run_rounds(FedLoRU(rank=2, every=1), 3)
    base_updates = BaseUpdateLog((0, 1, 2), {"late": 1})
    sent = caught_up(pending_tensors({i: merged[i].base_update for i in base_updates.pending("late")}, SPEC), SPEC)
    name = "layer.2.q"
    found = sum(base_update[name].product() for base_update in sent.values())
    assert_close(merged[0].base_update[name].product() + found, trainer.base[name], rtol=1e-5, atol=1e-6)


def test_pfedloru_trains_its_own_pair_first_and_never_sends_it():
    m = PFedLoRU(rank=2, personal_rank=1)
    state, download = m.init_client(SPEC, CLIENTS[0], 0), m.send(m.init_server(SPEC, 0), CLIENTS[0], Round(0, 0))
    job = m.work(state, download, CLIENTS[0], Round(0, 0))
    own = next(job)
    assert {part.rank for part in own.start.values()} == {1} and own.frozen_extra.keys() == own.start.keys()
    changed = {name: stack([(1.0, part)]) for name, part in own.start.items()}
    shared = job.send(Trained(changed))
    assert {part.rank for part in shared.start.values()} == {2} and shared.frozen_extra == changed
    with pytest.raises(StopIteration) as done:
        job.send(Trained(shared.start))
    state, upload = done.value.value
    assert state == changed
    assert {tuple(x.shape) for x in upload.flat().values()} == {tuple(x.shape) for x in download.values()}


def test_pfedloru_uses_both_pairs_and_without_a_personal_rank_it_is_fedloru():
    m, states = PFedLoRU(rank=2, personal_rank=1, every=0), MemoryStates()
    merged, _, states = run_rounds(m, 2)
    state = states.client_state(CLIENTS[0], 2)
    shared = view(FedLoRU(rank=2), merged)
    for name, both in view(m, merged, state).items():
        assert state[name].product().norm() > 0.01
        assert_close(both, shared[name] + state[name].product())
    plain, none = FedLoRU(rank=2, every=2), PFedLoRU(rank=2, personal_rank=0, every=2)
    one, other = view(plain, run_rounds(plain, 3)[0]), view(none, run_rounds(none, 3)[0], {})
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_mfedloru_at_the_full_rank_is_fedloru():
    m, plain = MFedLoRU(rank=2, every=2), FedLoRU(rank=2, every=2)
    one, other = run_rounds(m, 3)[0], run_rounds(plain, 3)[0]
    assert all(torch.allclose(x, view(plain, other)[name], atol=1e-5) for name, x in view(m, one).items())


def test_mfedloru_adds_the_mean_of_the_clients_products_to_both_factors():
    m, client = MFedLoRU(rank=3), toy_clients(3, [1, 3, 2])
    server, total = m.init_server(SPEC, 0), sum(one.examples for one in client)
    found = replies(m, server, 0, ToyTrainer(), MemoryStates(), client)
    factors = merge(m, server, found, SPEC).server.factors
    for name, (out, in_) in SPEC.modules.items():
        assert [sum(x.numel() for key, x in r.upload.flat().items() if key.startswith(name)) for r in found] == [
            rank * (out + 3) + rank * (3 + in_) for rank in (1, 3, 2)
        ]
        b, a = (
            sum(r.weight / total * r.upload.values[f"{name}.{side}.b"] @ r.upload.values[f"{name}.{side}.a"] for r in found)
            for side in "ba"
        )
        assert_close(factors[name].b, server.factors[name].b + b, rtol=1e-5, atol=1e-6)
        assert_close(factors[name].a, server.factors[name].a + a, rtol=1e-5, atol=1e-6)


def test_mfedloru_sends_a_module_of_fixed_rank_at_that_rank():
    spec, client = replace(SPEC, rank_pattern={"layer.2.q": 4}), toy_clients(1, 1)[0]
    found = []
    for m in (MFedLoRU(rank=3), FedLoRU(rank=3)):
        server = m.init_server(spec, 0)
        sent = replies(m, server, 0, ToyTrainer(spec), MemoryStates(), [client])
        found.append(merge(m, server, sent, spec).server.factors["layer.2.q"].product())
    assert_close(*found, rtol=1e-4, atol=1e-6)
