"""Kinds of tasks with kinds of parts, wrappers, packing, precisions and losses: each pair of them in a run."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from typing import get_args

import pytest
import torch

from fedlora.adapter import pack
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.lifecycle import begin, rounds
from fedlora.linalg.lowrank import LowRank
from fedlora.methods.table import TABLE
from fedlora.parts.dense import Dense
from fedlora.parts.dora import Dora
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.table import Part
from fedlora.parts.three_factor import ThreeFactor
from fedlora.parts.tied import Tied
from fedlora.parts.weight_change import WeightChange
from fedlora.rounds.progress import NullProgress
from fedlora.runs.folder import RunFolder
from fedlora.session import Session
from fedlora.tasks.table import tasks
from fedlora.train.hardware import fast_in_bf16
from tiers import fast
from tiny_tasks import tiny_task

PARTS = {
    "fedit": LowRank,
    "fed-sb": ThreeFactor,
    "ravan": Heads,
    "fedlease": Experts,
    "full-ft": WeightChange,
    "florg": Tied,
    "rolora": Dora,
}
"""A method for each kind of part; the one with `Dora` has `lora.dora`."""
FACTORS = {
    "task": tuple(tasks()),
    "method": tuple(PARTS),
    "wrapper": ("none", "fedprox", "frozen", "averaged", "local", "norms"),
    "packed": (True, False),
    "clients_per_step": (16, 1),
    "precision": ("fp32", "bf16"),
    "reduction": ("token", "example"),
}
"""The choices; a wrapper is FedProx, a rule for the head, or that norms are trained with the head."""
NEVER_PACKED = ("image-classification", "seq2seq")
"""Tasks whose models do not support packing."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-3, "bf16": 0.2}
"""The largest error of a tensor relative to its change by training."""


def pairs(case):
    """All pairs of two factors with their values in this case."""
    return set(combinations(sorted(case.items()), 2))


def all_pairs():
    return {
        tuple(sorted(zip(two, values, strict=True)))
        for two in combinations(FACTORS, 2)
        for values in product(*(FACTORS[factor] for factor in two))
    }


def covering_array():
    """Few cases with all pairs: each begins with a missing pair, and gets the values that add most pairs, or are rarest."""
    missing, cases, uses = all_pairs(), [], Counter()

    def gain(case):
        return len(pairs(case) & missing), -sum(uses[choice] for choice in case.items())

    while missing:
        case = dict(min(missing, key=str))
        for factor in [factor for factor in FACTORS if factor not in case]:
            case = max(({**case, factor: value} for value in FACTORS[factor]), key=gain)
        uses.update(case.items())
        missing -= pairs(case)
        cases.append({factor: case[factor] for factor in FACTORS})
    return cases


