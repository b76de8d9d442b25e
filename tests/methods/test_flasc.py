"""The exact laws of FLASC."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Adapter, Scaling, pack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.sparse import pack_positions, position_bytes, unpack_positions
from fedlora.messages import ClientInfo, Reply, Round, Trained, Upload
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.flasc import FLASC, FlascState
from fedlora.rounds.client import ClientStart, train_clients
from fedlora.rounds.codec import decode_state, encode_state

from merging import merge
from toy import SPEC, Recorder, toy_clients
from uploads import factors, rejection

RANK, RND = 4, Round(0, 0)
TOTAL = sum(RANK * (out + in_) for out, in_ in SPEC.modules.values())  # 132
START = FlascState(factors(RANK, "start", spec=SPEC, size=0.4))
PLAIN = FLASC(RANK, optimizer="sgd", server_lr=1.0)


def flat(adapter: Adapter) -> Tensor:
    return torch.cat([x.flatten() for x in pack(adapter).values()])


def keep_largest(vector: Tensor, count: int) -> Tensor:
    """All but the `count` entries of largest magnitude set to zero, by sorting."""
    order = vector.abs().argsort(descending=True, stable=True)
    return torch.zeros_like(vector).index_put((order[:count],), vector[order[:count]])


def run_rounds(m: Any, server: Any, client: ClientInfo, rnd: Round = RND) -> tuple[Reply, Recorder]:
    trainer = Recorder()
    done = train_clients(
        m, trainer, [ClientStart(client, m.init_client(SPEC, client, 0), m.send(server, client, rnd))], rnd
    )[0]
    return Reply(client, rnd, done.upload, 1.0), trainer


def viewed(m: FLASC, server: FlascState, client: ClientInfo) -> Tensor:
    return flat(m.view(m.init_client(SPEC, client, 0), m.send(server, client, RND), client))


def dense(reply: Reply, density: float = 0.25) -> Tensor:
    """The change that a reply stands for, zeros where nothing was sent."""
    count = int(density * TOTAL * reply.client.rank / RANK)
    sent = unpack_positions(reply.upload.choices["positions"], count, TOTAL)
    return torch.zeros(TOTAL).masked_scatter(sent, reply.upload.values["changes"])


@pytest.mark.parametrize("density", [0.01, 0.25, 0.9, 1.0])
def test_a_client_starts_from_the_largest_weights_over_all_modules_and_factors(density):
    m = FLASC(RANK, density_down=density)
    client, count = toy_clients(1, RANK)[0], int(density * TOTAL)
    wanted = keep_largest(flat(START.adapter), count)
    assert torch.equal(viewed(m, START, client), wanted) and int(wanted.count_nonzero()) == count
    request = next(m.work(m.init_client(SPEC, client, 0), m.send(START, client, RND), client, RND))
    assert torch.equal(flat(request.start), wanted) and request.mask is None and request.train == {"b", "a"}


@pytest.mark.parametrize("density", [0.01, 0.25, 0.9, 1.0])
def test_a_client_uploads_its_largest_changes_since_the_masked_start(density):
    m, client = FLASC(RANK, density_up=density), toy_clients(1, RANK)[0]
    reply, trainer = run_rounds(m, START, client)
    change = flat(trainer.last["0"]) - viewed(m, START, client)
    assert torch.equal(dense(reply, density), keep_largest(change, int(density * TOTAL)))
    assert reply.upload.values["changes"].shape == (int(density * TOTAL),)
    assert reply.upload.choices["positions"].nbytes == position_bytes(int(density * TOTAL), TOTAL)


def test_in_the_first_round_only_a_is_sent_since_b_is_zero():
    m = FLASC(RANK)
    view = m.view(
        m.init_client(SPEC, toy_clients(1)[0], 0),
        m.send(m.init_server(SPEC, 0), toy_clients(1, RANK)[0], RND),
        toy_clients(1, RANK)[0],
    )
    assert not any(part.b.any() for part in view.values()) and any(part.a.any() for part in view.values())


def test_the_server_adds_the_mean_change_to_its_dense_vector_and_not_to_what_it_sent():
    clients = toy_clients(5, [4, 2, 1, 4, 3])[1:4]
    replies = [run_rounds(PLAIN, START, client)[0] for client in clients]
    after = flat(merge(PLAIN, START, replies, SPEC).server.adapter)
    mean = torch.stack([dense(reply).double() for reply in replies]).mean(0)
    assert_close(after.double(), flat(START.adapter).double() + mean, rtol=1e-6, atol=1e-6)
    nobody = mean == 0
    assert torch.equal(after[nobody], flat(START.adapter)[nobody])
    assert (viewed(PLAIN, START, clients[0])[nobody] == 0).any()  # some of what stayed had not even been sent


def test_the_weights_are_those_of_the_replies():
    clients = toy_clients(3, RANK)
    replies = [replace(run_rounds(PLAIN, START, client)[0], weight=float(client.examples)) for client in clients]
    after = flat(merge(PLAIN, START, replies, SPEC).server.adapter)
    mean = sum(reply.weight * dense(reply).double() for reply in replies) / sum(reply.weight for reply in replies)
    assert_close(after.double(), flat(START.adapter).double() + mean, rtol=1e-6, atol=1e-6)


def test_with_all_entries_and_plain_addition_it_is_fedit_with_uniform_weights():
    m, fedit = replace(PLAIN, density_down=1.0, density_up=1.0), FactorAveraging(RANK)
    server, plain, clients = m.init_server(SPEC, 0), fedit.init_server(SPEC, 0), toy_clients(3, RANK)
    for index in range(3):
        rnd = Round(index, 0)
        server = merge(m, server, [run_rounds(m, server, client, rnd)[0] for client in clients], SPEC).server
        equal = [replace(run_rounds(fedit, plain, client, rnd)[0], weight=1.0) for client in clients]
        plain = merge(fedit, plain, equal, SPEC).server
        assert_close(pack(server.adapter), dict(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_servers_adamw_is_torchs_bit_for_bit_also_when_resumed(density, decay, tmp_path):
    m = FLASC(RANK, density, density, server_lr=0.03, server_decay=decay)
    vector = flat(START.adapter).clone()
    twin = torch.optim.AdamW([vector], lr=0.03, weight_decay=decay, foreach=False, fused=False)
    server = START
    for index in range(4):
        replies = [run_rounds(m, server, client, Round(index, 0))[0] for client in toy_clients(3, RANK)]
        vector.grad = -(sum(dense(reply, density).double() for reply in replies) / 3).float()
        twin.step()
        server = merge(m, server, replies, SPEC).server
        assert torch.equal(flat(server.adapter), vector)
        file = tmp_path / str(index)
        file.write_bytes(encode_state(server))
        server = decode_state(str(file))[0]


def test_a_client_of_lower_rank_trains_all_and_has_less_traffic():
    for rank, count in ((4, 33), (2, 16), (1, 8)):
        client = ClientInfo("x", rank, 10)
        reply, trainer = run_rounds(FLASC(RANK), START, client)
        assert {part.rank for part in trainer.last["x"].values()} == {RANK}
        assert len(reply.upload.values["changes"]) == len(FLASC(RANK).send(START, client, RND)["values"]) == count


@pytest.mark.parametrize(
    ("density", "total", "count"), [(0.29, 100, 29), (0.009, 100, 0), (1.0, 7, 7), (1e-05, 200_000, 2)]
)
def test_a_density_is_the_decimal_number_as_written_rounded_down(density, total, count):
    assert FLASC(RANK)._count(density, RANK, total) == count


def test_nothing_at_all_can_be_sent_and_merged():
    m, client = FLASC(RANK, 0.001, 0.001, optimizer="sgd"), toy_clients(1, RANK)[0]
    reply, _ = run_rounds(m, START, client)
    assert sum(x.numel() for x in reply.upload.flat().values()) == 0
    assert torch.equal(flat(merge(m, START, [reply], SPEC).server.adapter), flat(START.adapter))


@pytest.mark.parametrize(("index", "b_sent"), [(0, False), (2, True)])
def test_a_static_mask_stays_as_it_was_in_its_round(index, b_sent):
    m, clients = replace(PLAIN, static_from=index), toy_clients(3, RANK)
    server, masks = m.init_server(SPEC, 0), []
    for i in range(5):
        sent = m.send(server, clients[0], Round(i, 0))
        masks.append(unpack_positions(sent["positions"], TOTAL // 4, TOTAL))
        server = merge(m, server, [run_rounds(m, server, client, Round(i, 0))[0] for client in clients], SPEC).server
    assert all(torch.equal(mask, masks[index]) for mask in masks[index:])
    assert index == 0 or not torch.equal(masks[0], masks[index])
    view = m.view(m.init_client(SPEC, clients[0], 0), m.send(server, clients[0], RND), clients[0])
    assert b_sent == any(part.b.any() for part in view.values())
    thin = m.send(server, ClientInfo("thin", 1, 10), RND)
    assert not (unpack_positions(thin["positions"], TOTAL // 16, TOTAL) & ~masks[index]).any()


def test_if_only_what_was_sent_is_trained_nothing_else_moves():
    m, client = FLASC(RANK, train_sent_only=True), toy_clients(1, RANK)[0]
    reply, trainer = run_rounds(m, START, client)
    sent = unpack_positions(m.send(START, client, RND)["positions"], TOTAL // 4, TOTAL)
    assert not flat(trainer.last["0"])[~sent].any()
    assert not dense(reply)[~sent].any() and dense(reply)[sent].count_nonzero() > 20


def test_the_gate_takes_any_choice_of_the_right_number_and_refuses_all_else():
    m, client = FLASC(RANK), ClientInfo("0", RANK, 10)
    reply, _ = run_rounds(m, START, client)
    changes, positions = reply.upload.values["changes"], reply.upload.choices["positions"]

    def reason(changes: Tensor = changes, positions: Tensor = positions) -> str:
        return rejection(m, START, replace(reply, upload=Upload({"changes": changes}, {"positions": positions})), SPEC)

    def places(count: int) -> Tensor:
        return pack_positions(torch.randperm(TOTAL, generator=torch.Generator().manual_seed(1)) < count)

    assert reason() == reason(positions=places(33)) == ""
    assert "expected 33 positions out of 132, got 34" in reason(positions=places(34))
    assert "positions of 33 out of 132 are 17 bytes" in reason(positions=positions[1:])
    assert "sent choice/positions as torch.int8" in reason(positions=positions.view(torch.int8))
    assert "sent changes with shape (32,), expected (33,)" in reason(changes=changes[1:])
    assert "NaN" in reason(changes=changes * torch.nan)


def test_the_largest_entries_are_those_of_the_factors_of_peft():
    spec, client = replace(SPEC, scaling=Scaling(4.0 * RANK)), ClientInfo("x", RANK, 10)
    download = PLAIN.send(START, client, RND)
    view, plain = (PLAIN.view(PLAIN.init_client(one, client, 0), download, client) for one in (spec, SPEC))
    assert all(torch.equal(part.b, 4 * plain[n].b) and torch.equal(part.a, plain[n].a) for n, part in view.items())
    job = PLAIN.work(PLAIN.init_client(spec, client, 0), download, client, RND)
    moved = {n: LowRank(b=part.b + 4 * START.adapter[n].b, a=part.a) for n, part in next(job).start.items()}
    with pytest.raises(StopIteration) as done:
        job.send(Trained(moved))
    change = {n: LowRank(b=x.b, a=torch.zeros_like(x.a)) for n, x in START.adapter.items()}
    sent = dense(Reply(client, RND, done.value.value[1], 1.0))
    assert_close(sent, keep_largest(flat(change), TOTAL // 4))
