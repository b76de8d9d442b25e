"""Where different methods must agree, and how their errors are ordered."""

from dataclasses import replace

import pytest

from fedlora.adapter import pack, pick
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Round, Upload
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.fedex_lora import FedExLoRA
from fedlora.methods.flexlora import FlexLoRA, FRALoRA
from fedlora.methods.flora import FLoRA
from fedlora.methods.flora_na import FLoRANA
from fedlora.methods.lora_fair import LoRAFAIR
from fedlora.methods.table import TABLE
from fedlora.rounds.base_updates import caught_up, pending_tensors

from merging import merge
from toy import SPEC as TOY
from toy import ToyTrainer, toy_clients, toy_method, toy_simulation
from uploads import (
    ROUND,
    SPEC,
    dense,
    drifted,
    factors,
    mean_product,
    measured_error,
    merged_by,
    off,
    replies_of,
    replies_of_ranks,
    update,
)

RANK = 3
EXACT = [FLoRA(RANK), FedExLoRA(RANK), FedExLoRA(RANK, adapter="best"), FlexLoRA(rank=5 * RANK)]
FAIR = [LoRAFAIR(RANK, strength=s) for s in (0.0, 0.01, 10.0)] + [LoRAFAIR(RANK, loss="cos", steps=20)]
AVERAGING = [FactorAveraging(RANK), *FAIR, FLoRANA(RANK), FLoRANA(RANK, scope="model")]
ALL = [*EXACT, *AVERAGING, FlexLoRA(RANK), FlexLoRA(RANK, split="balanced"), FRALoRA(RANK)]
MIXED = [FLoRA(RANK), FlexLoRA(RANK), FRALoRA(RANK), FLoRANA(RANK)]
WITHOUT_PRODUCT = {"fedsa-lora", "local-only", "flasc", "ce-lora", "fl-tac", "fedlease"}


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


@pytest.mark.parametrize(
    ("method", "ranks"), [*((m, [RANK] * 4) for m in ALL), *((m, [1, RANK, 2]) for m in MIXED)], ids=name_of
)
def test_the_logged_error_is_the_distance_of_what_the_merge_changes_from_the_mean_of_the_clients_changes(method, ranks):
    server = merged_by(method, drifted(3, RANK, seed=1)).server
    replies = replies_of_ranks(*ranks)
    merged = merged_by(method, replies, server)
    measured = measured_error(method, merged, replies, server)
    assert merged.notes["aggregation_error"] == pytest.approx(measured, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_with_one_client_of_the_largest_rank_every_logged_error_is_zero(name):
    row, clients, trainer = TABLE[name], toy_clients(1, RANK), ToyTrainer()
    method = toy_method(row, RANK, **({"every": 2} if "every" in row.settings() else {}))
    server, simulation = method.init_server(TOY, 0), toy_simulation(method, trainer, clients)
    for index in range(3):
        sent = {client: method.send(server, client, Round(index, 0)) for client in clients}
        merged = merge(method, server, simulation.train_clients(Round(index, 0), sent, {}), TOY)
        server = merged.server
        trainer.merge_into_base(merged.base_update or {})
        assert ("aggregation_error" in merged.notes) == (name not in WITHOUT_PRODUCT)
        assert merged.notes.get("aggregation_error", 0.0) < 1e-5


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
    [
        ("ba", ("ba",), "some"),
        ("ba", ("b", "a"), "none"),
        ("b", ("b",), "none"),
        ("a", ("ba",), "not logged"),
        ("", ("ba",), "not logged"),
    ],
)
def test_averaging_logs_its_error_where_there_is_a_global_model(shared, schedule, error):
    method, start = FactorAveraging(RANK, shared=shared, schedule=schedule), pack(factors(RANK, "start"))
    trained = set(shared) & set(schedule[ROUND.index % len(schedule)])
    drawn = replies_of_ranks(RANK, RANK, RANK)
    replies = [replace(reply, upload=Upload(pick(reply.upload.values, trained))) for reply in drawn]
    found = merged_by(method, replies, pick(start, shared)).notes.get("aggregation_error")
    assert error == ("not logged" if found is None else "none" if found < 1e-6 else "some")
