"""The exact laws of FedLEASE."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter import Tensors, lora_init, pack, pick
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Trained, Upload
from fedlora.methods.fedlease import Allocation, FedLEASE
from fedlora.methods.table import TABLE
from fedlora.parts.experts import Experts
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState

from merging import merge
from toy import SPEC, MemoryStates, Quiet, ToyTrainer, products, toy_clients, toy_method, toy_plan, toy_simulation
from uploads import rejection

RANK = 2
METHOD = FedLEASE(RANK)
GROUPS = [0, 1, 0, 2, 1, 2, 0]
WHO = toy_clients(len(GROUPS), RANK)
FLOATS = sum(RANK * (out + in_) for out, in_ in SPEC.modules.values())


def pair(group: int, client: int, noise: float = 0.2) -> Tensors:
    """A pair whose b points nearly where its group's does."""
    rng = torch.Generator()
    found = dict(pack(lora_init(SPEC, RANK, 0)))
    for key, b in pick(found, "b").items():
        common = torch.randn(b.shape, generator=rng.manual_seed(group))
        own = torch.randn(b.shape, generator=rng.manual_seed(100 + client))
        found[key] = common + noise * own
    for key, a in pick(found, "a").items():
        found[key] = a + 0.1 * torch.randn(a.shape, generator=rng.manual_seed(200 + client))
    return found


def replies(uploads: Sequence[Tensors], client: Sequence[ClientInfo] = WHO, index: int = 0) -> list[Reply]:
    sent = zip(client, uploads, strict=True)
    return [Reply(one, Round(index, 0), Upload(upload), float(one.examples)) for one, upload in sent]


def warm(method: FedLEASE = METHOD) -> Allocation:
    """The server after the warm-up of all seven."""
    uploads = [pair(group, i) for i, group in enumerate(GROUPS)]
    return merge(method, method.init_server(SPEC, 0), replies(uploads), SPEC).server


def mean(uploads: Sequence[Tensors], client: Sequence[ClientInfo]) -> Tensors:
    total = sum(one.examples for one in client)
    return {key: sum(one.examples / total * x[key] for one, x in zip(client, uploads, strict=True)) for key in uploads[0]}


def moved(download: Tensors, client: int) -> Tensors:
    """What a client might upload that was sent this."""
    rng = torch.Generator().manual_seed(client)
    return {key: x + torch.randn(x.shape, generator=rng) for key, x in pick(download, "bag").items()}


def request(download: Tensors, method: FedLEASE = METHOD, index: int = 1) -> tuple[Any, Any]:
    job = method.work(method.init_client(SPEC, WHO[0], 0), download, WHO[0], Round(index, 0))
    return job, next(job)


def test_in_the_warm_up_clients_train_pairs_of_their_own_and_nothing_comes_down():
    method, trainer = FedLEASE(RANK, warmup_rounds=3), ToyTrainer()
    simulation, server, clients = toy_simulation(method, trainer, WHO[:3]), method.init_server(SPEC, 0), WHO[:3]
    for index in range(2):
        rnd = Round(index, 0)
        sent = {client: method.send(server, client, rnd) for client in clients}
        before = {client.id: simulation.view(client, {}, rnd) for client in clients}
        found = list(simulation.train_clients(rnd, sent, {}))
        server = merge(method, server, found, SPEC).server
        assert all(not x for x in sent.values())
        for reply in found:
            alone = trainer.fit_one(replace(request({})[1], start=before[reply.client.id]), reply.client).adapter
            assert all(torch.equal(x, pack(alone)[key]) for key, x in reply.upload.values.items())
            assert sum(x.numel() for x in reply.upload.flat().values()) == FLOATS
    assert not server.downloads and server.first.keys() == {"0", "1", "2"}


def test_all_start_from_the_same_pair_of_update_zero():
    first = METHOD.view(METHOD.init_client(SPEC, WHO[0], 0), {}, WHO[0])
    assert not any(x.any() for x in products(first).values())
    other = METHOD.init_client(SPEC, WHO[1], 0)
    assert all(torch.equal(x, other[key]) for key, x in pack(first).items())


