"""All that is made of factors on a device stays there. The device is torch's meta: shapes and places, but no numbers."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedlora.linalg import ridge_correction as solve
from fedlora.linalg.als import affine, alternate, combined, descend, linear, objective
from fedlora.linalg.combine import inner, mean, norm, relative_error, residual, stack, widen
from fedlora.linalg.fit import best_fit, recompress, svd, truncate
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.randomized_svd import first_sketch, fit_from_sketch, gaussian_matrix, range_basis, second_sketch
from fedlora.linalg.robust_pca import robust_pca
from fedlora.linalg.running_sum import RunningSum
from fedlora.linalg.subspace import align, angles, rank_change, similarity
from fedlora.linalg.weighted_terms import Terms


def factor(rank: int = 4, dtype: torch.dtype = torch.float32) -> LowRank:
    shapes = (2, 30, rank), (2, rank, 22)
    return LowRank(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes))


def terms(count: int) -> Terms:
    return [(1 / count, factor()) for _ in range(count)]


def queried() -> Any:
    omega = gaussian_matrix(22, 6, torch.Generator().manual_seed(0)).to("meta").expand(2, -1, -1)
    basis = range_basis(first_sketch(factor(), omega))
    return fit_from_sketch(second_sketch(factor(), basis), basis, 4)


def streamed(count: int, budget: int | None = None) -> LowRank:
    total = RunningSum(budget)
    for weight, one in terms(count):
        total = total.add(weight, one)
    return total.best_fit(4)


MADE = {
    "best fit of few": lambda: best_fit(terms(3), 4),
    "best fit of many": lambda: best_fit(terms(12), 4),
    "best fit in fp64": lambda: best_fit([(1.0, factor(dtype=torch.float64))] * 2, 4),
    "best fit in bf16": lambda: best_fit([(1.0, factor(dtype=torch.bfloat16))] * 2, 4),
    "truncate": lambda: truncate(factor().product(), 4),
    "svd": lambda: svd(terms(3)),
    "recompress": lambda: recompress(factor()),
    "stream, factors": lambda: streamed(2),
    "stream, dense": lambda: streamed(8),
    "stream, cut": lambda: streamed(6, 4),
    "stack": lambda: stack(terms(3)),
    "mean": lambda: mean(terms(3)),
    "residual": lambda: residual(terms(3)),
    "widen": lambda: widen(factor(), 6, torch.Generator().manual_seed(0)),
    "inner": lambda: inner(factor(), factor()),
    "norm": lambda: norm(factor()),
    "relative error": lambda: relative_error(factor(), terms(12)),
    "ridge": lambda: solve.corrected(terms(3), 0.1),
    "cosine": lambda: solve.descend(solve.CosineLoss(terms(3), 0.1), 2, 0.1),
    "cosine of columns": lambda: solve.descend(solve.CosineLoss(terms(3), 0.1, per_column=True), 2, 0.1),
    "coefficients": lambda: combined(layer := linear(terms(3)), alternate([layer], sweeps=3)),
    "coefficients of all": lambda: objective([layer := linear(terms(3))], alternate([layer], True, 3), True),
    "coefficients of deviations": lambda: combined(layer := affine(terms(3), factor()), alternate([layer], sweeps=3)),
    "coefficients by AdamW": lambda: descend([linear(terms(3))], steps=2),
    "queries": queried,
    "angles": lambda: angles(factor().b, factor().b),
    "likeness": lambda: similarity(factor().b, factor().b),
    "rank change": lambda: rank_change(factor(), factor(), "b"),
    "align": lambda: align(factor(), factor(), "a"),
    "robust parts": lambda: robust_pca(torch.empty(50, 3, device="meta"), None),
}


def tensors(made: Any) -> Iterator[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        yield made
    elif isinstance(made, tuple):
        for one in made:
            yield from tensors(one)
    elif is_dataclass(made):
        for field in fields(made):
            yield from tensors(getattr(made, field.name))


@pytest.mark.parametrize("answer", [False, True])  # whatever is asked of a number: there is none
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_factors_on_a_device_is_there_too(name, answer, monkeypatch):
    for number in (bool, float, int):
        monkeypatch.setattr(torch.Tensor, f"__{number.__name__}__", lambda _, number=number: number(answer))
    with FakeTensorMode(allow_non_fake_inputs=True):  # notices what is in two places, which meta alone does not
        found = list(tensors(MADE[name]()))
    assert found and {x.device.type for x in found} == {"meta"}


def test_two_places_would_be_noticed():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        inner(factor(), LowRank(torch.empty(2, 30, 4), torch.empty(2, 4, 22)))
