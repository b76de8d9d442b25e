"""The exact laws of RAVAN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter import Tensors, pick
from fedlora.linalg.sparse import pack_positions
from fedlora.messages import ClientInfo, Fit, Reply, Round, Trained
from fedlora.methods.ravan import Cores, Ravan, chosen, others, own_heads
from fedlora.parts.heads import Heads
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, Recorder, ToyTrainer, products, toy_clients
from uploads import off, rejection

NAME = "layer.2.q"
METHOD = Ravan(rank=4, head_rank=2)
CLIENTS = toy_clients(3, [4, 1, 2])
ROUND = Round(3, 0)


def cores(seed: int = 0) -> Cores:
    """A server's state in the middle of a run."""
    rng = torch.Generator().manual_seed(seed)
    return Cores({key: torch.randn(c.shape, generator=rng) for key, c in METHOD.init_server(SPEC, 0).c.items()}, {})


def replies(server: Cores, client: list[ClientInfo] = CLIENTS, m: Ravan = METHOD, trainer: Any = None) -> list[Reply]:
    simulation = SimulationBackend(m, SPEC, client, MemoryStates(), trainer or ToyTrainer(), 0)
    return list(simulation.train_clients(ROUND, {one: m.send(server, one, ROUND) for one in client}, {}))


def trained_heads(reply: Reply, server: Cores, m: Ravan) -> dict[str, torch.Tensor]:
    """The heads of each module that the client chose, or was told to train."""
    packed = reply.upload.choices["heads"] if m.choose == "gradient" else m.send(server, reply.client, ROUND)["heads"]
    return own_heads(server.c, packed, server.trains(reply.client))


def told(m: Ravan, server: Cores, client: ClientInfo, rnd: Round = ROUND) -> dict[str, list[int]]:
    """The heads that the download names."""
    return {name: heads.tolist() for name, heads in told_in(m.send(server, client, rnd), client).items()}


def told_in(download: Tensors, client: ClientInfo) -> dict[str, torch.Tensor]:
    return own_heads(pick(download, "c"), download["heads"], dict.fromkeys(SPEC.modules, client.rank))


def view(server: Cores, m: Ravan = METHOD, client: ClientInfo = CLIENTS[0]) -> dict[str, Heads]:
    return m.view(m.init_client(SPEC, client, 0), m.send(server, client, ROUND), client)  # type: ignore[return-value]


def request(server: Cores, client: ClientInfo, m: Ravan = METHOD) -> tuple[Any, Fit]:
    job = m.work(m.init_client(SPEC, client, 0), m.send(server, client, ROUND), client, ROUND)
    return job, next(job)


def test_the_update_is_the_sum_of_the_scaled_heads():
    server, state = cores().c, METHOD.init_client(SPEC, CLIENTS[0], 0).factors
    for name, product in products(view(cores())).items():
        b, a, c = state[f"{name}.b"], state[f"{name}.a"], server[f"{name}.c"]
        assert_close(product, sum(b[:, 2 * i : 2 * i + 2] @ c[i] @ a[2 * i : 2 * i + 2] for i in range(4)))


def test_a_download_names_the_same_heads_in_whatever_order_its_tensors_come():
    for client in CLIENTS:
        download = METHOD.send(cores(), client, ROUND)
        turned = told_in(dict(reversed(download.items())), client)
        assert all(torch.equal(turned[name], heads) for name, heads in told_in(download, client).items())


def test_at_the_start_the_update_is_zero_and_every_head_has_a_gradient():
    start = view(METHOD.init_server(SPEC, 0))
    assert not any(x.any() for x in products(start).values())
    trained = ToyTrainer(steps=1).fit_one(Fit(start, frozenset("cs")), CLIENTS[0]).adapter
    for part in trained.values():
        assert (part.c.flatten(1).norm(dim=1) > 1e-4).all() and torch.equal(part.s, torch.ones(4))


def test_a_client_trains_as_many_heads_as_its_rank_beside_the_others():
    for client in CLIENTS:
        _, asked = request(cores(), client)
        assert asked.train == {"c", "s"} and {len(part.s) for part in asked.start.values()} == {client.rank}
        frozen_extra = asked.frozen_extra or {}
        assert (not frozen_extra) == (client.rank == 4)
        for name, whole in products(view(cores())).items():
            rest = frozen_extra[name].product() if frozen_extra else 0
            assert_close(asked.start[name].product() + rest, whole, rtol=1e-5, atol=1e-5)


