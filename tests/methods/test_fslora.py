"""The exact laws of FSLoRA."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import AdapterSpec, Scaling, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, Reply, Round, Trained, Upload
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.flexlora import Sliced
from fedlora.methods.fslora import FSLoRA, sliced, subset
from fedlora.rounds.client import ClientStart, train_clients

from merging import merge
from toy import SPEC, ToyTrainer, toy_clients
from uploads import dense, factors, off, plus

RND, ALPHA = Round(0, 0), 16.0
WIDE = Sliced(factors(5, "wide", spec=SPEC, size=0.3), {})


def replies(m: Any, server: Any, clients: list[ClientInfo], rnd: Round = RND) -> list[Reply]:
    done = [
        (
            client,
            train_clients(
                m, ToyTrainer(), [ClientStart(client, m.init_client(SPEC, client, 0), m.send(server, client, rnd))], rnd
            )[0],
        )
        for client in clients
    ]
    return [Reply(client, rnd, one.upload, 1.0) for client, one in done]


def changes(reply: Reply) -> dict[str, LowRank]:
    return unpack({key.removeprefix("change/"): x for key, x in reply.upload.values.items()}, LowRank)


def spread(change: Tensor, chosen: Tensor, rank: int, dim: int) -> Tensor:
    """Columns (dim 1) or rows (dim 0) in their places among `rank`, the rest zero: by a matrix of ones and zeros."""
    places = torch.eye(rank, dtype=change.dtype)[chosen]
    return change @ places if dim == 1 else places.T @ change


def test_with_all_ranks_it_is_fedit_with_uniform_weights():
    m, fedit = FSLoRA(rank=3), FactorAveraging(rank=3)
    server, plain = m.init_server(SPEC, 0), fedit.init_server(SPEC, 0)
    for index in range(3):
        rnd, clients = Round(index, 0), toy_clients(4)
        server = merge(m, server, replies(m, server, clients, rnd), SPEC).server
        equal = [replace(reply, weight=1.0) for reply in replies(fedit, plain, clients, rnd)]
        plain = merge(fedit, plain, equal, SPEC).server
        assert_close(pack(server.adapter), dict(plain), rtol=1e-5, atol=1e-6)


def test_the_server_adds_the_mean_of_the_changes_in_their_places_over_those_who_took_part():
    clients = toy_clients(6, [2, 5, 1, 3, 2, 4])[1:5]
    m = FSLoRA(rank=5)
    found = replies(m, WIDE, clients)
    after = merge(m, WIDE, found, SPEC).server.adapter
    for name, part in WIDE.adapter.items():
        b, a = part.b.double(), part.a.double()
        for reply in found:
            k, change = reply.client.rank, changes(reply)[name]
            chosen = subset(name, 5, k, reply.client, RND)
            assert change.b.shape == (part.b.shape[0], k) and change.a.shape == (k, part.a.shape[1])
            b = b + spread(change.b.double(), chosen, 5, 1) * (k / 5) / len(found)
            a = a + spread(change.a.double(), chosen, 5, 0) / len(found)
        assert_close(after[name].b.double(), b, rtol=1e-5, atol=1e-6)
        assert_close(after[name].a.double(), a, rtol=1e-5, atol=1e-6)


def test_what_nobody_drew_does_not_move_by_a_bit():
    client = ClientInfo("one", 2, 10)
    after = merge(FSLoRA(rank=5), WIDE, replies(FSLoRA(rank=5), WIDE, [client]), SPEC).server.adapter
    for name, part in WIDE.adapter.items():
        chosen = subset(name, 5, 2, client, RND)
        rest = torch.tensor([i for i in range(5) if i not in chosen])
        assert len(set(chosen.tolist())) == 2
        assert torch.equal(after[name].b[:, rest], part.b[:, rest]) and torch.equal(after[name].a[rest], part.a[rest])
        assert not torch.equal(after[name].b, part.b) and not torch.equal(after[name].a, part.a)


def test_the_weights_are_those_of_the_replies():
    clients, m = toy_clients(3, [2, 3, 5]), FSLoRA(rank=5)
    found = [replace(reply, weight=float(reply.client.examples)) for reply in replies(m, WIDE, clients)]
    total = sum(reply.weight for reply in found)
    for name, part in merge(m, WIDE, found, SPEC).server.adapter.items():
        moves = [r.weight * spread(changes(r)[name].a, subset(name, 5, r.client.rank, r.client, RND), 5, 0) for r in found]
        assert_close(part.a, WIDE.adapter[name].a + sum(moves) / total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("download", ["all", "slice"])
def test_the_logged_error_is_against_the_mean_change_of_the_slices_products(download):
    m = FSLoRA(rank=5, download=download)
    found = replies(m, WIDE, toy_clients(3, [2, 3, 5]))
    merged = merge(m, WIDE, found, SPEC)
    mean = dict.fromkeys(SPEC.modules, 0.0)
    for reply in found:
        start = sliced(WIDE.adapter, dict.fromkeys(mean, reply.client.rank), reply.client, RND)
        for name, part in plus(start, changes(reply)).items():
            mean[name] = mean[name] + (dense(part) - dense(start[name])) / len(found)
    made = {name: dense(part) - dense(WIDE.adapter[name]) for name, part in merged.server.adapter.items()}
    assert merged.notes["aggregation_error"] == pytest.approx(off(made, mean), rel=1e-4)


def test_the_merge_is_linear_in_the_changes():
    m = FSLoRA(rank=5)
    found = replies(m, WIDE, toy_clients(3, [2, 3, 1]))
    twice = [replace(r, upload=Upload({key: 2 * x for key, x in r.upload.values.items()})) for r in found]
    one, two = (pack(merge(m, WIDE, some, SPEC).server.adapter) for some in (found, twice))
    for key, before in pack(WIDE.adapter).items():
        assert_close(two[key] - before, 2 * (one[key] - before), rtol=1e-4, atol=1e-5)


def test_sketches_are_unbiased_and_every_rank_is_drawn_equally_often():
    client, rounds = ClientInfo("x", 2, 10), 3000
    drawn = torch.zeros(5)
    mean = {name: torch.zeros(shape) for name, shape in SPEC.modules.items()}
    for index in range(rounds):
        rnd = Round(index, 0)
        drawn[subset("layer.2.q", 5, 2, client, rnd)] += 1 / rounds
        for name, part in sliced(WIDE.adapter, {name: 2 for name in mean}, client, rnd).items():
            mean[name] += part.product() / rounds
    assert (drawn - 2 / 5).abs().max() < 4 * (0.4 * 0.6 / rounds) ** 0.5
    for name, part in WIDE.adapter.items():
        assert (mean[name] - part.product()).norm() < 0.05 * part.product().norm()


def test_a_draw_belongs_to_its_round_client_module_and_run_and_to_no_attempt():
    def draw(module: str = "m", client: str = "c", index: int = 0, seed: int = 0, attempt: int = 0) -> list[int]:
        return subset(module, 60, 30, ClientInfo(client, 1, 1), Round(index, seed, attempt)).tolist()

    assert draw() == draw(attempt=1) == sorted(draw())
    assert draw() not in (draw("n"), draw(client="d"), draw(index=1), draw(seed=1))


def test_a_client_that_gets_its_slice_only_uploads_the_same_as_one_that_gets_all():
    clients = toy_clients(3, [2, 3, 5])
    whole, part = (replies(FSLoRA(rank=5, download=way), WIDE, clients) for way in ("all", "slice"))
    for one, other in zip(whole, part, strict=True):
        assert all(torch.equal(one.upload.values[key], x) for key, x in other.upload.values.items())
    down = FSLoRA(rank=5, download="slice").send(WIDE, clients[0], RND)
    assert sum(x.numel() for x in down.values()) == sum(2 * (out + in_) for out, in_ in SPEC.modules.values())


@pytest.mark.parametrize("download", ["all", "slice"])
def test_a_module_of_fixed_rank_is_trained_as_a_whole(download):
    spec = AdapterSpec(SPEC.modules, SPEC.head, rank_pattern={"layer.2.q": 4})
    m, client = FSLoRA(rank=5, download=download), ClientInfo("x", 2, 10)
    server = m.init_server(spec, 0)
    request = next(m.work(m.init_client(spec, client, 0), m.send(server, client, RND), client, RND))
    assert {name: part.rank for name, part in request.start.items()} == {"layer.2.q": 4, "layer.10.v": 2}
    assert all(torch.equal(request.start["layer.2.q"].a, server.adapter["layer.2.q"].a) for _ in "x")


# --------------------------------------------------------------------------------- the slice against the sketched model


def sketched(scale: float, client: ClientInfo, optimizer: Any, lr: float, steps: int) -> dict[str, LowRank]:
    """The trained columns and rows of the whole adapter in a model that computes scale B s A; its update b = scale B."""
    found = {}
    for name, part in WIDE.adapter.items():
        chosen = subset(name, 5, client.rank, client, RND)
        diagonal = torch.zeros(5, dtype=torch.float64).index_fill(0, chosen, 5 / client.rank)
        b, a = (part.b.double() / scale).requires_grad_(), part.a.double().requires_grad_()
        descend([b, a], [1.0, 1.0], optimizer, lr, steps, lambda b, a, d=diagonal, n=name: distance(n, scale * b * d @ a))
        found[name] = LowRank(b=(scale * b.detach()).float(), a=a.detach().float())
    return found


def in_model(request: Fit, scaling: Scaling, optimizer: Any, lr: float, steps: int) -> dict[str, LowRank]:
    """The request answered as a model's LoRA layers answer it: lora_B = b / scale, of which the rates speak."""
    found = {}
    for name, part in request.start.items():
        assert isinstance(part, LowRank)
        scale, rate = scaling.of(name, part.rank), (request.rates or {}).get("b", 1.0)
        b, a = (part.b.double() / scale).requires_grad_(), part.a.double().requires_grad_()
        descend([b, a], [rate, 1.0], optimizer, lr, steps, lambda b, a, s=scale, n=name: distance(n, s * b @ a))
        found[name] = LowRank(b=(scale * b.detach()).float(), a=a.detach().float())
    return found


