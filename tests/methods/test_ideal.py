"""The mean that merges are measured against."""

import pytest

from fedlora.adapter import unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.methods.ideal import MeanUpdate, alike, batch, unbatch

from uploads import dense, factors, mean_product, off, replies_of_ranks, truncated


def ideal_of(replies):
    ideal = MeanUpdate()
    for reply in replies:
        ideal = ideal.add(reply.weight, unpack(reply.upload, LowRank))
    return ideal


@pytest.mark.parametrize("ranks", [(3,), (2, 5, 1), (8, 8, 8, 8, 8, 8)])
def test_it_is_the_weighted_mean_of_the_products_as_factors_and_as_a_matrix(ranks):
    replies = replies_of_ranks(*ranks)
    base_update = ideal_of(replies).factors()
    assert off({name: dense(part) for name, part in base_update.items()}, mean_product(replies)) < 1e-6
    for part in base_update.values():
        assert part.rank <= min(sum(ranks), part.b.shape[0], part.a.shape[1])


def test_its_best_fit_has_the_rank_of_each_module():
    replies = replies_of_ranks(4, 4, 4)
    template = {name: LowRank(b=f.b[:, : 2 + i], a=f.a[: 2 + i]) for i, (name, f) in enumerate(factors(8, "like").items())}
    fitted = ideal_of(replies).best_fit(template)
    for name, part in fitted.items():
        wanted = truncated({name: mean_product(replies)[name]}, template[name].rank)
        assert part.rank == template[name].rank and off({name: dense(part)}, wanted) < 1e-6


@pytest.mark.parametrize("ranks", [(3, 2), (8, 8, 8, 8, 8, 8)])
def test_the_error_is_the_distance_over_all_modules_relative_to_the_mean(ranks):
    replies, update, more = replies_of_ranks(*ranks), factors(3, "view"), factors(2, "base update")
    both = {name: dense(update[name]) + dense(more[name]) for name in update}
    assert ideal_of(replies).error(update, more) == pytest.approx(off(both, mean_product(replies)), rel=1e-5)


def test_the_error_of_a_mean_that_is_zero_is_zero():
    still = {name: LowRank(b=0 * f.b, a=f.a) for name, f in factors(3, "still").items()}
    assert MeanUpdate().add(2.0, still).error(still) == 0.0


def test_modules_of_one_shape_are_one_batch_and_come_back_as_they_were():
    adapter = factors(3, "any")
    assert alike(adapter) == (("layer.2.q", "layer.3.q"), ("layer.10.v",))
    for names in alike(adapter):
        for name, part in unbatch(batch(adapter, names), names, adapter[names[0]].b.dtype).items():
            assert (part.b == adapter[name].b).all() and (part.a == adapter[name].a).all()


def test_without_a_positive_weight_there_is_no_mean():
    with pytest.raises(ValueError, match="no reply has a positive weight"):
        MeanUpdate().add(0.0, factors(2, "x")).factors()
