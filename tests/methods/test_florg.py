"""FLoRG: Gram matrices are averaged, factorized and aligned."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import AdapterSpec, Scaling
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.linalg.subspace import orthonormal
from fedlora.messages import ClientInfo, Reply, Round, Upload
from fedlora.methods.florg import FLoRG
from fedlora.rounds.client import ClientStart, train_clients

from toy import Recorder, ToyTrainer, products
from uploads import ROUND, SPEC, merged_by

WIDE = AdapterSpec(modules={"wide": (9, 16), "tall": (16, 9), "square": (9, 9)}, dtype=torch.float64)
RANK = 3
both_ways = pytest.mark.parametrize("align", ["top", "published"])
every_frame = pytest.mark.parametrize("frame", ["haar", "signed-permutation"])


def method(**settings: Any) -> FLoRG:
    return FLoRG(rank=RANK, std=1.0, **settings)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uploads(count: int, drift: float = 0.5) -> list[dict[str, Tensor]]:
    """Factors around the server's first one."""
    start = method().init_server(WIDE, 0)
    return [{k: a + drift * drawn(*a.shape, seed=i) for k, a in start.items()} for i in range(count)]


def replies(sent: list[dict[str, Tensor]]) -> list[Reply]:
    clients = [ClientInfo(str(i), RANK, 10 + 7 * i) for i in range(len(sent))]
    return [Reply(c, ROUND, Upload(x), float(c.examples)) for c, x in zip(clients, sent, strict=True)]


