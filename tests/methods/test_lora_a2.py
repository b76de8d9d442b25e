"""The exact laws of LoRA-A2."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import AdapterSpec, pack, pick, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.sparse import pack_positions, position_bytes, unpack_positions
from fedlora.messages import ClientInfo, Fit, FitRequest, Reply, Round, Upload
from fedlora.methods.flexlora import Sliced
from fedlora.methods.lora_a2 import LoRAA2, score
from fedlora.rounds.client import ClientStart, train_clients

from merging import merge
from toy import SPEC, Recorder, ToyTrainer, products, toy_clients
from uploads import factors, rejection

RANK, MODULES = 4, list(SPEC.modules)
M = LoRAA2(rank=RANK, b_rate=2.0)
START = Sliced(factors(RANK, "start", spec=SPEC, size=0.4), {})
ROUNDS = {"b": Round(0, 0), "a": Round(1, 0)}
SIZE = {side: [size[0 if side == "b" else 1] for size in SPEC.modules.values()] for side in ROUNDS}


def requests(client: ClientInfo, rnd: Round, server: Sliced = START) -> tuple[list[Fit], Reply, Recorder]:
    """What the client asks the toy's trainer for, and its reply."""

    class Listening(Recorder):
        def fit(self, some: Sequence[FitRequest], rnd: Round) -> Any:
            asked.extend(one.request for one in some)
            return super().fit(some, rnd)

    asked: list[Fit] = []
    trainer = Listening()
    done = train_clients(
        M, trainer, [ClientStart(client, M.init_client(SPEC, client, 0), M.send(server, client, rnd))], rnd
    )[0]
    return asked, Reply(client, rnd, done.upload, float(client.examples)), trainer


def chosen(reply: Reply) -> dict[str, Tensor]:
    """The ranks of each module that the reply names."""
    keep = unpack_positions(reply.upload.choices["positions"], reply.client.rank * len(MODULES), RANK * len(MODULES))
    return dict(zip(MODULES, torch.split(keep, RANK), strict=True))


def test_the_first_round_trains_b_and_rounds_alternate():
    for index, side in enumerate("baba"):
        asked, _, _ = requests(toy_clients(1, 2)[0], Round(index, 0))
        assert [request.train for request in asked] == [{side}, {side}]
        assert all(request.rates == {"b": 2.0} for request in asked)


@pytest.mark.parametrize("side", ROUNDS)
def test_the_probe_trains_all_ranks_for_one_epoch_and_training_starts_again_from_what_came(side):
    (probe, training), _, _ = requests(toy_clients(1, 2)[0], ROUNDS[side])
    assert (probe.epochs, probe.mask, training.epochs) == (1, None, None)
    for request in (probe, training):
        assert all(torch.equal(x, pack(START.adapter)[key]) for key, x in pack(request.start).items())
    shapes = {name: (1, RANK) if side == "b" else (RANK, 1) for name in MODULES}
    assert {key: x.shape for key, x in training.mask.items()} == {f"{n}.{side}": shape for n, shape in shapes.items()}