def test_what_goes_up_is_the_product_of_scalar_and_core_for_the_trained_heads():
    for client in CLIENTS:
        job, asked = request(cores(), client)
        trained = {name: replace(part, s=part.s * 3, c=part.c + 1) for name, part in asked.start.items()}
        with pytest.raises(StopIteration) as done:
            job.send(Trained(trained))
        _, upload = done.value.value
        assert upload.flat().keys() == {f"{name}.c" for name in SPEC.modules}
        for name, part in asked.start.items():
            assert_close(upload.values[f"{name}.c"], 3 * (part.c + 1))


def test_each_head_becomes_the_weighted_mean_of_the_products_of_those_that_trained_it():
    server = cores()
    found = replies(server)
    merged = merge(METHOD, server, found, SPEC).server
    trained = {
        reply.client.id: dict(zip(told(METHOD, server, reply.client)[NAME], c, strict=True))
        for reply in found
        for c in [reply.upload.values[f"{NAME}.c"]]
    }
    state = METHOD.init_client(SPEC, CLIENTS[0], 0).factors
    for i in range(4):
        b, a = state[f"{NAME}.b"][:, 2 * i : 2 * i + 2], state[f"{NAME}.a"][2 * i : 2 * i + 2]
        sent = [(r.weight, b @ trained[r.client.id][i] @ a) for r in found if i in trained[r.client.id]]
        mean = sum(weight * product for weight, product in sent) / sum(weight for weight, _ in sent)
        assert_close(b @ merged.c[f"{NAME}.c"][i] @ a, mean, rtol=1e-5, atol=1e-6)


def test_a_head_that_nobody_trained_keeps_its_value():
    server, weak = cores(), CLIENTS[1:2]
    merged = merge(METHOD, server, replies(server, weak), SPEC).server
    for name in SPEC.modules:
        own = told(METHOD, server, weak[0])[name]
        same = [torch.equal(x, y) for x, y in zip(merged.c[f"{name}.c"], server.c[f"{name}.c"], strict=True)]
        assert [i for i in range(4) if not same[i]] == own and len(own) == 1


def test_heads_are_drawn_for_each_client_round_and_module_and_all_come_to_be_trained():
    drawn = {}
    for index in range(20):
        for client in (ClientInfo("x", 1, 9), ClientInfo("y", 1, 9)):
            for name, heads in told(METHOD, cores(), client, Round(index, 0)).items():
                drawn[index, client.id, name] = heads
    columns = [
        [drawn[index, client, name] for index in range(20)] for client in "xy" for name in ("layer.2.q", "layer.10.v")
    ]
    assert all(one != other for i, one in enumerate(columns) for other in columns[:i])
    assert all({heads[0] for heads in column} == {0, 1, 2, 3} for column in columns)


def test_by_weight_the_heads_of_the_largest_cores_are_trained_and_equal_ones_in_random_order():
    m = replace(METHOD, choose="weight")
    sizes = torch.tensor([0.1, 3.0, 1.0, 2.0])[:, None, None]
    server = Cores({key: c * sizes / c.norm(dim=(1, 2), keepdim=True) for key, c in cores().c.items()}, {})
    for rank, wanted in [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])]:
        assert told(m, server, ClientInfo("x", rank, 9))[NAME] == wanted
    start = m.init_server(SPEC, 0)
    first = {told(m, start, ClientInfo(str(i), 1, 9), Round(0, 0))[NAME][0] for i in range(30)}
    assert first == {0, 1, 2, 3}


def test_by_gradient_a_client_takes_the_heads_whose_cores_its_loss_falls_fastest_by():
    m, trainer = replace(METHOD, choose="gradient"), ToyTrainer()
    server, client = cores(), ClientInfo("x", 2, 9)
    assert m.send(server, client, ROUND).keys() == server.c.keys()
    (reply,) = replies(server, [client], m)
    own = trained_heads(reply, server, m)
    for name in SPEC.modules:
        falls = []
        for head in range(4):  # a small step down the head's own gradient, found by differences
            slope = torch.zeros(2, 2, dtype=torch.float64)
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                ends = []
                for step in (1e-3, -1e-3):
                    moved = {key: c.double().clone() for key, c in server.c.items()}
                    moved[f"{name}.c"][head, i, j] += step
                    start = {n: double(p, moved[f"{n}.c"]) for n, p in view(server, m).items()}
                    ends.append(float(trainer.loss(start, "x")))
                slope[i, j] = (ends[0] - ends[1]) / 2e-3
            falls.append(float(slope.norm()))
        assert own[name].tolist() == sorted(sorted(range(4), key=lambda i: -falls[i])[:2])


def double(part: Heads, c: torch.Tensor) -> Heads:
    return Heads(b=part.b.double(), c=c, s=part.s.double(), a=part.a.double())


