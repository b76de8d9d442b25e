"""FedEx-LoRA: nothing of the mean of the products is lost."""

import pytest
import torch

from fedlora.adapter import unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Mean
from fedlora.methods.fedex_lora import FedExLoRA

from uploads import dense, drifted, factors, mean_product, merged_by, off, replies_of, truncated, update


@pytest.mark.parametrize("adapter", ["mean", "best"])
@pytest.mark.parametrize("count", [1, 2, 4, 10])
def test_base_and_adapter_together_move_by_the_mean_of_the_products(count, adapter):
    method, replies = FedExLoRA(rank=3, adapter=adapter), drifted(count, 3)
    merged = merged_by(method, replies)
    assert off(update(method, merged), mean_product(replies)) < 1e-6
    assert merged.notes["aggregation_error"] < 1e-6


def test_the_adapter_is_the_mean_of_the_factors():
    replies = drifted(4, 3)
    adapter = merged_by(FedExLoRA(rank=3), replies).server
    mean = unpack(Mean.of((r.weight, r.upload.values) for r in replies).tensors(), LowRank)
    assert all(torch.equal(adapter[name].b, mean[name].b) and torch.equal(adapter[name].a, mean[name].a) for name in mean)


def test_the_base_update_is_the_covariance_of_the_factors():
    replies = drifted(4, 3)
    merged, total = merged_by(FedExLoRA(rank=3), replies), sum(r.weight for r in replies)
    covariance = {}
    for name, centre in merged.server.items():
        parts = [(r.weight / total, unpack(r.upload.values, LowRank)[name]) for r in replies]
        covariance[name] = sum(w * (p.b - centre.b).double() @ (p.a - centre.a).double() for w, p in parts)
    assert off({name: dense(part) for name, part in merged.base_update.items()}, covariance) < 1e-5


@pytest.mark.parametrize("adapter", ["mean", "best"])
def test_the_base_update_has_at_most_one_rank_less_per_client_than_the_stack(adapter):
    base_update = merged_by(FedExLoRA(rank=2, adapter=adapter), drifted(4, 2)).base_update
    assert {part.rank for part in base_update.values()} == {6}
    wide = merged_by(FedExLoRA(rank=8, adapter=adapter), drifted(6, 8)).base_update
    assert all(part.rank == min(part.b.shape[0], part.a.shape[1]) for part in wide.values())


@pytest.mark.parametrize("residual_rank", [1, 2, 3])
def test_a_truncated_residual_is_the_best_fit_of_the_whole_one(residual_rank):
    replies = drifted(3, 3)
    whole, cut = (merged_by(FedExLoRA(rank=3, residual_rank=rank), replies) for rank in (0, residual_rank))
    wanted = truncated({name: dense(part) for name, part in whole.base_update.items()}, residual_rank)
    assert off({name: dense(part) for name, part in cut.base_update.items()}, wanted) < 1e-5
    assert 1e-3 < cut.notes["aggregation_error"] < 1


def test_a_residual_cut_at_its_own_rank_is_the_whole_one():
    replies = drifted(3, 3)
    whole, cut = (merged_by(FedExLoRA(rank=3, residual_rank=rank), replies).base_update for rank in (0, 6))
    assert all(torch.equal(whole[name].product(), cut[name].product()) for name in whole)


@pytest.mark.parametrize("common", ["b", "a"])
def test_clients_with_a_common_factor_leave_nothing_to_fold(common):
    start, moves = factors(3, "start"), [factors(3, "move", i) for i in range(4)]
    uploads = [{n: LowRank(**{**vars(part), common: getattr(start[n], common)}) for n, part in m.items()} for m in moves]
    merged = merged_by(FedExLoRA(rank=3), replies_of(uploads))
    size = max(float(dense(part).norm()) for part in merged.server.values())
    assert all(float(dense(part).norm()) < 1e-6 * size for part in merged.base_update.values())


def test_one_client_leaves_nothing_to_fold():
    assert merged_by(FedExLoRA(rank=3), drifted(1, 3)).base_update is None


def test_the_best_adapter_carries_the_largest_part():
    replies = drifted(4, 3)
    method = FedExLoRA(rank=3, adapter="best")
    adapter = {name: dense(part) for name, part in merged_by(method, replies).server.items()}
    assert off(adapter, truncated(mean_product(replies), 3)) < 1e-6
