"""The exact laws of CE-LoRA."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.linalg.mixture import Mixtures
from fedlora.linalg.subspace import frame
from fedlora.linalg.transport import mixture_distance
from fedlora.messages import ClientInfo, Fit, FitRequest, Reply, Round, Upload
from fedlora.methods.ce_lora import CELoRA, Cores, median
from fedlora.methods.wrap.head import HeadRule
from fedlora.rounds.client import ClientStart, train_clients
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, Recorder, ToyTrainer, products, toy_clients
from uploads import rejection

CLIENTS = toy_clients(3, 4)
METHOD = CELoRA(rank=4, std=0.5, data_weight=0.0)  # a std large enough for plain gradient descent to learn
BOTH = replace(METHOD, data_weight=0.3)
KEYS = {f"{name}.c" for name in SPEC.modules}
ROUND = Round(1, 0)


@dataclass(frozen=True)
class Alone(CELoRA):
    """S = I."""

    def _shares(self, server: Cores, ids: Sequence[str], one: str) -> Tensor:
        return torch.eye(len(ids), dtype=torch.float64)[ids.index(one)]


def run_rounds(m: CELoRA, rounds: int, client: list[ClientInfo] = CLIENTS) -> tuple[Cores, MemoryStates]:
    server, states = m.init_server(SPEC, 0), MemoryStates()
    for index in range(rounds):
        server = merge(m, server, replies(m, server, index, states, client), SPEC).server
    return server, states


def replies(m: CELoRA, server: Cores, index: int, states: MemoryStates, client: list[ClientInfo] = CLIENTS) -> list[Reply]:
    rnd = Round(index, 0)
    simulation = SimulationBackend(m, SPEC, client, states, ToyTrainer(), 0)
    return list(simulation.train_clients(rnd, {one: m.send(server, one, rnd) for one in client}, {}))


def view(m: CELoRA, server: Cores, states: MemoryStates, client: ClientInfo, rounds: int) -> dict[str, Tensor]:
    return products(
        SimulationBackend(m, SPEC, CLIENTS, states, ToyTrainer(), 0).view(client, m.send(server, client, ROUND), ROUND)
    )


def known(*cores: Tensor, m: CELoRA = METHOD) -> Cores:
    """A server that has these from clients "0", "1", ..., the same for all modules."""
    return replace(m.init_server(SPEC, 0), last={str(i): dict.fromkeys(KEYS, c) for i, c in enumerate(cores)})


def points(*places: float, cores: Sequence[Tensor] = ()) -> Cores:
    """A server whose clients "0", "1", ... each have two examples at a place of their own: d is the squared distance."""
    told = {
        str(i): {"counts": torch.tensor([2]), "weights": torch.ones(2) / 2}
        | {"means": torch.full((2, 1), place), "variances": torch.ones(2, 1)}
        for i, place in enumerate(places)
    }
    replies = [
        Reply(toy_client(client), ROUND, Upload(dict.fromkeys(KEYS, core), data), 1.0)
        for core, (client, data) in zip(cores or [drawn(i) for i in range(len(places))], told.items(), strict=True)
    ]
    return merge(BOTH, BOTH.init_server(SPEC, 0), replies, SPEC).server


def drawn(seed: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


def toy_client(name: str) -> ClientInfo:
    return ClientInfo(name, 4, 10)


def shares(m: CELoRA, server: Cores) -> Tensor:
    """S, row by row."""
    ids = sorted(server.last)
    return torch.stack([m._shares(server, ids, one) for one in ids])


def told(trainer: Any = None, m: CELoRA = BOTH) -> tuple[Reply, Any]:
    """What a client uploads the first time, and what it was sent."""
    client, rnd = CLIENTS[0], Round(0, 0)
    download = m.send(m.init_server(SPEC, 0), client, rnd)
    done = train_clients(m, trainer or Recorder(), [ClientStart(client, m.init_client(SPEC, client, 0), download)], rnd)[0]
    return Reply(client, rnd, done.upload, float(client.examples)), download


def test_only_the_core_travels_both_ways():
    server, states = run_rounds(METHOD, 2)
    for reply in replies(METHOD, server, 2, states):
        assert {key: tuple(x.shape) for key, x in reply.upload.flat().items()} == dict.fromkeys(KEYS, (4, 4))
        download = METHOD.send(server, reply.client, ROUND)
        assert {key: tuple(x.shape) for key, x in download.items()} == dict.fromkeys(KEYS, (4, 4))


def test_the_update_starts_at_zero_and_the_first_step_moves_b_alone():
    start = METHOD.view(METHOD.init_client(SPEC, CLIENTS[0], 0), METHOD.init_server(SPEC, 0).start, CLIENTS[0])
    assert not any(x.any() for x in products(start).values())
    trained = ToyTrainer(steps=1).fit_one(Fit(start, frozenset("bca")), CLIENTS[0]).adapter
    for name, part in trained.items():
        assert part.b.norm() > 1e-3 and torch.equal(part.c, torch.eye(4)) and torch.equal(part.a, start[name].a)


def test_all_three_factors_are_trained_and_a_download_leaves_b_and_a_alone():
    server, states = run_rounds(METHOD, 2)
    before, after = states.saved["1", 0], states.saved["1", 1]
    assert before.keys() == after.keys() and not any(torch.equal(before[key], after[key]) for key in before)
    start = METHOD.init_server(SPEC, 0).start
    assert not any(torch.equal(core[key], start[key]) for core in server.last.values() for key in start)
    seen = METHOD.view(after, METHOD.send(server, CLIENTS[1], ROUND), CLIENTS[1])
    assert all(part.b is after[f"{name}.b"] and part.a is after[f"{name}.a"] for name, part in seen.items())


def test_where_nobody_is_like_another_training_is_purely_local():
    m = Alone(rank=4, std=0.5)
    server, states = run_rounds(m, 3)
    for client in CLIENTS:
        alone_server, alone_states = run_rounds(METHOD, 3, [client])
        one, other = view(m, server, states, client, 3), view(METHOD, alone_server, alone_states, client, 3)
        assert all(torch.equal(one[name], other[name]) and one[name].norm() > 0.1 for name in one)


def test_cores_with_nothing_in_common_come_back_to_their_owners():
    """Of rank one, along directions that are orthogonal to each other and to (1, 1, 1, 1)."""
    signs = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    cores = [torch.outer(sign, drawn(i)[0]) for i, sign in enumerate(signs)]
    assert_close(shares(METHOD, known(*cores)), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    for i, core in enumerate(cores):
        assert_close(METHOD.send(known(*cores), toy_client(str(i)), ROUND), dict.fromkeys(KEYS, core))


def test_cores_that_are_all_alike_come_back_as_their_plain_mean():
    cores = [drawn(0) @ frame(4, 4, torch.Generator().manual_seed(i)) for i in range(3)]
    for i in range(3):
        download = METHOD.send(known(*cores), toy_client(str(i)), ROUND)
        assert_close(download, dict.fromkeys(KEYS, sum(cores) / 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["l1", "softmax"])
@pytest.mark.parametrize("include_self", [True, False])
def test_rows_of_the_mixture_sum_to_one(normalizer, include_self):
    m = replace(BOTH, normalizer=normalizer, include_self=include_self)
    s = shares(m, points(0.0, 1.0, 3.0, 4.0, 9.0))
    assert_close(s.sum(1), torch.ones(5, dtype=torch.float64))
    assert ((s.diagonal() > 0).all() if include_self else (s.diagonal() == 0).all()) and (s >= 0).all()
    off_diagonal = s[~torch.eye(5, dtype=torch.bool)]
    assert (off_diagonal > 0).all() and off_diagonal.std() > 1e-3


def test_a_client_gets_its_own_core_back_in_the_largest_share():
    s = shares(METHOD, known(*(drawn(i) for i in range(5))))
    assert (s.argmax(1) == torch.arange(5)).all()


@pytest.mark.parametrize("include_self", [True, False])
def test_the_only_client_gets_its_own_core(include_self):
    m = replace(METHOD, include_self=include_self)
    assert_close(m.send(known(drawn(0)), toy_client("0"), ROUND), dict.fromkeys(KEYS, drawn(0)))


def test_cores_of_rank_one_are_averaged():
    cores = [torch.tensor([[float(i)]]) for i in range(3)]
    assert_close(shares(METHOD, known(*cores)), torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_who_is_absent_stays_in_the_mixture_with_its_last_core_and_who_is_new_gets_the_mean():
    server = known(drawn(0), drawn(1))
    fresh = Reply(toy_client("1"), ROUND, Upload(dict.fromkeys(KEYS, drawn(2))), 10.0)
    merged = merge(METHOD, server, [fresh], SPEC).server
    assert merged.last["0"] == server.last["0"] and merged.last["1"] == fresh.upload.values
    for client in "01":
        assert_close(
            METHOD.send(merged, toy_client(client), ROUND),
            METHOD.send(known(drawn(0), drawn(2)), toy_client(client), ROUND),
        )
    assert_close(METHOD.send(merged, toy_client("new"), ROUND), dict.fromkeys(KEYS, (drawn(0) + drawn(2)) / 2))


def test_a_core_of_weight_zero_is_not_kept():
    server = known(drawn(0), drawn(1))
    nothing = Reply(toy_client("1"), ROUND, Upload(dict.fromkeys(KEYS, drawn(2))), 0.0)
    assert merge(METHOD, server, [nothing], SPEC).server == server


@pytest.mark.parametrize("shared", [True, False])
def test_clients_draw_the_same_a_if_it_is_shared(shared):
    m = CELoRA(rank=4, shared_a=shared)
    one, other = (m.init_client(SPEC, client, 0) for client in CLIENTS[:2])
    for name in SPEC.modules:
        assert torch.equal(one[f"{name}.a"], other[f"{name}.a"]) == shared
        assert one[f"{name}.a"].std().item() == pytest.approx(1e-3, rel=0.4)


def test_the_server_holds_one_core_for_each_client():
    server, _ = run_rounds(METHOD, 2)
    assert sorted(server.last) == ["0", "1", "2"] and all(cores.keys() == KEYS for cores in server.last.values())


def test_mixtures_travel_once_and_after_that_exactly_the_cores():
    server, states = run_rounds(BOTH, 1)
    assert {client: one.means.shape for client, one in server.data.items()} == dict.fromkeys("012", (9, SPEC.features))
    for reply in replies(BOTH, server, 1, states):
        assert {key: tuple(x.shape) for key, x in reply.upload.flat().items()} == dict.fromkeys(KEYS, (4, 4))
        assert BOTH.send(server, reply.client, ROUND).keys() == KEYS
    assert BOTH.send(server, toy_client("new"), ROUND).keys() > KEYS


def test_without_a_part_for_the_data_nobody_is_asked():
    reply, download = told(m=METHOD)
    assert reply.upload.flat().keys() == KEYS == download.keys()


def test_a_client_that_was_not_accepted_is_asked_again():
    server = BOTH.init_server(SPEC, 0)
    nothing = Reply(CLIENTS[0], ROUND, told()[0].upload, 0.0)
    assert BOTH.send(merge(BOTH, server, [nothing], SPEC).server, CLIENTS[0], ROUND).keys() > KEYS


def test_asking_for_features_is_no_training():
    class Listening(Recorder):
        def fit(self, some: Sequence[FitRequest], rnd: Round) -> Any:
            steps.extend(one.step for one in some)
            return super().fit(some, rnd)

    steps: list[int] = []
    told(Listening())
    assert steps == [0]


@pytest.mark.parametrize("tau", [None, 5.0])
def test_the_mixture_is_lambda_of_the_data_and_the_rest_of_the_cores(tau):
    m, server = replace(BOTH, tau=tau), points(0.0, 1.0, 3.0)
    d = torch.tensor([[0.0, 1, 9], [1, 0, 4], [9, 4, 0]], dtype=torch.float64)
    alike = torch.stack([shares_of_cores(server, i) for i in range(3)])
    s = 0.3 * torch.exp(-d / (tau or 4.0)) + 0.7 * alike
    assert_close(shares(m, server), s / s.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


def shares_of_cores(server: Cores, one: int) -> Tensor:
    """The likeness of cores before it is divided by the sum of the row, of which the client's own is 1."""
    row = METHOD._shares(server, ["0", "1", "2"], str(one))
    return row / row[one]


