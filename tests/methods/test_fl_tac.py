"""The exact laws of FL-TAC."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Scaling, lora_init, pack, pick
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Reply, Round, Upload
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.fl_tac import FLTAC, Clusters
from fedlora.methods.wrap.head import with_head
from fedlora.parts.dense import Dense
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, ToyTrainer, toy_clients
from uploads import factors as drawn
from uploads import plus

RANK, ROUND = 2, Round(1, 0)
TASKS = ("news", "mail", "code")
THREE = FLTAC(rank=RANK, tasks=3)
FREE = FLTAC(rank=RANK)


def adapter(task: str, client: int, drift: float) -> dict[str, LowRank | Dense]:
    """The task's own adapter and head, and what the client moved them by."""
    own = drawn(RANK, task, spec=SPEC), drawn(RANK, task, client, spec=SPEC, size=drift)
    rng = torch.Generator().manual_seed(100 * TASKS.index(task) + client)
    heads = {
        name: Dense(x * (1 + TASKS.index(task)) + drift * torch.randn(x.shape, generator=rng))
        for name, x in SPEC.head.items()
    }
    return {**plus(*own), **heads}


def replies(count: int = 9, drift: float = 0.1, tasks: tuple[str, ...] = TASKS) -> list[Reply]:
    """Clients "0", "1", ... of weights 10, 17, ..., with the tasks in turn."""
    clients = [ClientInfo(str(i), RANK, 10 + 7 * i, tasks[i % len(tasks)]) for i in range(count)]
    return [Reply(w, ROUND, Upload(pack(adapter(w.task, i, drift))), float(w.examples)) for i, w in enumerate(clients)]


def merged(m: FLTAC, some: list[Reply], server: Clusters | None = None) -> Merged[Clusters]:
    return merge(m, server or m.init_server(SPEC, 0), some, SPEC)


def mean(some: list[Reply]) -> dict[str, Tensor]:
    total = sum(reply.weight for reply in some)
    terms = [(reply.weight / total, reply.upload.values) for reply in some]
    return {key: sum(w * values[key].double() for w, values in terms).float() for key in terms[0][1]}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("m", [THREE, FREE], ids=["three", "free"])
def test_adapters_that_lie_apart_are_averaged_with_those_of_their_task_and_no_others(m):
    some = replies()
    found = merged(m, some)
    assert (found.notes["clusters"], found.notes["misclustered"], found.notes["merged_tasks"]) == (3, 0, 0)
    for reply in some:
        own = [other for other in some if other.client.task == reply.client.task]
        assert_close(m.send(found.server, reply.client, ROUND), mean(own), rtol=1e-5, atol=1e-6)


def test_members_of_a_cluster_receive_the_same_tensors_bit_for_bit():
    some = replies()
    server = merged(THREE, some).server
    for one, other in zip(some, some[3:], strict=False):
        assert_equal(THREE.send(server, one.client, ROUND), THREE.send(server, other.client, ROUND))


@pytest.mark.parametrize("drift", [0.1, 3.0])
def test_the_order_of_replies_does_not_matter(drift):
    some = replies(drift=drift)
    one, other = merged(THREE, some).server, merged(THREE, some[4:] + some[:4]).server
    for reply in some:
        assert_equal(THREE.send(one, reply.client, ROUND), THREE.send(other, reply.client, ROUND))


@pytest.mark.parametrize("alpha", [1.0 * RANK, 8.0 * RANK])
def test_adapters_are_compared_as_peft_has_them_whatever_alpha_is(alpha):
    """Two a and two b; the two a are twice as far apart as PEFT's b are, and so decide."""
    spec, m = replace(SPEC, scaling=Scaling(alpha)), FLTAC(rank=RANK, tasks=2)
    start, some = lora_init(spec, RANK, 0), []
    for i, (move_b, move_a) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        parts = {}
        for name, part in start.items():
            b, a = torch.zeros_like(part.b), part.a.clone()
            b[0, 0], a[0, 0] = alpha / RANK * move_b, a[0, 0] + 2 * move_a
            parts[name] = LowRank(b=b, a=a)
        some.append(Reply(ClientInfo(str(i), RANK, 10), ROUND, Upload(pack(parts)), 10.0))
    belongs = merge(m, m.init_server(spec, 0), some, spec).server.belongs
    assert belongs["0"] == belongs["1"] != belongs["2"] == belongs["3"]