def merged(sent: list[dict[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
    return merged_by(method(**settings), replies(sent), spec=WIDE).server


def mean_gram(sent: list[dict[str, Tensor]], key: str) -> Tensor:
    weights = torch.tensor([10.0 + 7 * i for i in range(len(sent))]).double()
    return sum(w / weights.sum() * x[key].mT @ x[key] for w, x in zip(weights, sent, strict=True))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_collected_rows_have_the_weighted_gram_matrix_and_no_more_rows_than_columns(count):
    collected, sent = None, uploads(count)
    for reply in replies(sent):
        collected = method().collect({}, collected, reply)
    for key, rows in collected.rows.items():
        assert len(rows) <= 9
        assert_close(rows.mT @ rows / collected.weight, mean_gram(sent, key))


def test_the_best_approximation_leaves_the_tail_of_the_eigenvalues():
    sent = uploads(4)
    for key, a in merged(sent).items():
        q = mean_gram(sent, key)
        assert_close(torch.linalg.norm(q - a.mT @ a), torch.linalg.eigvalsh(q)[:-RANK].norm())


@both_ways
def test_a_mean_of_no_more_ranks_is_kept(align):
    """Clients whose factors have the same rows up to a square factor; one client is such a case."""
    (first,) = uploads(1)
    for count in (1, 3):
        sent = [{k: drawn(RANK, RANK, seed=i) @ a for k, a in first.items()} for i in range(count)]
        for key, a in merged(sent, align=align).items():
            assert_close(a.mT @ a, mean_gram(sent, key))


@both_ways
def test_without_training_the_factor_itself_is_kept(align):
    start = method().init_server(WIDE, 0)
    for key, a in merged([start] * 3, align=align).items():
        assert_close(a, start[key])


@both_ways
def test_rotated_uploads_give_the_same_factor(align):
    sent = uploads(3)
    turned = [{k: orthonormal(drawn(RANK, RANK, seed=i)) @ a for k, a in x.items()} for i, x in enumerate(sent)]
    assert_close(merged(turned, align=align), merged(sent, align=align))


def test_no_rotation_of_the_factor_is_nearer_to_the_previous_one():
    start = method().init_server(WIDE, 0)
    for key, a in merged(uploads(3)).items():
        distances = [(orthonormal(drawn(RANK, RANK, seed=i)) @ a - start[key]).norm() for i in range(200)]
        assert (a - start[key]).norm() <= min(distances)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_factor_is_determined_where_the_previous_one_lacks_directions(align, dtype):
    """Whatever the order of the clients, and whatever rows their Gram matrices are made of."""
    first = {key: a[:1].expand(RANK, -1).to(dtype) for key, a in method().init_server(WIDE, 0).items()}
    sent = [{k: a.to(dtype) for k, a in x.items()} for x in uploads(5)]
    turned = [{k: orthonormal(drawn(RANK, RANK, seed=i)) @ a.double() for k, a in x.items()} for i, x in enumerate(sent)]
    each, tolerance = method(align=align), 1e-9 if dtype == torch.float64 else 1e-5
    found = [collect_and_merge(each, first, order) for order in (replies(sent), replies(sent)[::-1], replies(turned))]
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=tolerance)
    for key, a in found[0].items():
        turns = [orthonormal(drawn(RANK, RANK, seed=i)).to(dtype) for i in range(200)]
        distances = [float((turn @ a - first[key]).norm()) for turn in turns]
        assert float((a - first[key]).norm()) <= min(distances) + tolerance


def collect_and_merge(each: FLoRG, server: dict[str, Tensor], sent: list[Reply]) -> dict[str, Tensor]:
    collected = None
    for reply in sent:
        collected = each.collect(server, collected, reply)
    return each.merge(server, collected, ROUND).server


@every_frame
def test_frames_are_orthonormal_the_same_for_everybody_and_never_sent(frame):
    one, other = ClientInfo("x", RANK, 9), ClientInfo("y", RANK, 5)
    state = method(frame=frame).init_client(WIDE, one, seed=4)
    torch.manual_seed(1)
    assert all(torch.equal(x, state[key]) for key, x in method(frame=frame).init_client(WIDE, other, seed=4).items())
    for name, (out, in_) in WIDE.modules.items():
        frame_ = state[f"{name}.frame"]
        assert_close(frame_.mT @ frame_ if out > in_ else frame_ @ frame_.mT, torch.eye(9).double(), atol=1e-6, rtol=0)
    download = method(frame=frame).send(method().init_server(WIDE, 4), one, Round(0, 4))
    assert {key: tuple(x.shape) for key, x in download.items()} == {f"{name}.a": (RANK, 9) for name in WIDE.modules}


@every_frame
@pytest.mark.parametrize(("start", "zero"), [("offset", True), ("plain", False)])
def test_the_initial_update_is_zero_only_with_an_offset(frame, start, zero):
    each, client = method(frame=frame, start=start), ClientInfo("x", RANK, 9)
    view = each.view(each.init_client(WIDE, client, 0), each.init_server(WIDE, 0), client)
    sizes = [float(x.abs().max()) for x in products(view).values()]
    assert max(sizes) < 1e-12 if zero else min(sizes) > 0.1


def test_alpha_scales_the_initial_product():
    client, each = ClientInfo("x", RANK, 9), method(start="plain")
    specs = [AdapterSpec(SPEC.modules, scaling=Scaling(alpha)) for alpha in (3.0, 12.0)]
    one, four = (products(each.view(each.init_client(s, client, 0), each.init_server(s, 0), client)) for s in specs)
    assert_close(four, {name: 4 * x for name, x in one.items()})


def test_a_client_trains_and_uploads_its_factor_alone():
    trainer, client = Recorder(ToyTrainer()), ClientInfo("0", RANK, 10)
    state, server = method().init_client(trainer.spec, client, 0), method().init_server(trainer.spec, 0)
    (done,) = train_clients(method(), trainer, [ClientStart(client, state, server)], ROUND)
    assert done.upload.values.keys() == server.keys()
    assert all(not torch.equal(x, server[key]) for key, x in done.upload.values.items())


def test_weight_decay_is_rejected_as_a_factor_of_zeros_never_learns():
    with pytest.raises(UserError, match=r"train.weight_decay = 0.1: florg needs 0: "):
        build({"method": {"name": "florg"}, "train": {"weight_decay": 0.1}})
    trainer, client = Recorder(ToyTrainer()), ClientInfo("0", RANK, 10)
    state, server = method().init_client(trainer.spec, client, 0), method().init_server(trainer.spec, 0)
    nothing = {key: torch.zeros_like(x) for key, x in server.items()}
    (done,) = train_clients(method(), trainer, [ClientStart(client, state, nothing)], ROUND)
    assert all(not x.any() for x in done.upload.values.values())