def test_where_data_are_far_apart_everyone_gets_its_own_core():
    m, cores = replace(BOTH, data_weight=1.0, tau=1e-3), [drawn(i) for i in range(3)]
    server = points(0.0, 10.0, 30.0, cores=cores)
    for i, core in enumerate(cores):
        assert_close(m.send(server, toy_client(str(i)), ROUND), dict.fromkeys(KEYS, core) | {}, rtol=0, atol=0)


def test_where_data_are_the_same_everyone_gets_the_plain_mean():
    m, cores = replace(BOTH, data_weight=1.0), [drawn(i) for i in range(3)]
    server = points(2.0, 2.0, 2.0, cores=cores)
    for i in range(3):
        assert_close(m.send(server, toy_client(str(i)), ROUND), dict.fromkeys(KEYS, sum(cores) / 3), rtol=1e-5, atol=1e-6)


def test_a_client_without_mixtures_is_like_nobody():
    empty = Mixtures(torch.tensor([1]), torch.zeros(0), torch.zeros(0, 1), torch.zeros(0, 1))
    m, server = replace(BOTH, data_weight=1.0), points(0.0, 1.0)
    reply = Reply(toy_client("2"), ROUND, Upload(dict.fromkeys(KEYS, drawn(2)), vars(empty)), 1.0)
    s = shares(m, merge(m, server, [reply], SPEC).server)
    assert s[2].tolist() == [0, 0, 1] and s[0, 2] == 0 and s[0, 1] > 0.1


