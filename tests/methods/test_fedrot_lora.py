"""The exact laws of FedRot-LoRA."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter import pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Reply, Round, Trained, Upload
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.fedrot_lora import FedRotLoRA
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, ToyTrainer, products, toy_clients

CLIENTS = toy_clients(3, 3)


def factors(seed: int) -> dict[str, LowRank]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(b=torch.randn(out, 3, generator=rng), a=torch.randn(3, in_, generator=rng))
        for name, (out, in_) in SPEC.modules.items()
    }


def upload(m: FedRotLoRA, download: dict[str, LowRank], trained: dict[str, LowRank], index: int) -> dict[str, LowRank]:
    job = m.work(None, pack(download), CLIENTS[0], Round(index, 0))
    next(job)
    with pytest.raises(StopIteration) as done:
        job.send(Trained(trained))
    return unpack(done.value.value[1].values, LowRank)


@pytest.mark.parametrize("index", [1, 2])
def test_turning_keeps_the_clients_product_and_its_norms(index):
    trained = factors(0)
    turned = upload(FedRotLoRA(rank=3), factors(1), trained, index)
    for name, part in turned.items():
        assert_close(part.product(), trained[name].product(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(part.b, trained[name].b, atol=0.1)
        assert_close(part.b.norm(), trained[name].b.norm())
        assert_close(part.a.norm(), trained[name].a.norm())


def test_it_brings_a_near_in_odd_rounds_and_b_in_even_ones_but_not_in_the_first():
    m, download, trained = FedRotLoRA(rank=3, strength=1.0), factors(1), factors(0)

    def nearer(index: int, side: str) -> bool:
        turned = upload(m, download, trained, index)
        return all(
            (getattr(turned[n], side) - getattr(download[n], side)).norm()
            < (getattr(trained[n], side) - getattr(download[n], side)).norm()
            for n in download
        )

    assert nearer(1, "a") and nearer(2, "b")
    assert all(torch.equal(part.a, trained[name].a) for name, part in upload(m, download, trained, 0).items())


def test_the_side_can_be_fixed():
    download, trained = factors(1), factors(0)
    alternating, fixed = FedRotLoRA(rank=3), FedRotLoRA(rank=3, align="a")
    for index in (1, 2, 3):
        same = torch.equal(
            upload(fixed, download, trained, index)["layer.2.q"].b,
            upload(alternating, download, trained, index)["layer.2.q"].b,
        )
        assert same == (index % 2 == 1)


def test_at_strength_zero_it_is_fedit():
    def run_rounds(m: Any) -> dict[str, torch.Tensor]:
        server = m.init_server(SPEC, 0)
        for index in range(3):
            rnd, simulation = Round(index, 0), SimulationBackend(m, SPEC, CLIENTS, MemoryStates(), ToyTrainer(), 0)
            replies = simulation.train_clients(rnd, {client: m.send(server, client, rnd) for client in CLIENTS}, {})
            server = merge(m, server, replies, SPEC).server
        return products(m.view(m.init_client(SPEC, CLIENTS[0], 0), m.send(server, CLIENTS[0], Round(3, 0)), CLIENTS[0]))

    state, fedit = run_rounds(FedRotLoRA(rank=3, strength=0.0)), run_rounds(FactorAveraging(rank=3))
    assert all(torch.allclose(state[name], x, atol=1e-5) for name, x in fedit.items())


@pytest.mark.parametrize("index", [1, 2])
def test_clients_that_differ_by_a_proper_rotation_add_up_to_their_common_product(index):
    m, download, common = FedRotLoRA(rank=3, strength=1.0), factors(1), factors(0)
    replies = []
    for i, client in enumerate(CLIENTS):
        q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(i))).Q
        q = q * torch.linalg.det(q).sign()
        turned = {name: LowRank(b=part.b @ q, a=q.T @ part.a) for name, part in common.items()}
        sent = Upload(pack(upload(m, download, turned, index)))
        replies.append(Reply(client, Round(index, 0), sent, 1.0 + i))
    merged = merge(m, pack(download), replies, SPEC)
    for name, part in unpack(merged.server, LowRank).items():
        assert_close(part.product(), common[name].product(), rtol=1e-4, atol=1e-5)
    assert merged.notes["aggregation_error"] < 1e-5
