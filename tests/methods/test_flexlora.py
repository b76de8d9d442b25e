"""FlexLoRA and FRA-LoRA: everybody gets the best fit of its own rank."""

from dataclasses import replace

import pytest

from fedlora.adapter import pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Upload
from fedlora.methods.flexlora import FlexLoRA, FRALoRA
from fedlora.parts.dense import Dense

from uploads import SPEC, dense, drifted, mean_product, merged_by, off, replies_of_ranks, truncated, update

RANKS = (2, 6, 1, 4)


@pytest.mark.parametrize("split", ["left", "balanced"])
@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_each_client_gets_the_nearest_matrix_of_its_own_rank(rank, split):
    method, replies = FlexLoRA(rank=6, split=split), replies_of_ranks(*RANKS)
    found = update(method, merged_by(method, replies), rank)
    assert off(found, truncated(mean_product(replies), rank)) < 1e-6


def test_it_is_exact_where_the_rank_suffices():
    method, replies = FlexLoRA(rank=sum(RANKS)), replies_of_ranks(*RANKS)
    merged = merged_by(method, replies)
    assert off(update(method, merged), mean_product(replies)) < 1e-6
    assert merged.notes["aggregation_error"] < 1e-6


def test_the_logged_error_is_the_tail_of_the_singular_values():
    method, replies = FlexLoRA(rank=3), replies_of_ranks(*RANKS)
    mean = mean_product(replies)
    assert merged_by(method, replies).notes["aggregation_error"] == pytest.approx(off(truncated(mean, 3), mean), rel=1e-5)


def test_a_smaller_client_gets_the_leading_part_of_a_larger_ones():
    method = FlexLoRA(rank=6)
    server = merged_by(method, replies_of_ranks(*RANKS)).server
    small, large = server.leading(2), server.leading(5)
    for name, part in small.items():
        assert (part.b == large[name].b[:, :2]).all() and (part.a == large[name].a[:2]).all()


def test_without_training_a_direction_shrinks_by_the_weight_of_the_clients_that_reach_it():
    method = FlexLoRA(rank=4)
    merged = start = merged_by(method, replies_of_ranks(4, 4))
    replies = replies_of_ranks(1, 4, 2)
    reach = [sum(r.weight for r in replies if r.client.rank > j) / sum(r.weight for r in replies) for j in range(4)]
    for _ in range(3):
        sent = [replace(r, upload=Upload(pack(merged.server.leading(r.client.rank)))) for r in replies]
        merged = merged_by(method, sent, merged.server)
    for name, part in start.server.adapter.items():
        before, after = (dense(x).svd().S[:4] for x in (part, merged.server.adapter[name]))
        assert after.tolist() == pytest.approx([s * c**3 for s, c in zip(before.tolist(), reach, strict=True)], rel=1e-4)


@pytest.mark.parametrize("method", [FlexLoRA(rank=5), FRALoRA(rank=5)])
def test_one_client_keeps_its_product(method):
    replies = replies_of_ranks(5)
    assert off(update(method, merged_by(method, replies)), mean_product(replies)) < 1e-6


def test_with_equal_ranks_fra_lora_is_flexlora():
    replies = drifted(5, rank=3)
    one, other = FlexLoRA(rank=3), FRALoRA(rank=3)
    assert off(update(one, merged_by(one, replies)), update(other, merged_by(other, replies))) < 1e-6


@pytest.mark.parametrize("rank", [2, 5])
def test_uploads_of_products_give_what_uploads_of_factors_give(rank):
    replies = replies_of_ranks(*RANKS)
    uploads = [unpack(r.upload.values, LowRank) for r in replies]
    sent = [pack({name: Dense(part.product()) for name, part in upload.items()}) for upload in uploads]
    products = [replace(r, upload=Upload(upload)) for r, upload in zip(replies, sent, strict=True)]
    few, many = FRALoRA(rank=rank), FRALoRA(rank=rank, upload="dense")
    one, other = merged_by(few, replies), merged_by(many, products)
    assert off(update(few, one), update(many, other)) < 1e-6
    assert one.notes["aggregation_error"] == pytest.approx(other.notes["aggregation_error"], rel=1e-5)


def test_a_fixed_rank_of_a_module_is_every_clients():
    spec = replace(SPEC, rank_pattern={"layer.2.q": 4})
    method, replies = FlexLoRA(rank=3), replies_of_ranks(1, 3, 2, spec=spec)
    merged = merged_by(method, replies, spec=spec)
    assert {name: part.rank for name, part in merged.server.leading(2).items()} == {
        "layer.2.q": 4,
        "layer.10.v": 2,
        "layer.3.q": 2,
    }
    for name, rank in (("layer.2.q", 4), ("layer.3.q", 2)):
        found, mean = update(method, merged, 2, spec)[name], mean_product(replies)[name]
        assert off({name: found}, truncated({name: mean}, rank)) < 1e-6