def test_distances_are_those_of_the_mixtures_in_whatever_order_clients_come():
    uploads = {
        client.id: reply
        for client in CLIENTS
        for reply in [replies(BOTH, BOTH.init_server(SPEC, 0), 0, MemoryStates(), [client])[0]]
    }
    found = []
    for order in ("012", "201"):
        server = BOTH.init_server(SPEC, 0)
        for client in order:
            server = merge(BOTH, server, [uploads[client]], SPEC).server
        places = torch.tensor([list(server.data).index(client) for client in "012"])
        found.append(server.apart[places][:, places])
    assert torch.equal(*found) and torch.equal(found[0], found[0].T) and not found[0].diagonal().any()
    assert found[0][0, 2] == mixture_distance(server.data["0"], server.data["2"]) > 0.01


@pytest.mark.parametrize(
    ("key", "bend", "reason"),
    [
        ("counts", lambda x: x + 1, "add up to its 10"),
        ("counts", lambda x: torch.tensor([12, -1, -1]), "add up to its 10"),
        ("counts", lambda x: x[:2], "shape"),
        ("means", lambda x: x[1:], "shape"),
        ("means", lambda x: x[:, 1:], "shape"),
        ("means", lambda x: x * torch.nan, "NaN"),
        ("weights", lambda x: x * 2, "add up to 1"),
        ("weights", lambda x: x - 2 * x.roll(1), "add up to 1"),
        ("variances", lambda x: -x, "negative variances"),
    ],
)
def test_mixtures_that_are_none_are_refused(key, bend, reason):
    m = HeadRule(BOTH, "local")
    server, (reply, _) = m.init_server(SPEC, 0), told(m=m)
    bent = replace(reply.upload, choices={**reply.upload.choices, key: bend(reply.upload.choices[key])})
    assert reason in rejection(m, server, replace(reply, upload=bent), SPEC)
    assert not rejection(m, server, reply, SPEC)


@pytest.mark.parametrize("setting", ["data_weight=1.5", "tau=0.0"])
def test_settings_out_of_range_are_refused_before_anything_starts(setting):
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        build({"method": {"name": "ce-lora"}}, [f"method.{setting}"])


def test_the_median_of_an_even_count_is_the_mean_of_the_two_in_the_middle():
    for values in ([3.0], [1.0, 2.0], [5.0, 1.0, 2.0], [4.0, 1.0, 3.0, 9.0]):
        assert float(median(torch.tensor(values))) == statistics.median(values)