def test_after_the_warm_up_clients_whose_b_point_alike_share_an_expert():
    server = warm()
    assert [server.members[client.id] for client in WHO] == GROUPS
    assert len(server.downloads) == 3 and not server.first


def test_the_warm_up_lasts_its_rounds_and_each_client_counts_with_its_latest_pair():
    method = FedLEASE(RANK, warmup_rounds=3)
    server: Any = method.init_server(SPEC, 0)
    come = {0: ([0, 1, 2, 3, 4], 9), 1: ([4, 5, 6], 9), 2: ([0, 1, 2, 3], 0)}  # later pairs replace earlier ones
    for index, (some, shift) in come.items():
        assert not server.downloads
        uploads = [pair((GROUPS[i] + shift) % 10 if i < 4 else GROUPS[i], i) for i in some]
        server = merge(method, server, replies(uploads, [WHO[i] for i in some], index), SPEC).server
    assert [server.members[client.id] for client in WHO] == GROUPS


def test_an_expert_starts_at_the_mean_of_its_members_pairs():
    server = warm()
    for cluster, download in enumerate(server.downloads):
        members = [i for i, group in enumerate(GROUPS) if group == cluster]
        wanted = mean([pair(cluster, i) for i in members], [WHO[i] for i in members])
        assert_close(pick(download, "ba"), wanted)


def test_a_download_is_the_own_expert_its_router_and_the_others_in_their_order():
    server = warm()
    for cluster, download in enumerate(server.downloads):
        others = [other for i, other in enumerate(server.downloads) if i != cluster]
        for name, (_, in_) in SPEC.modules.items():
            assert download[f"{name}.g"].shape == (5, in_) and 0.5 < download[f"{name}.g"].abs().max() * in_**0.5 <= 1
            for factor in "ba":
                stacked = torch.stack([other[f"{name}.{factor}"] for other in others])
                assert torch.equal(download[f"{name}.others_{factor}"], stacked)
    routers = [download["layer.2.q.g"] for download in server.downloads]
    assert not torch.equal(routers[0], routers[1])
    assert all(METHOD.send(server, client, Round(1, 0)) is server.downloads[GROUPS[i]] for i, client in enumerate(WHO))


def test_what_travels_after_the_warm_up_is_as_the_row_says():
    job, asked = request(download := warm().downloads[1])
    with pytest.raises(StopIteration) as done:
        job.send(Trained(asked.start))
    up, down = (sum(x.numel() for x in tensors.values()) for tensors in (done.value.value[1].flat(), download))
    routers = sum((2 * 3 - 1) * in_ for _, in_ in SPEC.modules.values())
    assert (up, down) == (FLOATS + routers, 3 * FLOATS + routers)


def test_a_client_trains_its_expert_and_router_and_leaves_the_others():
    _, asked = request(warm().downloads[1])
    assert asked.train == {"b", "a", "g"}
    trained = ToyTrainer().fit_one(asked, WHO[1]).adapter
    for name, part in asked.start.items():
        assert isinstance(part, Experts)
        assert trained[name].others_b is part.others_b and trained[name].others_a is part.others_a
        assert all(not torch.equal(getattr(trained[name], k), getattr(part, k)) for k in "bag")


def test_experts_and_routers_are_averaged_over_the_members_that_came():
    server, present = warm(), [1, 2, 4, 6]  # none of cluster 2
    uploads = [moved(server.downloads[GROUPS[i]], i) for i in present]
    after = merge(METHOD, server, replies(uploads, [WHO[i] for i in present], 1), SPEC).server
    for cluster in (0, 1):
        own = [(x, WHO[i]) for x, i in zip(uploads, present, strict=True) if GROUPS[i] == cluster]
        assert_close(pick(after.downloads[cluster], "bag"), mean(*map(list, zip(*own, strict=True))))
        assert torch.equal(after.downloads[2]["layer.2.q.others_b"][cluster], after.downloads[cluster]["layer.2.q.b"])
    kept = pick(server.downloads[2], "bag")
    assert all(torch.equal(x, kept[key]) for key, x in pick(after.downloads[2], "bag").items())


