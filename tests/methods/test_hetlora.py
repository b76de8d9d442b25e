"""The exact laws of HetLoRA."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter import Scaling, lora_init, pack, unpack
from fedlora.linalg.combine import leading, pad
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Trained, Upload
from fedlora.methods.flexlora import Sliced
from fedlora.methods.hetlora import HetLoRA, tail

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


def reply(adapter: dict[str, LowRank], client: str = "0", weight: float = 10.0) -> Reply:
    rank = next(iter(adapter.values())).rank
    return Reply(ClientInfo(client, rank, 10), RND, Upload(pack(adapter)), weight)


def replies_of(adapters: Sequence[dict[str, LowRank]]) -> list[Reply]:
    """Of weights 10, 20, ..."""
    return [reply(adapter, str(i), 10.0 * (i + 1)) for i, adapter in enumerate(adapters)]


def merged(m: HetLoRA, adapters: Sequence[dict[str, LowRank]]) -> Any:
    return merge(m, m.init_server(SPEC, 0), replies_of(adapters), SPEC)


def finish(job: Any, trained: Any) -> Any:
    with pytest.raises(StopIteration) as done:
        job.send(Trained(trained))
    return done.value.value


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_weights_are_the_norms_of_the_singular_values_whatever_the_number_of_examples(scope):
    adapters = [factors(rank, seed) for seed, rank in enumerate((2, 4, 1))]
    found = merged(HetLoRA(rank=4, norm_scope=scope), adapters)
    norms = [{n: torch.linalg.svdvals(x.product().double()).square().sum() for n, x in one.items()} for one in adapters]
    for name, part in found.server.adapter.items():
        w = torch.stack([one[name] if scope == "layer" else sum(one.values()) for one in norms]).sqrt()
        w = (w / w.sum()).float()
        assert_close(part.b, sum(x * pad(one[name], 4).b for x, one in zip(w, adapters, strict=True)), rtol=1e-5, atol=1e-6)
        assert_close(part.a, sum(x * pad(one[name], 4).a for x, one in zip(w, adapters, strict=True)), rtol=1e-5, atol=1e-6)


def test_equal_ranks_of_equal_norms_are_averaged_as_in_fedit():
    one = factors(3, 0)
    other = {name: LowRank(b=part.b.flip(0), a=part.a.flip(1)) for name, part in one.items()}
    found = merged(HetLoRA(rank=3), [one, other]).server.adapter
    for name, part in found.items():
        assert_close(
            part.product(), (one[name].b + other[name].b) @ (one[name].a + other[name].a) / 4, rtol=1e-5, atol=1e-5
        )


def test_if_nobody_changed_anything_all_count_equally():
    start = [{n: LowRank(b=0 * x.b, a=x.a) for n, x in factors(2, seed).items()} for seed in (0, 1)]
    found = merged(HetLoRA(rank=2), start).server.adapter
    assert all(torch.allclose(part.a, (start[0][n].a + start[1][n].a) / 2, atol=1e-6) for n, part in found.items())


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_logged_error_is_against_the_mean_with_the_weights_of_the_replies(scope):
    m, server = HetLoRA(rank=3, norm_scope=scope), Sliced(factors(3, 9), {})
    replies = replies_of([factors(rank, seed) for seed, rank in enumerate((2, 3))])
    found = merge(m, server, replies, SPEC)
    measured = measured_error(m, found, replies, server, SPEC)
    assert found.notes["aggregation_error"] == pytest.approx(measured, rel=1e-4)


def test_a_slice_that_goes_down_and_up_again_is_padded_to_itself():
    m, wide = HetLoRA(rank=4), factors(4, 0)
    client = ClientInfo("0", 2, 10)
    down = m.send(Sliced(wide, {}), client, RND)
    assert all(torch.equal(part.b, wide[n].b[:, :2]) for n, part in unpack(down, LowRank).items())
    found = merged(m, [unpack(down, LowRank)]).server.adapter
    assert all(torch.allclose(part.product(), leading(wide[n], 2).product(), atol=1e-5) for n, part in found.items())
    assert all(not part.b[:, 2:].any() for part in found.values())


def test_a_rank_that_no_client_has_starts_again_with_a_fresh_row_and_changes_no_product():
    m, server = HetLoRA(rank=4), Sliced(factors(4, 0), {})
    client = ClientInfo("0", 4, 10)
    pruned = {n: pad(leading(part, 3), 4) for n, part in factors(4, 1).items()}
    some = [reply(pruned, "0"), reply(factors(2, 2), "1"), reply(factors(1, 3), "2")]
    after = merge(m, server, some, SPEC).server
    for part in after.adapter.values():
        assert not part.b[:, 3].any() and part.a[3].all() and part.b[:, :3].any(0).all()
    assert_close(products(after.adapter), products({n: leading(part, 3) for n, part in after.adapter.items()}))
    live = {n: part.b.clone().requires_grad_() for n, part in after.adapter.items()}
    sum((b @ after.adapter[n].a).sum() for n, b in live.items()).backward()
    assert (
        all(b.grad[:, 3].any() for b in live.values()) and m.send(after, client, RND).keys() == pack(after.adapter).keys()
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_the_tail_is_that_of_the_factors_of_peft_whatever_alpha_is(rslora):
    spec, client, wide = replace(SPEC, scaling=Scaling(6.0, rslora)), ClientInfo("0", 4, 10), factors(4, 0)
    m = HetLoRA(rank=4, gamma=0.5)
    request = next(m.work(m.init_client(spec, client, 0), pack(wide), client, RND))
    scale = 6.0 / (2.0 if rslora else 4.0)
    peft = {name: LowRank(b=part.b / scale, a=part.a) for name, part in wide.items()}
    assert_close(request.penalties[0](pack(wide)), 0.01 * tail(peft, dict.fromkeys(peft, 2)))


def test_without_training_a_component_shrinks_by_the_square_of_the_weight_that_reaches_it():
    one = {name: LowRank(b=torch.eye(out)[:, :2], a=torch.eye(in_)[:2]) for name, (out, in_) in SPEC.modules.items()}
    cut = {
        name: LowRank(b=2**0.5 * torch.eye(out)[:, :1], a=torch.eye(in_)[:1]) for name, (out, in_) in SPEC.modules.items()
    }
    found = merged(HetLoRA(rank=2), [one, cut, cut, cut]).server.adapter  # all of norm sqrt(2): weights 1/4
    assert all(torch.allclose(part.product()[1, 1], torch.tensor(0.25**2)) for part in found.values())


@pytest.mark.parametrize(("shrink", "rank"), [(0.5, 3), (1.0, 4), (2.0, 4)])
def test_a_client_drops_its_tail_for_good_if_and_only_if_the_tail_shrank(shrink, rank):
    m, client = HetLoRA(rank=4), ClientInfo("0", 4, 10)
    state, download = m.init_client(SPEC, client, 0), pack(factors(4, 0))
    job = m.work(state, download, client, RND)
    start = next(job).start
    scaled = torch.tensor([1.0, 1.0, 1.0, shrink])
    state, upload = finish(job, {n: LowRank(b=x.b * scaled, a=x.a) for n, x in start.items()})
    assert {int(x) for x in state.ranks.values()} == {rank}
    assert {x.shape for x in upload.flat().values()} == {x.shape for x in download.values()}
    assert {bool(part.b[:, 3].any()) for part in unpack(upload.values, LowRank).values()} == {rank == 4}
    assert {part.rank for part in m.view(state, download, client).values()} == {rank}


def test_the_rank_never_rises_and_never_falls_below_the_least():
    m, client = HetLoRA(rank=4, gamma=0.5, min_rank=2), ClientInfo("0", 4, 10)
    state, ranks = m.init_client(SPEC, client, 0), []
    for _ in range(3):
        job = m.work(state, pack(factors(4, 0)), client, RND)
        start = next(job).start
        state, _ = finish(job, {n: LowRank(b=0.5 * x.b, a=x.a) for n, x in start.items()})
        ranks.append(set(state.ranks.values()))
    assert ranks == [{2}, {2}, {2}]


def test_without_penalty_and_tail_nothing_is_pruned():
    m, client = HetLoRA(rank=4, gamma=1.0, tail_penalty=0.0), ClientInfo("0", 4, 10)
    job = m.work(m.init_client(SPEC, client, 0), pack(factors(4, 0)), client, RND)
    request = next(job)
    assert request.penalties == ()
    state, _ = finish(job, {n: LowRank(b=0 * x.b, a=x.a) for n, x in request.start.items()})
    assert {int(x) for x in state.ranks.values()} == {4}


def test_the_penalty_pulls_on_the_tail_alone():
    m, client = HetLoRA(rank=4, gamma=0.5, tail_penalty=0.1), ClientInfo("0", 4, 10)
    request = next(m.work(m.init_client(SPEC, client, 0), pack(factors(4, 0)), client, RND))
    live = {n: LowRank(b=x.b.requires_grad_(), a=x.a.requires_grad_()) for n, x in factors(4, 0).items()}
    loss = request.penalties[0](pack(live))
    assert_close(loss, 0.1 * sum(x.b[:, 2:].norm() * x.a[2:].norm() for x in live.values()))
    loss.backward()
    for part in live.values():
        assert not part.b.grad[:, :2].any() and not part.a.grad[:2].any()
        assert part.b.grad[:, 2:].all() and part.a.grad[2:].all()


def test_the_tail_of_a_start_at_zero_has_a_finite_gradient():
    live = {n: LowRank(b=x.b.requires_grad_(), a=x.a.requires_grad_()) for n, x in lora_init(SPEC, 3, 0).items()}
    tail(live, dict.fromkeys(live, 2)).backward()
    assert all(x.isfinite().all() for part in live.values() for x in (part.b.grad, part.a.grad))
    assert not any(x.any() for x in products(live).values())