CASES = covering_array()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings of each kind of task; its model and examples are written at the first use."""
    home, made = tmp_path_factory.mktemp("home"), {}

    def of(kind):
        if kind not in made:
            made[kind] = tiny_task(kind, home / kind)
        return made[kind]

    return of


def experiment(settings, method, wrapper, **train):
    """Three clients, of unequal ranks if the method allows them."""
    head = wrapper if wrapper in ("frozen", "averaged", "local") else None
    ranks = {"ranks": [4, 2, 3]} if TABLE[method].mixed_ranks else {}
    return build(
        {
            **settings,
            "rounds": 2 if method == "fedlease" else 1,  # experts exist after the first
            "clients": {"count": 3, "partition": "iid", **ranks},
            "method": {"name": method, "rank": 4, "head": head, "norms": wrapper == "norms"},
            "lora": {**settings.get("lora", {}), "dora": PARTS[method] is Dora},
            "wrap": [{"name": "fedprox", "mu": 0.1}] if wrapper == "fedprox" else [],
            "train": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "batches": "random", "device": "cpu", **train},
            "evaluate": {"before": False},
        }
    )


def uneven(federated_data):
    """The same clients, with all, half and a third of their examples."""
    shares = [
        replace(share, train=share.train[: len(share.train) // (i + 1)])
        for i, share in enumerate(federated_data.partition.shares)
    ]
    clients = [
        replace(client, examples=len(share.train)) for client, share in zip(federated_data.clients, shares, strict=True)
    ]
    return replace(federated_data, partition=replace(federated_data.partition, shares=tuple(shares)), clients=clients)


def trained(given, path):
    """The adapters before and after a run, as tensors, and its rows; the run has the packing and precision of `given`."""
    session = Session.make(given, uneven(FederatedData.make(given)))
    assert session.adapted.packing.works is (given.train.packed and given.task.kind not in NEVER_PACKED)
    assert session.trainer.clients_per_step == given.train.clients_per_step
    assert session.adapted.model.dtype is DTYPES[given.train.precision]
    folder = RunFolder.create(path)
    try:
        start = begin(session, folder)
        before = session.adapters(start.run_state, folder, 0)
        state = rounds(session, folder, NullProgress(), session.simulation(folder), start)
        after = session.adapters(state, folder, given.rounds)
        parts = {type(part) for adapter in after.values() for part in adapter.values()}
        assert parts - {Dense} == {PARTS[given.method.name]}
        return flat(before), flat(after), folder.rows()
    finally:
        folder.release()


def flat(adapters):
    return {(client, key): x for client, adapter in adapters.items() for key, x in pack(adapter).items()}


def assert_same_as_twin(settings, path, task, packed, clients_per_step, **case):
    """The run ends as its twin, which has the other choices of packing and of the number of clients in a step."""
    if case["precision"] == "bf16" and not fast_in_bf16("cpu"):
        pytest.skip("this processor has no bf16 instructions")
    (before, one, rows), (_, other, twin_rows) = (
        trained(experiment(settings(task), **case, packed=how, clients_per_step=count), path / f"{how}-{count}")
        for how, count in ((packed, clients_per_step), (not packed, 17 - clients_per_step))
    )
    tolerance = TOLERANCES[case["precision"]]
    for row, twin in zip(rows, twin_rows, strict=True):
        assert sorted(row.accepted) == sorted(twin.accepted) == ["000", "001", "002"]
        assert row.train_loss == pytest.approx(twin.train_loss, rel=tolerance / 10)
        assert row.clients["loss"].each == pytest.approx(twin.clients["loss"].each, rel=tolerance / 10)
    assert one.keys() == other.keys()
    changes = {name: float((x - before.get(name, 0)).norm()) for name, x in one.items()}
    assert {name: float((x - other[name]).norm()) for name, x in one.items()} == {
        name: pytest.approx(0, abs=tolerance * change) for name, change in changes.items()
    }
    assert any(change and not key.endswith(".w") for (_, key), change in changes.items())


@pytest.mark.parametrize("case", fast(CASES, *CASES[:3]), ids=lambda case: "-".join(map(str, case.values())))
def test_each_pair_of_choices_trains_the_same_packed_and_padded_together_and_alone(settings, tmp_path, case):
    assert_same_as_twin(settings, tmp_path, **case)


MAIN = ("task", "method", "packed", "precision")


@pytest.mark.full
@pytest.mark.parametrize(MAIN, list(product(*(FACTORS[name] for name in MAIN))))
def test_all_tasks_and_parts_train_the_same_packed_and_padded(settings, tmp_path, task, method, packed, precision):
    assert_same_as_twin(
        settings, tmp_path, task, packed, 16, method=method, wrapper="none", precision=precision, reduction="token"
    )


def test_the_cases_have_each_pair_of_choices_and_each_kind_of_part():
    assert set(PARTS.values()) == set(get_args(Part))
    assert set().union(*map(pairs, CASES)) == all_pairs()


LABELLED = ("classification", "image-classification")


@pytest.mark.parametrize("task", FACTORS["task"])
def test_methods_that_need_labels_are_rejected_for_tasks_without_any(settings, task):
    given = build({**settings(task), "clients": {"partition": "iid"}, "method": {"name": "ce-lora"}})
    if task in LABELLED:
        assert FederatedData.make(given).labelled_data.labels
    else:
        with pytest.raises(UserError, match=f"'ce-lora' needs labelled examples, task.kind = '{task}' has no labels"):
            FederatedData.make(given)


REJECTED = [
    *(
        (
            {"method": {"name": name, "rank": 4}, "clients": {"count": 3, "ranks": [4, 2, 3]}},
            f"{name} needs the same rank 4",
        )
        for name in FACTORS["method"]
        if not TABLE[name].mixed_ranks
    ),
    *(
        (
            {"method": {"name": "full-ft", "scope": "all", "head": head}},
            f"'{head}': full-ft, as set, averages all parameters",
        )
        for head in ("frozen", "local")
    ),
    *(
        (
            {"task": {"kind": task, "class_weights": [1.0, 2.0]}, "train": {"reduction": "example"}},
            "train.reduction = 'token'",
        )
        for task in LABELLED
    ),
    *(
        ({"task": {"kind": task, "class_weights": [1.0, 2.0]}}, f"class_weights is not supported by task.kind = '{task}'")
        for task in FACTORS["task"]
        if task not in LABELLED
    ),
]


@pytest.mark.parametrize(("table", "reason"), REJECTED)
def test_choices_that_do_not_go_together_are_rejected_with_the_reason(table, reason):
    with pytest.raises(UserError, match=reason):
        build(table)
