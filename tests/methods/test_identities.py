"""Where different methods must agree, and how their errors are ordered."""

from dataclasses import replace

import pytest

from fedlora.adapter import pack, pick
from fedlora.linalg.lowrank import LowRank
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.fedex_lora import FedExLoRA
from fedlora.methods.flexlora import FlexLoRA, FRALoRA
from fedlora.methods.flora import FLoRA
from fedlora.methods.flora_na import FLoRANA
from fedlora.methods.lora_fair import LoRAFAIR
from fedlora.rounds.base_updates import caught_up, pending_tensors

from uploads import ROUND, SPEC, dense, drifted, factors, mean_product, merged_by, off, replies_of, replies_of_ranks, update

RANK = 3
EXACT = [FLoRA(RANK), FedExLoRA(RANK), FedExLoRA(RANK, adapter="best"), FlexLoRA(rank=5 * RANK)]
FAIR = [LoRAFAIR(RANK, strength=s) for s in (0.0, 0.01, 10.0)] + [LoRAFAIR(RANK, loss="cos", steps=20)]
AVERAGING = [FactorAveraging(RANK), *FAIR, FLoRANA(RANK), FLoRANA(RANK, scope="model")]
ALL = [*EXACT, *AVERAGING, FlexLoRA(RANK), FlexLoRA(RANK, split="balanced"), FRALoRA(RANK)]


def name_of(method):
    return repr(method)


@pytest.mark.parametrize("method", EXACT, ids=name_of)
def test_exact_methods_give_the_weighted_mean_of_the_products_and_so_each_other(method):
    replies = drifted(5, RANK)
    assert off(update(method, merged_by(method, replies)), mean_product(replies)) < 1e-6


@pytest.mark.parametrize("method", [FLoRA(8), FlexLoRA(rank=7)], ids=name_of)
def test_exact_methods_for_unequal_ranks_give_the_weighted_mean_of_the_products(method):
    replies = replies_of_ranks(4, 1, 2)
    assert off(update(method, merged_by(method, replies)), mean_product(replies)) < 1e-6


@pytest.mark.parametrize("method", [*EXACT, *AVERAGING], ids=name_of)
def test_with_a_common_frozen_a_every_method_that_averages_is_exact(method):
    start, moves = factors(RANK, "start"), [factors(RANK, "move", i) for i in range(4)]
    replies = replies_of([{n: LowRank(b=part.b, a=start[n].a) for n, part in move.items()} for move in moves])
    merged = merged_by(method, replies)
    assert off(update(method, merged), mean_product(replies)) < 1e-6
    assert merged.notes["aggregation_error"] < 1e-6


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_one_client_and_identical_clients_keep_their_update(method, count):
    replies = replies_of([factors(RANK, "one")] * count)
    merged = merged_by(method, replies)
    assert off(update(method, merged), mean_product(replies)) < 1e-6
    assert merged.notes["aggregation_error"] < 1e-6


@pytest.mark.parametrize("middle", [FLoRANA(RANK), LoRAFAIR(RANK, strength=0.0)], ids=name_of)
@pytest.mark.parametrize("drift", [0.1, 0.5, 2.0])
def test_errors_are_ordered_from_the_best_fit_to_averaged_factors(middle, drift):
    replies = drifted(6, RANK, drift)
    least, between, most = (
        merged_by(method, replies).notes["aggregation_error"] for method in (FlexLoRA(RANK), middle, FactorAveraging(RANK))
    )
    assert least - 1e-6 <= between <= most + 1e-6


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_the_logged_error_is_the_distance_of_the_whole_update_from_the_mean_of_the_products(method):
    replies = drifted(4, RANK, drift=0.7)
    merged = merged_by(method, replies)
    measured = off(update(method, merged), mean_product(replies))
    assert merged.notes["aggregation_error"] == pytest.approx(measured, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", [FLoRA(RANK), FedExLoRA(RANK)], ids=name_of)
def test_a_client_that_missed_two_base_updates_gets_the_base_of_all_others(method):
    base_updates = [merged_by(method, drifted(count, RANK, seed=count)).base_update for count in (2, 4)]
    found = caught_up(pending_tensors(dict(enumerate(base_updates)), SPEC), SPEC)
    assert list(found) == [0, 1]
    for name in SPEC.modules:
        change = sum(base_update[name].product() for base_update in found.values())
        assert off({name: change.double()}, {name: sum(dense(base_update[name]) for base_update in base_updates)}) < 1e-6


@pytest.mark.parametrize(
    ("shared", "schedule", "error"),
    [("ba", ("ba",), "some"), ("ba", ("b", "a"), "none"), ("b", ("b",), "none"), ("a", ("ba",), "not logged")],
)
def test_averaging_logs_its_error_where_there_is_a_global_model(shared, schedule, error):
    method, start = FactorAveraging(RANK, shared=shared, schedule=schedule), pack(factors(RANK, "start"))
    trained = set(shared) & set(schedule[ROUND.index % len(schedule)])
    replies = [replace(reply, upload=pick(reply.upload, trained)) for reply in replies_of_ranks(RANK, RANK, RANK)]
    found = merged_by(method, replies, pick(start, shared)).notes.get("aggregation_error")
    assert error == ("not logged" if found is None else "none" if found < 1e-6 else "some")