@pytest.mark.parametrize("side", ROUNDS)
def test_the_score_is_the_norm_of_the_change_of_each_ranks_product(side):
    before, moved = (factors(RANK, name, spec=SPEC)["layer.2.q"] for name in ("x", "y"))
    after = replace(before, **{side: getattr(moved, side)})
    dense = [torch.outer(after.b[:, i], after.a[i]) - torch.outer(before.b[:, i], before.a[i]) for i in range(RANK)]
    assert_close(score(before, after, side), torch.stack([x.norm() for x in dense]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ROUNDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_as_many_ranks_as_the_budget_has_are_trained_wherever_they_score_highest(side, rank):
    client, rnd = toy_clients(1, rank)[0], ROUNDS[side]
    (probe, training), reply, _ = requests(client, rnd)
    answer = ToyTrainer().fit_one(probe, client).adapter
    scores = torch.cat([score(START.adapter[name], unpack(pack(answer), LowRank)[name], side) for name in MODULES])
    keep = torch.cat([training.mask[f"{name}.{side}"].flatten() for name in MODULES])
    assert int(keep.sum()) == rank * len(MODULES)
    assert scores[keep].min() > scores[~keep].max()
    assert torch.equal(torch.cat(list(chosen(reply).values())), keep)


def test_of_equal_scores_the_first_modules_and_ranks_are_chosen():
    zero = Sliced({n: LowRank(b=0 * p.b, a=p.a) for n, p in START.adapter.items()}, {})
    (_, training), _, _ = requests(toy_clients(1, 2)[0], ROUNDS["a"], zero)  # b = 0: all scores are 0
    assert [x.flatten().tolist() for x in training.mask.values()] == [[True] * 4, [False] * 4]


def test_a_client_that_may_train_all_does_not_probe():
    asked, reply, _ = requests(toy_clients(1, RANK)[0], ROUNDS["b"])
    assert len(asked) == 1 and all(bool(x.all()) for x in asked[0].mask.values())
    assert len(reply.upload.choices["positions"]) == 0


@pytest.mark.parametrize("side", ROUNDS)
def test_the_upload_has_the_changes_of_the_chosen_ranks_and_their_positions_and_no_more(side):
    client = toy_clients(3, 2)[2]
    _, reply, trainer = requests(client, ROUNDS[side])
    counts = [int(own.sum()) for own in chosen(reply).values()]
    assert counts[0] != counts[1]  # the sizes of the modules show
    assert reply.upload.values["changes"].shape == (sum(n * size for n, size in zip(counts, SIZE[side], strict=True)),)
    assert reply.upload.choices["positions"].nbytes == position_bytes(2 * len(MODULES), RANK * len(MODULES))
    after = merge(M, START, [reply], SPEC).server.adapter
    for name, part in trainer.last[client.id].items():
        assert_close(after[name].b, part.b, rtol=1e-6, atol=1e-6)
        assert_close(after[name].a, part.a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ROUNDS)
def test_what_nobody_chose_and_the_other_factor_stay_bit_for_bit(side):
    replies = [requests(client, ROUNDS[side])[1] for client in toy_clients(3, [1, 2, 1])]
    after = merge(M, START, replies, SPEC).server.adapter
    untouched = 0
    for name, part in START.adapter.items():
        taken = torch.stack([chosen(reply)[name] for reply in replies]).any(0)
        untouched += int((~taken).sum())
        assert torch.equal(after[name].b[:, ~taken], part.b[:, ~taken]) and torch.equal(
            after[name].a[~taken], part.a[~taken]
        )
    assert untouched
    other = "a" if side == "b" else "b"
    assert all(torch.equal(x, pick(pack(after), other)[key]) for key, x in pick(pack(START.adapter), other).items())


@pytest.mark.parametrize("side", ROUNDS)
def test_the_merge_is_the_mean_of_the_products_over_those_who_took_part(side):
    clients = toy_clients(6, [1, 4, 2, 3, 1, 2])[1:5]
    answers = [requests(client, ROUNDS[side]) for client in clients]
    merged = merge(M, START, [reply for _, reply, _ in answers], SPEC)
    total = sum(client.examples for client in clients)
    for name, part in merged.server.adapter.items():
        each = zip(clients, answers, strict=True)
        mean = sum(client.examples / total * products(t.last[client.id])[name].double() for client, (_, _, t) in each)
        assert_close(part.product().double(), mean, rtol=1e-5, atol=1e-6)
    assert merged.notes["aggregation_error"] < 1e-6


def test_disjoint_choices_are_each_added_with_their_own_weight():
    clients = toy_clients(2, 1)
    masks = [torch.tensor([True, True, *[False] * 6]), torch.tensor([*[False] * 5, True, False, True])]
    sizes = [2 * SIZE["b"][0], 2 * SIZE["b"][1]]
    moves = [torch.arange(1.0, size + 1) for size in sizes]
    uploads = [Upload({"changes": x}, {"positions": pack_positions(mask)}) for x, mask in zip(moves, masks, strict=True)]
    replies = [Reply(client, ROUNDS["b"], up, float(client.examples)) for client, up in zip(clients, uploads, strict=True)]
    after = merge(M, START, replies, SPEC).server.adapter
    share, before = [client.examples / 27 for client in clients], START.adapter
    first, second = (x.view(2, -1).T for x in moves)
    assert_close(after[MODULES[0]].b[:, :2], before[MODULES[0]].b[:, :2] + share[0] * first)
    assert_close(after[MODULES[1]].b[:, [1, 3]], before[MODULES[1]].b[:, [1, 3]] + share[1] * second)


class Rolora:
    """RoLoRA with the rates of LoRA+: what comes out if all ranks are trained."""

    def answer(self, client: ClientInfo, rnd: Round, server: Mapping[str, LowRank]) -> dict[str, LowRank]:
        request = Fit(server, frozenset("a" if rnd.index % 2 else "b"), rates={"b": 2.0})
        return unpack(pack(ToyTrainer().fit_one(request, client).adapter), LowRank)


def test_with_the_whole_budget_it_is_rolora_with_two_learning_rates():
    clients, server, plain = toy_clients(3, RANK), START, dict(START.adapter)
    for index in range(4):
        rnd = Round(index, 0)
        server = merge(M, server, [requests(client, rnd, server)[1] for client in clients], SPEC).server
        trained = [(client.examples / 51, Rolora().answer(client, rnd, plain)) for client in clients]
        plain = {
            n: LowRank(b=sum(w * one[n].b for w, one in trained), a=sum(w * one[n].a for w, one in trained)) for n in plain
        }
        assert_close(pack(server.adapter), pack(plain), rtol=1e-4, atol=1e-5)


def test_a_fixed_rank_counts_in_the_budget_as_it_is():
    spec = AdapterSpec(SPEC.modules, SPEC.head, rank_pattern={MODULES[0]: 3})
    m, client = LoRAA2(rank=RANK), ClientInfo("0", 2, 10)
    server = m.init_server(spec, 0)
    done = train_clients(
        m,
        ToyTrainer(spec),
        [ClientStart(client, m.init_client(spec, client, 0), m.send(server, client, ROUNDS["b"]))],
        ROUNDS["b"],
    )[0]
    keep = unpack_positions(done.upload.choices["positions"], 3 + 2, 3 + RANK)
    assert int(keep.sum()) == 5
    merge(m, server, [Reply(client, ROUNDS["b"], done.upload, 10.0)], spec)


@pytest.mark.parametrize("side", ROUNDS)
def test_the_gate_takes_honest_choices_and_refuses_all_others(side):
    client, rnd = ClientInfo("0", 2, 10), ROUNDS[side]
    _, reply, _ = requests(client, rnd)
    changes, positions = reply.upload.values["changes"], reply.upload.choices["positions"]
    keep = torch.cat(list(chosen(reply).values()))

    def reason(changes: Tensor = changes, positions: Tensor | None = positions) -> str:
        choices = {} if positions is None else {"positions": positions}
        return rejection(M, START, replace(reply, upload=Upload({"changes": changes}, choices)), SPEC)

    assert reason() == ""
    assert "expected 4 positions out of 8, got 8" in reason(positions=~torch.zeros_like(positions))
    assert "expected 4 positions out of 8, got 0" in reason(positions=0 * positions)
    assert "positions of 4 out of 8 are 1 bytes" in reason(positions=positions.repeat(3))
    assert "sent choice/positions as torch.int64" in reason(positions=positions.long())
    assert "sent changes with shape" in reason(changes=changes[:-1])
    assert "sent changes with shape" in reason(changes=changes[None])
    assert "NaN" in reason(changes=changes * torch.nan)
    others = pack_positions(~keep)  # as many ranks, but of other modules: other sizes
    assert "sent changes with shape" in reason(positions=others)
    assert "missing choice/positions" in reason(positions=None)
