"""The exact laws of FedHM-LoRA."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Reply, Round, Upload
from fedlora.methods.fedhm import FedHMLoRA
from fedlora.methods.flexlora import FlexLoRA, Sliced

from merging import merge
from toy import SPEC, products
from uploads import measured_error

RND = Round(0, 0)


def factors(rank: int, seed: int) -> dict[str, LowRank]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(b=torch.randn(out, rank, generator=rng), a=torch.randn(rank, in_, generator=rng))
        for name, (out, in_) in SPEC.modules.items()
    }


def replies_of(ranks: Sequence[int]) -> list[Reply]:
    """Clients of these ranks, of unequal numbers of examples."""
    return [Reply(ClientInfo(str(i), r, 10), RND, Upload(pack(factors(r, i))), 10.0 + i) for i, r in enumerate(ranks)]


def merged_by(m: FedHMLoRA | FlexLoRA, ranks: Sequence[int], server: Sliced | None = None) -> Merged[Sliced]:
    return merge(m, server or m.init_server(SPEC, 0), replies_of(ranks), SPEC)


def mean(weights: Sequence[float], ranks: Sequence[int], name: str) -> Tensor:
    terms = [w / sum(weights) * factors(r, i)[name].product() for i, (w, r) in enumerate(zip(weights, ranks, strict=True))]
    return torch.stack(terms).sum(0)


def cut(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_clients_weigh_by_the_softmax_of_their_capacity_whatever_their_examples(temperature):
    ranks = (4, 2, 1)
    merged = merged_by(FedHMLoRA(rank=4, temperature=temperature), ranks)
    weights = [math.exp(-4 / r / temperature) for r in ranks]
    for name, found in products(merged.server.adapter).items():
        assert_close(found, cut(mean(weights, ranks, name), 4), rtol=1e-4, atol=1e-5)


def test_clients_of_one_rank_count_equally():
    merged = merged_by(FedHMLoRA(rank=6), (6, 6))
    for name, found in products(merged.server.adapter).items():
        assert_close(found, cut(mean((1, 1), (6, 6), name), 6), rtol=1e-4, atol=1e-5)


def test_a_client_gets_the_best_fit_of_its_own_rank_with_balanced_factors():
    m, ranks = FedHMLoRA(rank=4, weighting="uniform"), (4, 2, 1)
    server = merged_by(m, ranks).server
    for rank in (1, 3):
        for name, part in unpack(m.send(server, ClientInfo("x", rank, 1), RND), LowRank).items():
            ideal = mean((1, 1, 1), ranks, name)
            assert_close(part.product(), cut(ideal, rank), rtol=1e-4, atol=1e-5)
            s = torch.linalg.svdvals(ideal)[:rank].diag()
            assert_close(part.b.mT @ part.b, s, rtol=1e-4, atol=1e-4)
            assert_close(part.a @ part.a.mT, s, rtol=1e-4, atol=1e-4)


def test_if_the_server_has_every_rank_the_merge_is_the_mean():
    merged = merged_by(FedHMLoRA(rank=7, weighting="uniform"), (3, 2, 2))
    for name, found in products(merged.server.adapter).items():
        assert_close(found, mean((1, 1, 1), (3, 2, 2), name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "capacity"])
def test_the_logged_error_is_against_the_mean_with_the_weights_of_the_replies(weighting):
    m, server, ranks = FedHMLoRA(rank=4, weighting=weighting), Sliced(factors(4, 9), {}), (4, 2, 1)
    merged = merged_by(m, ranks, server)
    measured = measured_error(m, merged, replies_of(ranks), server, SPEC)
    assert merged.notes["aggregation_error"] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize(("ranks", "kept"), [((2, 1), True), ((4, 1), False)])
def test_where_nobody_has_the_largest_rank_the_servers_factors_can_stand_in(ranks, kept):
    old = factors(4, 9)
    merged = merged_by(FedHMLoRA(rank=4, weighting="uniform", keep_missing=True), ranks, Sliced(old, {}))
    for name, found in products(merged.server.adapter).items():
        total = 2 * mean((1, 1), ranks, name) + (old[name].product() if kept else 0)
        assert_close(found, cut(total / (3 if kept else 2), 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (1, 1, 2, 2), (1, 1)])
def test_the_weights_of_a_round_without_the_largest_rank_add_up_to_one(ranks, temperature):
    """At g = 96 and 48 and small temperatures, where exp(-g / temperature) is zero for all."""
    m = FedHMLoRA(rank=96, temperature=temperature)
    found = merged_by(m, ranks).server.adapter
    weights = torch.softmax(torch.tensor([-96 / r / temperature for r in ranks], dtype=torch.float64), 0).tolist()
    for name, product in products(found).items():
        assert_close(product, mean(weights, ranks, name), rtol=1e-4, atol=1e-5)
