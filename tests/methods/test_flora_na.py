"""FLoRA-NA: between averaged factors and the best fit of the same rank."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Upload
from fedlora.methods.flora_na import FLoRANA

from uploads import (
    SPEC,
    dense,
    drifted,
    factors,
    mean_product,
    measured_error,
    merged_by,
    off,
    replies_of,
    replies_of_ranks,
    truncated,
    update,
)

FORMS, SCOPES, SOLVERS = ("linear", "affine"), ("layer", "model"), ("als", "adamw")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_never_worse_than_averaged_factors_and_never_better_than_the_best_fit(form, scope, solver):
    method, replies = FLoRANA(rank=3, form=form, scope=scope, solver=solver), drifted(5, 3)
    mean = mean_product(replies)
    merged = merged_by(method, replies, server=at_start(method))
    averaged = {name: dense(part) for name, part in mean_factors(replies).items()}
    error = off(update(method, merged), mean)
    assert off(truncated(mean, 3), mean) - 1e-6 <= error <= off(averaged, mean) + 1e-6
    measured = measured_error(method, merged, replies, at_start(method))
    assert merged.notes["aggregation_error"] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_coefficients_of_each_layer_fit_at_least_as_well_as_those_of_the_model(form):
    replies, errors = drifted(5, 3, drift=1.0), {}
    for scope in SCOPES:
        method = FLoRANA(rank=3, form=form, scope=scope)
        errors[scope] = merged_by(method, replies, server=at_start(method)).notes["aggregation_error"]
    assert errors["layer"] < errors["model"]


@pytest.mark.parametrize("scope", SCOPES)
def test_clients_that_differ_in_size_only_are_merged_exactly(scope):
    one = factors(3, "one")
    sizes = (0.1, 1.0, 8.0)
    replies = replies_of([{name: LowRank(b=c * part.b, a=part.a) for name, part in one.items()} for c in sizes])
    method = FLoRANA(rank=3, scope=scope)
    assert off(update(method, merged_by(method, replies)), mean_product(replies)) < 1e-6


@pytest.mark.parametrize("common", ["b", "a"])
def test_clients_with_a_common_factor_are_merged_exactly(common):
    start, moves = factors(3, "start"), [factors(3, "move", i) for i in range(4)]
    uploads = [{n: LowRank(**{**vars(part), common: getattr(start[n], common)}) for n, part in m.items()} for m in moves]
    method, replies = FLoRANA(rank=3), replies_of(uploads)
    assert off(update(method, merged_by(method, replies)), mean_product(replies)) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_one_client_and_identical_clients_keep_their_update(form):
    method, one = FLoRANA(rank=3, form=form), factors(3, "one")
    for uploads in ([one], [one] * 4):
        replies = replies_of(uploads)
        found = update(method, merged_by(method, replies, server=at_start(method)))
        assert off(found, mean_product(replies)) < 1e-6


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", FORMS)
def test_unequal_ranks_are_no_worse_than_averaged_zero_padded_factors(form, scope):
    method, replies = FLoRANA(rank=6, form=form, scope=scope), replies_of_ranks(4, 1, 3)
    merged = merged_by(method, replies, server=at_start(method))
    padded = {name: dense(part) for name, part in mean_factors(replies, 6).items()}
    assert off(update(method, merged), mean_product(replies)) <= off(padded, mean_product(replies)) + 1e-6


def test_ranks_that_nobody_had_can_still_learn():
    server = merged_by(FLoRANA(rank=6), replies_of_ranks(4, 1, 3)).server
    for part in server.adapter.values():
        assert part.rank == 6 and not part.b[:, 4:].any() and bool(part.a[4:].abs().sum(1).all())


def test_the_factors_of_the_linear_form_are_as_large_as_each_other_would_be_in_the_mean():
    replies = drifted(4, 3)
    server, mean = merged_by(FLoRANA(rank=3), replies).server.adapter, mean_factors(replies)
    for name, part in server.items():
        assert float(part.b.norm() / part.a.norm()) == pytest.approx(float(mean[name].b.norm() / mean[name].a.norm()), 1e-4)


def test_a_module_is_found_by_its_name_and_not_by_its_place():
    method, replies = FLoRANA(rank=3), drifted(3, 3)
    turned = [replace(r, upload=Upload(dict(reversed(r.upload.values.items())))) for r in replies]
    one, other = (merged_by(method, some).server.adapter for some in (replies, turned))
    assert all(torch.equal(one[name].product(), other[name].product()) for name in one)


def at_start(method):
    """The server's state if it had sent the factors from which the clients went apart."""
    return replace(method.init_server(SPEC, 0), adapter=factors(method.rank, "start", 0))


def mean_factors(replies, rank=3):
    """Averaged zero-padded factors."""
    total, found = sum(r.weight for r in replies), {}
    for name in SPEC.modules:
        parts = [(r.weight / total, unpack(r.upload.values, LowRank)[name]) for r in replies]
        b = sum(w * torch.nn.functional.pad(p.b, (0, rank - p.rank)) for w, p in parts)
        a = sum(w * torch.nn.functional.pad(p.a, (0, 0, 0, rank - p.rank)) for w, p in parts)
        found[name] = LowRank(b=b, a=a)
    return found


def test_a_rank_that_no_client_has_can_learn_beside_a_module_of_that_rank():
    spec = replace(SPEC, rank_pattern={"layer.3.q": 3})  # as large as layer.2.q
    after = merged_by(FLoRANA(3), replies_of_ranks(2, 1, spec=spec), spec=spec).server.adapter
    assert all(part.a.any(1).all() for part in after.values())
