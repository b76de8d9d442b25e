"""The exact laws of FedRPCA."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import AdapterSpec, Scaling, lora_init, pack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Upload
from fedlora.methods.fedrpca import FedRPCA
from fedlora.methods.scaled import Scaled, scaled

import merging

OUT, IN, RANK = 48, 20, 3
SPEC = AdapterSpec({"layer.2.q": (OUT, IN), "layer.10.v": (IN, OUT)}, dtype=torch.float64)
START = lora_init(SPEC, RANK, 0)
RND = Round(0, 0)
Move = dict[str, dict[str, Tensor]]


def draw(seed: int, share: float = 1.0) -> Move:
    """Random steps of all factors, with that share of the entries not zero."""
    rng = torch.Generator().manual_seed(seed)

    def one(template: Tensor) -> Tensor:
        x = torch.randn(template.shape, generator=rng, dtype=template.dtype)
        return x * (torch.rand(template.shape, generator=rng) < share)

    return {name: {"b": one(part.b), "a": one(part.a)} for name, part in START.items()}


def add(*terms: tuple[float, Move]) -> Move:
    return {name: {side: torch.stack([w * m[name][side] for w, m in terms]).sum(0) for side in "ba"} for name in START}


def after(move: Move) -> dict[str, LowRank]:
    return {name: LowRank(b=part.b + move[name]["b"], a=part.a + move[name]["a"]) for name, part in START.items()}


def reply(i: int, trained: dict[str, LowRank], weight: float = 1.0) -> Reply:
    return Reply(ClientInfo(f"{i:02}", RANK, 10), RND, Upload(pack(trained)), weight)


def merge(m: FedRPCA, moves: Sequence[Move], weights: Sequence[float] | None = None) -> Any:
    shares = weights or [1.0] * len(moves)
    replies = [reply(i, after(move), weight) for i, (move, weight) in enumerate(zip(moves, shares, strict=True))]
    return merging.merge(m, Scaled(START, SPEC.scales(RANK)), replies, SPEC)


def moved(merged: Any) -> Move:
    return {
        name: {"b": part.b - START[name].b, "a": part.a - START[name].a} for name, part in merged.server.adapter.items()
    }


def assert_same(left: Move, right: Move, rounding: float = 1e-9) -> None:
    for name in START:
        assert_close(left[name], right[name], rtol=rounding, atol=rounding)


def apart(left: Move, right: Move) -> float:
    """The largest distance of two factors, relative to the second."""
    pairs = [(left[name][side], right[name][side]) for name in START for side in "ba"]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def planted(count: int = 12) -> tuple[list[Move], Move, Move]:
    """Clients that share a direction, in unlike amounts, each with a few large entries of its own; and both means."""
    amounts = torch.linspace(0.5, 1.5, count).tolist()
    spikes = [add((10.0, draw(100 + i, share=0.03))) for i in range(count)]
    clients = [add((x, draw(0)), (1.0, spike)) for x, spike in zip(amounts, spikes, strict=True)]
    return clients, draw(0), add(*[(1 / count, spike) for spike in spikes])


@pytest.mark.parametrize("columns", ["factors", "both"])
def test_with_beta_one_it_is_fedit(columns):
    clients, weights = planted()[0], [1.0 + i for i in range(12)]
    mean = add(*[(w / sum(weights), one) for w, one in zip(weights, clients, strict=True)])
    assert_same(moved(merge(FedRPCA(RANK, beta=1.0, columns=columns), clients, weights)), mean)


@pytest.mark.parametrize("columns", ["factors", "both"])
def test_a_planted_sparse_part_is_amplified_and_the_common_part_is_not(columns):
    clients, common, sparse = planted()
    found = moved(merge(FedRPCA(RANK, beta=2.0, columns=columns), clients))
    assert apart(found, add((1.0, common), (2.0, sparse))) < 0.05


def test_the_adaptive_beta_makes_up_for_what_averaging_took_but_not_beyond_its_bound():
    clients, common, sparse = planted()
    bounded = moved(merge(FedRPCA(RANK, beta_max=1.5), clients))
    free = moved(merge(FedRPCA(RANK, beta_max=100.0), clients))
    for name, mean in add((1.0, common), (1.0, sparse)).items():
        for side in "ba":
            beta = float(mean[side].norm() / sparse[name][side].norm())
            expected = common[name][side] + beta * sparse[name][side]
            assert_close(free[name][side], expected, rtol=0.05, atol=0.05)
            expected = common[name][side] + min(1.5, beta) * sparse[name][side]
            assert_close(bounded[name][side], expected, rtol=0.05, atol=0.05)


def test_the_order_of_clients_does_not_matter():
    clients = planted()[0]
    assert_same(moved(merge(FedRPCA(RANK), clients)), moved(merge(FedRPCA(RANK), clients[::-1])), rounding=1e-5)


def test_clients_that_move_twice_as_far_move_the_server_twice_as_far():
    clients = planted()[0]
    first_upload, twice = (moved(merge(FedRPCA(RANK), [add((c, one)) for one in clients])) for c in (1.0, 2.0))
    assert_same(twice, add((2.0, first_upload)), rounding=1e-5)


@pytest.mark.parametrize(("count", "close"), [(1, 1e-12), (2, 1e-12), (3, 1e-12), (10, 0.05)])
def test_identical_clients_are_followed_as_they_are(count, close):
    assert apart(moved(merge(FedRPCA(RANK), [draw(0)] * count)), draw(0)) < close


@pytest.mark.parametrize(("count", "too_far"), [(4, 0.24), (5, 0.15), (6, 0.10), (8, 0.04), (10, 0.01), (15, 0.0)])
def test_the_documented_figures_of_identical_clients_are_right(count, too_far):
    x = torch.randn(1, 3072, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = FedRPCA(RANK)._step([x] * count, torch.full((count,), 1 / count, dtype=torch.float64))
    assert float((step - x).norm() / x.norm()) == pytest.approx(too_far, abs=0.01)


@pytest.mark.parametrize("columns", ["factors", "both", "product"])
def test_the_split_is_that_of_the_factors_of_peft_whatever_alpha_is(columns):
    """The same factors of PEFT at scale 1 and at scale 4."""
    found, m = [], FedRPCA(RANK, columns=columns)
    for spec in (SPEC, replace(SPEC, scaling=Scaling(4.0 * RANK))):
        scales = spec.scales(RANK)
        replies = [reply(i, scaled(after(move), scales)) for i, move in enumerate(planted(6)[0])]
        found.append(merging.merge(m, Scaled(scaled(START, scales), scales), replies, spec).server.adapter)
    for name, part in found[0].items():
        assert_close(found[1][name].product(), 4 * part.product(), rtol=1e-6, atol=1e-6)


def test_dense_noise_is_not_amplified():
    clients = [draw(i) for i in range(6)]
    assert_same(moved(merge(FedRPCA(RANK, beta=3.0), clients)), add(*[(1 / 6, one) for one in clients]))


def test_a_client_of_weight_zero_has_no_say_in_the_split():
    clients = planted()[0]
    found = merge(FedRPCA(RANK), [*clients, draw(7)], [1.0] * 12 + [0.0])
    assert_same(moved(found), moved(merge(FedRPCA(RANK), clients)))


def test_products_as_columns_with_beta_one_give_the_best_fit_to_the_mean_of_the_products():
    clients = [draw(i) for i in range(3)]
    merged = merge(FedRPCA(RANK, beta=1.0, columns="product"), clients)
    for name, part in merged.server.adapter.items():
        products = [(START[name].b + one[name]["b"]) @ (START[name].a + one[name]["a"]) for one in clients]
        u, s, vt = torch.linalg.svd(torch.stack(products).mean(0), full_matrices=False)
        assert_close(part.product(), (u[:, :RANK] * s[:RANK]) @ vt[:RANK], rtol=1e-8, atol=1e-8)
