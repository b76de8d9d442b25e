"""The exact laws of FedSVD."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Merged, Round
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.fedsvd import FedSVD, orthonormalized
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, ToyTrainer, toy_clients

CLIENTS = toy_clients(3, 3)


def run_rounds(m: Any, rounds: int) -> list[Merged[Any]]:
    server, merged = m.init_server(SPEC, 0), []
    for index in range(rounds):
        rnd, simulation = Round(index, 0), SimulationBackend(m, SPEC, CLIENTS, MemoryStates(), ToyTrainer(), 0)
        replies = simulation.train_clients(rnd, {client: m.send(server, client, rnd) for client in CLIENTS}, {})
        merged.append(merge(m, server, replies, SPEC))
        server = merged[-1].server
    return merged


def factor(out: int = 12, rank: int = 3, in_: int = 7, dtype: torch.dtype = torch.float64) -> LowRank:
    rng = torch.Generator().manual_seed(0)
    return LowRank(
        b=torch.randn(out, rank, generator=rng, dtype=dtype), a=torch.randn(rank, in_, generator=rng, dtype=dtype)
    )


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_new_factors_have_the_same_product_an_orthonormal_a_and_orthogonal_columns_in_b(dtype, rounding):
    before = factor(dtype=dtype)
    after = orthonormalized(before)
    assert_close(after.product(), before.product(), rtol=rounding, atol=rounding)
    assert_close(after.a @ after.a.mT, torch.eye(3, dtype=dtype), rtol=0, atol=rounding)
    s = torch.linalg.svdvals(before.product())[:3]
    assert_close(after.b.mT @ after.b, s.square().diag(), rtol=rounding, atol=10 * rounding)


@pytest.mark.parametrize("live", [0, 1])
def test_a_stays_orthonormal_where_b_lacks_ranks(live):
    after = orthonormalized(LowRank(b=factor().b * (torch.arange(3) < live), a=factor().a))
    assert_close(after.a @ after.a.mT, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_more_ranks_than_the_matrix_has_keep_their_number():
    before = factor(out=5, rank=6, in_=4)
    after = orthonormalized(before)
    assert after.rank == 6
    assert_close(after.product(), before.product(), rtol=1e-12, atol=1e-12)


def test_noise_on_b_is_noise_of_the_same_norm_on_the_product():
    a = orthonormalized(factor()).a
    noise = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close((noise @ a).norm(), noise.norm())


def test_the_merge_is_exact_in_every_round():
    merged = run_rounds(FedSVD(rank=3), 3)
    assert all(x.notes["aggregation_error"] < 1e-6 for x in merged)
    for part in merged[-1].server.values():
        assert_close(part.a @ part.a.mT, torch.eye(3), rtol=0, atol=1e-5)


def test_never_orthonormalized_it_is_ffa_lora_bit_for_bit():
    ffa = FactorAveraging(rank=3, shared="b", schedule=("b",))
    state, theirs = run_rounds(FedSVD(rank=3, every=0), 3)[-1].server, run_rounds(ffa, 3)[-1].server
    assert all(torch.equal(part.b, theirs[f"{name}.b"]) for name, part in state.items())


def test_a_changes_at_the_end_of_a_period_after_the_warm_up():
    merged = run_rounds(FedSVD(rank=3, every=2, warmup=2), 5)
    a = [FedSVD(rank=3).init_server(SPEC, 0), *(x.server for x in merged)]
    changed = [not torch.equal(one["layer.2.q"].a, two["layer.2.q"].a) for one, two in pairwise(a)]
    assert changed == [False, False, False, True, False]