def descend(leaves: list[Tensor], rates: list[float], optimizer: Any, lr: float, steps: int, loss: Any) -> None:
    groups = [{"params": [x], "lr": lr * rate} for x, rate in zip(leaves, rates, strict=True)]
    made = optimizer(groups, lr=lr)
    for _ in range(steps):
        made.zero_grad()
        loss(*leaves).backward()
        made.step()


def distance(name: str, weight: Tensor) -> Tensor:
    return (weight - ToyTrainer().target("0")[name].double()).square().mean()


def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr)


def adamw(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, eps=1e-30)


def apart(scaling: str, rslora: bool, optimizer: Any) -> float:
    """The largest difference between what the server adds for one client's slice and what the sketched model learns."""
    client, lr = ClientInfo("0", 2, 10), 1e-3
    m, scale = FSLoRA(rank=5, scaling=scaling), Scaling(ALPHA, rslora)  # type: ignore[arg-type]
    job = m.work(m.init_client(SPEC, client, 0), m.send(WIDE, client, RND), client, RND)
    trained = in_model(next(job), scale, optimizer, lr, 10)
    with pytest.raises(StopIteration) as done:
        job.send(Trained(trained))
    after = merge(m, WIDE, [Reply(client, RND, done.value.value[1], 10.0)], SPEC).server.adapter
    wanted = sketched(scale.of("", 5), client, optimizer, lr, 10)
    assert all((wanted[n].b - part.b).abs().max() > 1e-3 for n, part in WIDE.adapter.items())
    return max(float((after[n].b - x.b).abs().max() + (after[n].a - x.a).abs().max()) for n, x in wanted.items())


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_training_the_slice_is_training_the_sketched_model(optimizer):
    assert apart("plain", False, optimizer) < 1e-5


@pytest.mark.parametrize(("scaling", "optimizer"), [("rslora-sgd", sgd), ("rslora-adamw", adamw)])
def test_with_rslora_it_is_so_at_the_rate_of_its_setting_and_at_no_other(scaling, optimizer):
    assert apart(scaling, True, optimizer) < 1e-5
    assert apart("plain", True, optimizer) > 1e-4