def test_a_client_that_missed_the_warm_up_uses_its_own_pair_and_joins_the_nearest_cluster():
    server, late = warm(), ClientInfo("late", RANK, 50)
    assert METHOD.send(server, late, Round(1, 0)) == {}
    found = [*replies([moved(server.downloads[0], 0)], WHO[:1], 1), *replies([pair(2, 77)], [late], 1)]
    after = merge(METHOD, server, found, SPEC).server
    assert after.members == {**server.members, "late": 2}
    assert METHOD.send(after, late, Round(2, 0)) is after.downloads[2]
    kept = pick(server.downloads[2], "bag")
    assert all(torch.equal(x, kept[key]) for key, x in pick(after.downloads[2], "bag").items())


def test_the_gate_expects_of_each_client_what_its_phase_makes():
    server, late = warm(), ClientInfo("late", RANK, 50)
    routed, own = moved(server.downloads[0], 0), pair(0, 0)

    def reason(client: ClientInfo, upload: Tensors) -> str:
        return rejection(METHOD, server, *replies([upload], [client], 1), SPEC)

    assert "missing" in reason(WHO[1], own) and "unexpected" in reason(late, routed)
    assert reason(WHO[0], routed) == reason(late, own) == ""


@pytest.mark.parametrize("settings", [{"experts": 1}, {"max_experts": 1}])
def test_with_one_expert_there_is_no_router_and_it_is_fedit(settings):
    found = []
    for name, own in (("fedlease", settings), ("fedit", {})):
        method, trainer, states = toy_method(replace(TABLE[name], head="averaged"), **own), ToyTrainer(), MemoryStates()
        clients, progress = toy_clients(4), RunState(method.init_server(SPEC, 0))
        simulation, plan = toy_simulation(method, trainer, clients), toy_plan(method, trainer)
        for index in range(3):
            progress, _ = one_round(plan, simulation, states, progress, index, Quiet())
        rnd = Round(3, 0)
        found.append(simulation.view(clients[0], method.send(progress.server, clients[0], rnd), rnd))
    lease, fedit = found
    assert {type(part) for name, part in lease.items() if name in SPEC.modules} == {LowRank}
    assert all(torch.equal(x, products(fedit)[name]) for name, x in products(lease).items())


def test_a_given_number_of_experts_is_made_whatever_the_silhouette_says():
    found = {count: warm(FedLEASE(RANK, experts=count)) for count in (1, 2, 4)}
    assert {count: len(server.downloads) for count, server in found.items()} == {1: 1, 2: 2, 4: 4}
    assert not any(".g" in key or "others" in key for key in found[1].downloads[0])


def test_each_round_after_the_warm_up_notes_how_many_experts_there_are():
    method = FedLEASE(RANK, warmup_rounds=2)
    uploads = [pair(group, i) for i, group in enumerate(GROUPS)]
    first = merge(method, method.init_server(SPEC, 0), replies(uploads), SPEC)
    second = merge(method, first.server, replies(uploads, index=1), SPEC)
    assert first.notes == {} and second.notes == {"experts": 3.0}


def test_what_a_client_computes_depends_on_the_input_by_its_router():
    part = METHOD.view({}, warm().downloads[0], WHO[0])["layer.2.q"]
    shares = part.weights(torch.randn(50, 7, generator=torch.Generator().manual_seed(0)))
    assert_close(shares.sum(-1), torch.ones(50))
    assert (shares[:, 0] > 0).all() and shares.std(0).min() > 0.01


def test_a_client_whose_b_is_zero_hinders_nobody():
    uploads = [pair(group, i) for i, group in enumerate(GROUPS)]
    uploads[3] = {key: torch.zeros_like(x) if key.endswith(".b") else x for key, x in uploads[3].items()}
    server = merge(METHOD, METHOD.init_server(SPEC, 0), replies(uploads), SPEC).server
    assert all(bool(x.isfinite().all()) for download in server.downloads for x in download.values())
    rest = [i for i in range(len(GROUPS)) if i != 3]
    assert len({(GROUPS[i], server.members[WHO[i].id]) for i in rest}) == 3