@pytest.mark.parametrize("rule", ["method-managed", "averaged"])
def test_one_task_is_fedit(rule):
    found = []
    for m in (with_head(FLTAC(rank=RANK, tasks=1), rule), with_head(FactorAveraging(rank=RANK), "averaged")):
        server, states = m.init_server(SPEC, 0), MemoryStates()
        for index in range(3):
            rnd = Round(index, 0)
            turn = SimulationBackend(m, SPEC, toy_clients(3, RANK), states, ToyTrainer(), 0)
            sent = {client: m.send(server, client, rnd) for client in turn.clients()}
            server = merge(m, server, turn.train_clients(rnd, sent, {}), SPEC).server
        client = toy_clients(3, RANK)[1]
        found.append(pack(m.view(m.init_client(SPEC, client, 0), m.send(server, client, ROUND), client)))
    assert_equal(*found)


def test_where_nothing_has_gone_apart_all_are_averaged_together():
    some = replies(tasks=("news",), drift=1.0)
    found = merged(FREE, some)
    assert found.notes["clusters"] == 1 and found.notes["silhouette"] == 0
    assert_close(FREE.send(found.server, some[0].client, ROUND), mean(some), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("m", [THREE, FREE], ids=["three", "free"])
def test_equal_adapters_are_one_cluster_and_the_log_says_what_is_missing(m):
    some = [replace(reply, upload=Upload(pack(adapter("news", 0, 0.0)))) for reply in replies()]
    found = merged(m, some)
    assert found.notes["clusters"] == 1 and found.notes.get("missing", 2) == 2
    assert found.notes["merged_tasks"] == 2 and found.notes["misclustered"] == pytest.approx(2 / 3)
    assert_close(m.send(found.server, some[5].client, ROUND), dict(some[0].upload.values))


def test_two_tasks_in_one_cluster_are_told():
    notes = merged(FLTAC(rank=RANK, tasks=2), replies()).notes
    assert (notes["clusters"], notes["missing"], notes["merged_tasks"]) == (2, 0, 1)
    assert notes["misclustered"] == pytest.approx(1 / 3)


def test_nothing_is_said_about_tasks_that_are_not_known():
    nameless = [replace(reply, client=replace(reply.client, task="")) for reply in replies()]
    assert merged(THREE, nameless).notes.keys() == {"clusters", "silhouette", "missing"}


def test_no_more_adapters_than_tasks_are_a_cluster_each():
    some = replies(2)
    found = merged(THREE, some)
    assert found.notes["clusters"] == 2 and found.notes["missing"] == 0
    for reply in some:
        assert_close(THREE.send(found.server, reply.client, ROUND), dict(reply.upload.values))


def test_who_was_absent_goes_where_most_of_its_cluster_went():
    some = replies()
    before = merged(THREE, some).server
    came = [replace(r, upload=Upload(pack(adapter(r.client.task, 50, 0.0)))) for r in some[:6]]
    after = merged(THREE, came, before).server
    for absent, present in zip(some[6:], some, strict=False):
        assert_equal(THREE.send(after, absent.client, ROUND), THREE.send(after, present.client, ROUND))


def test_who_was_absent_with_all_of_its_cluster_keeps_what_it_had():
    some = replies()
    before = merged(THREE, some).server
    after = merged(THREE, [some[0], some[1], some[3], some[4]], before).server
    for reply in (some[2], some[5], some[8]):
        assert_equal(THREE.send(after, reply.client, ROUND), THREE.send(before, reply.client, ROUND))
    assert len(after.means) == 4


def test_who_has_never_taken_part_starts_from_the_beginning():
    server = merged(THREE, replies()).server
    assert_equal(THREE.send(server, ClientInfo("new", RANK, 5), ROUND), THREE.init_server(SPEC, 0).start)


def test_the_head_is_a_part_of_what_is_clustered_only_where_the_method_has_it():
    """Two tasks that differ in the head alone."""
    some = replies(8, drift=0.0, tasks=("news", "mail"))
    factors = pick(some[0].upload.values, "ba")
    alike = [replace(r, upload=Upload({**r.upload.values, **factors})) for r in some]
    assert merged(FREE, alike).notes["misclustered"] == 0
    bare = [replace(r, upload=Upload(factors)) for r in some]
    assert merged(FREE, bare).notes["clusters"] == 1


def test_no_name_of_a_task_travels():
    assert not any(task in key for reply in replies() for key in reply.upload.flat() for task in TASKS)
    download = THREE.send(merged(THREE, replies()).server, replies()[0].client, ROUND)
    assert download.keys() == replies()[0].upload.values.keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "fl-tac", "tasks": 0}, ["tasks = 0"]),
        (
            {"name": "fedit", "head": "method-managed"},
            ["head = 'method-managed'", "fedit", "allowed: frozen, averaged, local"],
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(given, words):
    with pytest.raises(UserError) as rejected:
        build({"method": given})
    assert all(word in str(rejected.value) for word in words) and "\n" not in str(rejected.value)
