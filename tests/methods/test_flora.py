"""FLoRA: the stack goes into the base."""

from dataclasses import replace

import pytest
import torch

from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.methods.flora import FLoRA
from fedlora.rounds.client import ClientStart, train_clients

from toy import Recorder, ToyTrainer, toy_clients
from uploads import ROUND, SPEC, dense, mean_product, merged_by, off, replies_of_ranks, update


@pytest.mark.parametrize("ranks", [(3,), (3, 3), (4, 1, 7, 2), (8, 8, 8, 8, 8)])
def test_the_base_moves_by_the_weighted_mean_of_the_products(ranks):
    method, replies = FLoRA(rank=8), replies_of_ranks(*ranks)
    merged = merged_by(method, replies)
    assert off(update(method, merged), mean_product(replies)) < 1e-6
    assert merged.notes["aggregation_error"] < 1e-6


def test_the_base_update_has_the_sum_of_the_ranks_while_that_is_smaller_than_the_matrix():
    few, many = (merged_by(FLoRA(), replies_of_ranks(*ranks)).base_update for ranks in ((4, 1, 2), (8, 8, 8)))
    assert {part.rank for part in few.values()} == {7}
    assert {name: part.rank for name, part in many.items()} == {name: min(shape) for name, shape in SPEC.modules.items()}


def test_the_order_of_clients_does_not_change_the_fold():
    replies = replies_of_ranks(4, 1, 7)
    one, other = (update(FLoRA(), merged_by(FLoRA(), some)) for some in (replies, replies[::-1]))
    assert off(one, other) < 1e-6


def test_after_the_base_update_everybody_starts_from_the_aggregate():
    client, method = ClientInfo("0", 4, 10), FLoRA(rank=8)
    request = next(method.work(method.init_client(SPEC, client, 0), {}, client, ROUND))
    assert all(not dense(part).any() and part.a.any() for part in request.start.values())


@pytest.mark.parametrize(("draw", "common"), [("client", False), ("shared", True)])
def test_fresh_factors_are_new_in_each_round_and_shared_only_if_so_set(draw, common):
    method = FLoRA(rank=4, draw=draw)

    def start(name: str, rank: int, rnd) -> LowRank:
        client = ClientInfo(name, rank, 10)
        return next(method.work(method.init_client(SPEC, client, 0), {}, client, rnd)).start["layer.2.q"]

    assert torch.equal(start("x", 4, ROUND).a[:2], start("y", 2, ROUND).a) == common
    assert not torch.equal(start("x", 4, ROUND).a, start("x", 4, replace(ROUND, index=2)).a)
    assert torch.equal(start("x", 4, ROUND).a, start("x", 4, replace(ROUND, attempt=1)).a)


def test_with_a_shared_draw_identical_clients_are_as_one():
    method, trainer = FLoRA(rank=3, draw="shared"), Recorder(ToyTrainer(skew=0.0))
    for client in toy_clients(3):
        train_clients(method, trainer, [ClientStart(client, method.init_client(trainer.spec, client, 0), {})], ROUND)
    for name in trainer.spec.modules:
        one, *others = (trainer.weights[client][name] for client in trainer.weights)
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("ranks", [(1, 3, 2), (3, 1, 2)])
def test_the_base_update_has_no_columns_of_zeros_whatever_the_rank_of_the_first_client(ranks):
    spec = replace(SPEC, rank_pattern={"layer.3.q": 1})  # as large as layer.2.q, where the first client has rank 1
    base_update = merged_by(FLoRA(), replies_of_ranks(*ranks, spec=spec), spec=spec).base_update
    assert {name: part.rank for name, part in base_update.items()} == {"layer.2.q": 6, "layer.10.v": 6, "layer.3.q": 3}
    assert all(part.b.any(0).all() and part.a.any(1).all() for part in base_update.values())
