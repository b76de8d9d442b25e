"""LoRA-FAIR: b corrected, within the rows of the mean a."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import Scaling, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.ridge_correction import cross, ridge
from fedlora.messages import Mean
from fedlora.methods.lora_fair import LoRAFAIR
from fedlora.methods.scaled import scaled

from uploads import SPEC, dense, drifted, factors, mean_product, merged_by, off, replies_of, truncated, update

LOSSES = ("ridge", "cos", "cos_col")


def mean_factors(replies):
    return unpack(Mean.of((r.weight, r.upload.values) for r in replies).tensors(), LowRank)


def method(loss, **settings):
    return LoRAFAIR(rank=3, loss=loss, steps=50, **settings)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_infinite_strength_is_averaging(loss):
    replies = drifted(4, 3)
    strong = LoRAFAIR(rank=3, loss=loss, strength=1e9, steps=20, rate=1e-10)
    averaged = {name: dense(part) for name, part in mean_factors(replies).items()}
    assert off(update(strong, merged_by(strong, replies)), averaged) < 1e-6


def test_without_a_penalty_ridge_gives_the_mean_projected_on_the_rows_of_the_mean_a():
    replies = drifted(4, 3)
    free = LoRAFAIR(rank=3, strength=0.0)
    rows = {name: part.a.double() for name, part in mean_factors(replies).items()}
    wanted = {name: m @ torch.linalg.pinv(rows[name]) @ rows[name] for name, m in mean_product(replies).items()}
    assert off(update(free, merged_by(free, replies)), wanted) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_identical_clients_are_left_alone(loss):
    one = factors(3, "one")
    merged = merged_by(method(loss), replies_of([one] * 4))
    assert all(
        float((part.b - one[name].b).norm()) < 1e-5 * float(part.b.norm()) for name, part in merged.server.adapter.items()
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_clients_with_a_common_a_are_merged_exactly_by_the_mean_b(loss):
    start, moves = factors(3, "start"), [factors(3, "move", i) for i in range(4)]
    replies = replies_of([{n: LowRank(b=part.b, a=start[n].a) for n, part in m.items()} for m in moves])
    fair = method(loss)
    assert off(update(fair, merged_by(fair, replies)), mean_product(replies)) < 1e-6


@pytest.mark.parametrize("size", [1.0, 1e-2])
@pytest.mark.parametrize("loss", ["cos", "cos_col"])
def test_the_cosines_never_end_above_their_start(loss, size):
    uploads = [unpack(r.upload.values, LowRank) for r in drifted(4, 3)]
    replies = replies_of([{n: LowRank(b=size * p.b, a=p.a) for n, p in parts.items()} for parts in uploads])
    merged, wanted = merged_by(LoRAFAIR(rank=3, loss=loss, steps=50), replies).server.adapter, mean_product(replies)
    for name, start in mean_factors(replies).items():
        apart = 0.01 * float((merged[name].b - start.b).square().sum())
        before, after = (float(cosine(dense(p), wanted[name], loss)) for p in (start, merged[name]))
        assert 1 - after + apart <= 1 - before + 1e-9


@pytest.mark.parametrize("norm", ["l2", "l2sq"])
@pytest.mark.parametrize("loss", ["cos", "cos_col"])
def test_the_cosine_search_turns_the_product_towards_the_mean(loss, norm):
    replies = drifted(4, 3)
    merged = merged_by(LoRAFAIR(rank=3, loss=loss, norm=norm, strength=1e-4, rate=1.0, steps=50), replies).server.adapter
    for name, start in mean_factors(replies).items():
        wanted = mean_product(replies)[name]
        assert cosine(dense(merged[name]), wanted, loss) > cosine(dense(start), wanted, loss) + 1e-5


def test_a_random_start_comes_from_the_seed_alone():
    random = method("cos", init="xavier")
    one, other, still = (merged_by(m, drifted(4, 3)).server.adapter for m in (random, random, method("cos")))
    for name in one:
        assert torch.equal(one[name].b, other[name].b) and not torch.allclose(one[name].b, still[name].b)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_error_is_at_least_that_of_the_best_fit(loss):
    replies = drifted(4, 3)
    mean = mean_product(replies)
    assert merged_by(method(loss), replies).notes["aggregation_error"] >= off(truncated(mean, 3), mean) - 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.01, 3.0])
def test_two_phases_of_sums_give_the_same_ridge(strength):
    """What secure aggregation could do: the server sees the mean factors first, then the sum of b_k (a_k a_mean^T)."""
    replies, total = drifted(4, 3), sum(r.weight for r in drifted(4, 3))
    merged = merged_by(LoRAFAIR(rank=3, strength=strength), replies).server.adapter
    for name, centre in mean_factors(replies).items():
        answers = sum(r.weight / total * cross(unpack(r.upload.values, LowRank)[name], centre.a) for r in replies)
        assert off({name: dense(ridge(centre, answers, strength))}, {name: dense(merged[name])}) < 1e-5


@pytest.mark.parametrize("norm", ["l2", "l2sq"])
@pytest.mark.parametrize("init", ["zero", "xavier"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_correction_is_that_of_the_factors_of_peft_whatever_alpha_is(loss, init, norm):
    """The same factors of PEFT at scale 1 and at scale 4."""
    peft, found = [unpack(reply.upload.values, LowRank) for reply in drifted(4, 3)], []
    for spec in (SPEC, replace(SPEC, scaling=Scaling(4.0 * 3))):
        replies = replies_of([scaled(factors, spec.scales(3)) for factors in peft])
        m = method(loss, init=init, norm=norm, rate=0.3, strength=0.1)
        found.append(merged_by(m, replies, spec=spec).server.adapter)
    for name, part in found[0].items():
        torch.testing.assert_close(found[1][name].b, 4 * part.b, rtol=1e-5, atol=1e-5)


def cosine(x, y, loss):
    """Of the whole matrices, or the mean over their columns."""
    if loss == "cos":
        return (x * y).sum() / (x.norm() * y.norm())
    return torch.nn.functional.cosine_similarity(x, y, dim=0).mean()