def test_heads_that_clients_choose_are_averaged_over_those_that_chose_them():
    m, server = replace(METHOD, choose="gradient"), cores()
    found = replies(server, CLIENTS, m)
    merged = merge(m, server, found, SPEC).server
    own = {r.client.id: trained_heads(r, server, m)[NAME].tolist() for r in found}
    assert len({tuple(heads) for heads in own.values()}) == 3
    for head in range(4):
        came = [(r, own[r.client.id].index(head)) for r in found if head in own[r.client.id]]
        sent = [(r.weight, r.upload.values[f"{NAME}.c"][place]) for r, place in came]
        assert_close(merged.c[f"{NAME}.c"][head], sum(w * c for w, c in sent) / sum(w for w, _ in sent))


def test_a_client_that_chooses_more_heads_in_one_module_than_it_may_is_refused():
    m, server, client = replace(METHOD, choose="gradient"), cores(), ClientInfo("x", 1, 9)
    (reply,) = replies(server, [client], m)
    assert not rejection(m, server, reply, SPEC)
    marks = torch.zeros(4 * len(SPEC.modules), dtype=torch.bool)
    marks[: len(SPEC.modules)] = True
    bad = replace(reply, upload=replace(reply.upload, choices={"heads": pack_positions(marks)}))
    assert "expected [1, 1] heads" in rejection(m, server, bad, SPEC)


def test_when_all_train_all_heads_the_merge_is_exact_and_says_so():
    server, strong = cores(), toy_clients(3, 4)
    found = replies(server, strong)
    merged = merge(METHOD, server, found, SPEC)
    total = sum(r.weight for r in found)
    mean = {key: sum(r.weight / total * r.upload.values[key] for r in found) for key in server.c}
    assert merged.notes["aggregation_error"] < 1e-6
    assert_close(products(view(merged.server)), products(view(Cores(mean, {}))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choose", ["random", "gradient"])
def test_where_clients_train_some_heads_the_logged_error_is_against_the_mean_change_of_their_products(choose):
    m, server, trainer = replace(METHOD, choose=choose), cores(), Recorder()
    found = replies(server, m=m, trainer=trainer)
    merged, total = merge(m, server, found, SPEC), sum(r.weight for r in found)
    made, mean = {}, {}
    for name, whole in view(server, m).items():
        made[name] = view(merged.server, m)[name].product() - whole.product()
        mean[name] = -whole.product()
        for r in found:
            rest = others(whole, trained_heads(r, server, m)[name])
            mean[name] += r.weight / total * (trainer.last[r.client.id][name].product() + rest.product())
    assert off(made, mean) > 1e-2
    assert merged.notes["aggregation_error"] == pytest.approx(off(made, mean), rel=1e-3)


@pytest.mark.parametrize("init", ["normal", "orthogonal"])
def test_outer_factors_are_common_and_of_length_one(init):
    m = Ravan(rank=8, head_rank=40, init=init)
    one, other = (m.init_client(SPEC, client, 0).factors for client in CLIENTS[:2])
    for name in SPEC.modules:
        assert all(torch.equal(one[f"{name}.{k}"], other[f"{name}.{k}"]) for k in "ba")
        lengths = one[f"{name}.b"].square().sum(0), one[f"{name}.a"].square().sum(1)
        assert all(x.mean().item() == pytest.approx(1, abs=0.1) for x in lengths)


def test_orthogonal_heads_have_orthonormal_factors_where_they_fit():
    for name, (out, in_) in SPEC.modules.items():
        state = replace(METHOD, rank=2, init="orthogonal").init_client(SPEC, CLIENTS[0], 0).factors
        b, a = state[f"{name}.b"], state[f"{name}.a"]
        assert min(out, in_) >= 4
        assert_close(b.mT @ b, torch.eye(4))
        assert_close(a @ a.mT, torch.eye(4))


def test_the_attainable_rank_is_that_of_all_heads_together():
    m = Ravan(rank=3, head_rank=2)
    server = Cores({key: torch.eye(2).expand(3, 2, 2) for key in m.init_server(SPEC, 0).c}, {})
    assert torch.linalg.matrix_rank(products(view(server, m))[NAME]) == 6


def test_some_heads_and_the_others_are_all_heads():
    part = view(cores())[NAME]
    for heads in (torch.tensor([2]), torch.tensor([0, 3]), torch.tensor([0, 1, 2, 3])):
        both = chosen(part, heads).product() + others(part, heads).product()
        assert_close(both, part.product(), rtol=1e-5, atol=1e-5)
