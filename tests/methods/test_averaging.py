"""The exact laws of the methods that average factors; the head is beside the point here."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import pick
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Upload
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.table import TABLE
from fedlora.rounds.client import ClientStart, train_clients
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, Recorder, ToyTrainer, products, toy_clients

RANK = 3
CLIENTS = toy_clients(4, RANK)
TOTAL = sum(client.examples for client in CLIENTS)


def method(name: str) -> FactorAveraging:
    row = TABLE[name]
    made = row.make(**row.fixed_settings, rank=RANK)
    assert isinstance(made, FactorAveraging)
    return made


def gather(
    m: FactorAveraging, server: Any, index: int, states: MemoryStates, client: list[ClientInfo] = CLIENTS
) -> list[Reply]:
    trainer = ToyTrainer()
    rnd = Round(index, 0)
    simulation = SimulationBackend(m, trainer.spec, client, states, trainer, 0)
    return list(simulation.train_clients(rnd, {one: m.send(server, one, rnd) for one in client}, {}))


def after(m: FactorAveraging, rounds: int) -> tuple[dict[str, Tensor], MemoryStates]:
    server, states = m.init_server(SPEC, 0), MemoryStates()
    for index in range(rounds):
        server = merge(m, server, gather(m, server, index, states), SPEC).server
    return server, states


def adapter(m: FactorAveraging, server: Any, states: MemoryStates, client: ClientInfo, index: int) -> dict[str, LowRank]:
    return SimulationBackend(m, SPEC, CLIENTS, states, ToyTrainer(), 0).view(
        client, m.send(server, client, Round(index, 0)), Round(index, 0)
    )  # type: ignore[return-value]


def trained_products(m: FactorAveraging, server: Any, states: MemoryStates, index: int) -> dict[str, list[Tensor]]:
    """What each client's update is at the end of its local work in this round."""
    trainer, rnd = Recorder(), Round(index, 0)
    for client in CLIENTS:
        state = states.client_state(client, index) or m.init_client(trainer.spec, client, 0)
        train_clients(m, trainer, [ClientStart(client, state, m.send(server, client, rnd))], rnd)
    views = [products(trainer.last[client.id]) for client in CLIENTS]
    return {name: [view[name] for view in views] for name in views[0]}


def test_fedit_with_one_client_keeps_its_factors_bit_for_bit():
    m = method("fedit")
    server = m.init_server(SPEC, 0)
    replies = gather(m, server, 0, MemoryStates(), CLIENTS[2:3])
    merged = merge(m, server, replies, SPEC).server
    assert all(torch.equal(merged[key], replies[0].upload.values[key]) for key in merged)


def test_fedit_is_off_by_the_weighted_covariance_of_the_factors():
    m = method("fedit")
    server, states = after(m, 2)
    replies = gather(m, server, 2, states)
    merged = merge(m, server, replies, SPEC).server
    for name in SPEC.modules:
        b, a = merged[f"{name}.b"].double(), merged[f"{name}.a"].double()
        terms = [(r.weight / TOTAL, *(r.upload.values[f"{name}.{side}"].double() for side in "ba")) for r in replies]
        gap = sum(w * bk @ ak for w, bk, ak in terms) - b @ a
        assert gap.norm() > 1e-4
        assert_close(gap, sum(w * (bk - b) @ (ak - a) for w, bk, ak in terms), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ffa-lora", "rolora"])
def test_with_a_common_factor_the_product_of_means_is_the_mean_of_products(name):
    m = method(name)
    for index in range(4):
        server, states = after(m, index)
        expected = {
            module: sum(client.examples / TOTAL * p for client, p in zip(CLIENTS, all_products, strict=True))
            for module, all_products in trained_products(m, server, states, index).items()
        }
        merged, states = after(m, index + 1)
        view = adapter(m, merged, states, CLIENTS[0], index + 1)
        for module, mean in expected.items():
            assert_close(view[module].product(), mean, rtol=1e-6, atol=1e-6)


def test_ffa_lora_never_changes_a_on_any_node():
    m = method("ffa-lora")
    server, states = after(m, 3)
    start = m.init_client(SPEC, CLIENTS[0], 0)
    for client in CLIENTS:
        view = adapter(m, server, states, client, 3)
        assert all(torch.equal(view[name].a, start[f"{name}.a"]) for name in view)


def test_ffa_lora_updates_lie_in_the_row_space_of_the_first_a():
    m = method("ffa-lora")
    server, states = after(m, 3)
    for name, part in adapter(m, server, states, CLIENTS[0], 3).items():
        a = m.init_client(SPEC, CLIENTS[0], 0)[f"{name}.a"]
        inside = torch.linalg.pinv(a) @ a
        assert_close(part.product() @ inside, part.product(), rtol=1e-4, atol=1e-6)


def test_ffa_lora_with_sgd_sees_alpha_as_a_learning_rate():
    """alpha -> c alpha with lr -> lr / c^2 leaves every update where it was: alpha is no hyper-parameter of its own."""
    m, c = method("ffa-lora"), 3.0

    def updates(scale: float, lr: float) -> dict[str, Tensor]:
        view = m.view(m.init_client(SPEC, CLIENTS[0], 0), m.init_server(SPEC, 0), CLIENTS[0])
        found = {}
        for name, part in view.items():
            assert isinstance(part, LowRank)
            target, b = ToyTrainer().target("0")[name].double(), torch.zeros_like(part.b, dtype=torch.float64)
            for _ in range(6):
                b -= lr * scale * (scale * b @ part.a.double() - target) @ part.a.double().T
            found[name] = scale * b @ part.a.double()
        return found

    one, other = updates(1.0, 0.1), updates(c, 0.1 / c**2)
    assert all(torch.allclose(one[name], other[name], rtol=1e-12) for name in one)


def test_rolora_freezes_one_factor_in_turn_beginning_with_a():
    m = method("rolora")
    for index in range(4):
        before, states = after(m, index)
        merged = merge(m, before, gather(m, before, index, states), SPEC).server
        moved, still = ("b", "a") if index % 2 == 0 else ("a", "b")
        assert all(torch.equal(merged[key], x) for key, x in pick(before, still).items())
        assert not any(torch.equal(merged[key], x) for key, x in pick(before, moved).items())


def test_rolora_that_only_ever_trains_b_is_ffa_lora_bit_for_bit():
    only_b, ffa = FactorAveraging(RANK, shared="ba", schedule=("b",)), method("ffa-lora")
    (one, states_one), (other, states_other) = after(only_b, 3), after(ffa, 3)
    for client in CLIENTS:
        left, right = adapter(only_b, one, states_one, client, 3), adapter(ffa, other, states_other, client, 3)
        assert all(torch.equal(left[name].b, right[name].b) and torch.equal(left[name].a, right[name].a) for name in left)


def test_rolora_takes_its_phase_from_the_servers_round_and_not_from_the_client():
    m = method("rolora")
    server, _ = after(m, 1)
    newcomer = gather(m, server, 1, MemoryStates(), [ClientInfo("new", RANK, 5)])[0]
    assert {key.rpartition(".")[2] for key in newcomer.upload.values} == {"a"}


def test_fedsa_lora_uploads_a_only_and_a_download_leaves_b_alone():
    m = method("fedsa-lora")
    server, states = after(m, 2)
    assert {key.rpartition(".")[2] for key in server} == {"a"}
    kept = states.saved["1", 1]
    assert kept and all(
        torch.equal(adapter(m, server, states, CLIENTS[1], 2)[key.removesuffix(".b")].b, kept[key]) for key in kept
    )


def test_fedsa_lora_averages_a_by_examples():
    m = method("fedsa-lora")
    server, states = after(m, 1)
    replies = gather(m, server, 1, states)
    merged = merge(m, server, replies, SPEC).server
    for key in merged:
        assert_close(
            merged[key], sum(r.client.examples * r.upload.values[key] for r in replies) / TOTAL, rtol=1e-6, atol=1e-7
        )


def test_fedsa_lora_with_equal_b_everywhere_is_fedit_restricted_to_a():
    """In the first round all b are equal, and so both methods train and average the same a."""
    sa, it = method("fedsa-lora"), method("fedit")
    merged_sa = merge(sa, sa.init_server(SPEC, 0), gather(sa, sa.init_server(SPEC, 0), 0, MemoryStates()), SPEC)
    merged_it = merge(it, it.init_server(SPEC, 0), gather(it, it.init_server(SPEC, 0), 0, MemoryStates()), SPEC)
    assert all(torch.equal(merged_sa.server[key], x) for key, x in pick(merged_it.server, "a").items())


def test_local_only_gives_each_client_what_fedit_would_if_there_were_no_other():
    (_, states), m, one = after(method("local-only"), 3), method("fedit"), CLIENTS[1]
    server = m.init_server(SPEC, 0)
    for index in range(3):
        server = merge(m, server, gather(m, server, index, MemoryStates(), [one]), SPEC).server
    own = adapter(method("local-only"), {}, states, one, 3)
    assert all(
        torch.equal(own[name].product(), part.product()) for name, part in adapter(m, server, states, one, 3).items()
    )


def test_clients_of_unequal_ranks_cannot_be_averaged_and_both_are_named():
    m = method("fedit")
    server = m.init_server(SPEC, 0)
    good = gather(m, server, 0, MemoryStates(), CLIENTS[:1])[0]
    cut = {key: x[:, :1] if key.endswith(".b") else x[:1] for key, x in good.upload.values.items()}
    thin = Reply(CLIENTS[1], good.round, Upload(cut), 1.0)
    with pytest.raises(ValueError, match=r"client 1 sent \(12, 1\), client 0 sent \(12, 3\)"):
        merge(m, server, [good, thin], SPEC)
