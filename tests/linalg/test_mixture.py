"""Mixtures of labelled points: which groups have one, and what it keeps of them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.linalg.mixture import Mixtures, components, fit_mixtures, validation_error

SIZES = (1, 40, 0, 2, 3, 25)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of groups of these sizes, in no order, around two places each."""
    rng = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.tensor(SIZES))[torch.randperm(sum(SIZES), generator=rng)]
    return torch.randn(len(groups), 4, generator=rng) + 5.0 * torch.randint(2, (len(groups), 1), generator=rng), groups


def parts(found: Mixtures) -> list[Mixtures]:
    """One mixture for each group, in tensors of its own."""
    sizes = components(found.counts).tolist()
    pieces = zip(*(x.split(sizes) for x in (found.weights, found.means, found.variances)), strict=True)
    return [Mixtures(found.counts[i : i + 1], *piece) for i, piece in enumerate(pieces)]


def test_groups_of_fewer_than_two_points_have_no_mixture_and_none_has_more_than_three_components():
    found = fit_mixtures(*drawn(), len(SIZES), 0)
    assert found.counts.tolist() == list(SIZES)
    assert [len(part.weights) for part in parts(found)] == [0, 3, 0, 2, 3, 3]
    assert found.means.dtype == torch.float32 and validation_error(found) is None


def test_a_mixture_has_the_mean_and_the_variance_of_its_points():
    points, groups = drawn()
    for group, part in enumerate(parts(fit_mixtures(points, groups, len(SIZES), 0))):
        if SIZES[group] > 1:
            own, w = points[groups == group], part.weights[:, None]
            mean, square = (w * part.means).sum(0), (w * (part.variances + part.means.square())).sum(0)
            assert_close(mean, own.mean(0), rtol=1e-4, atol=1e-4)
            assert_close(square - mean.square(), own.var(0, correction=0) + 1e-5, rtol=1e-3, atol=1e-3)


def test_who_has_the_mixture_of_three_points_has_the_points():
    points, groups = drawn()
    part = parts(fit_mixtures(points, groups, len(SIZES), 0))[4]
    assert torch.cdist(points[groups == 4], part.means).min(1).values.max() < 1e-5


def test_equal_points_are_no_trouble():
    found = fit_mixtures(torch.ones(9, 4), torch.zeros(9, dtype=torch.long), 1, 0)
    assert validation_error(found) is None
    assert_close(found.weights @ found.means, torch.ones(4))


def test_the_same_seed_gives_the_same_mixtures():
    one, other = (fit_mixtures(*drawn(), len(SIZES), 7) for _ in range(2))
    assert all(torch.equal(x, vars(other)[key]) for key, x in vars(one).items())


def test_nobodys_points_have_the_shapes_of_everybodys():
    found = fit_mixtures(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 3, 0)
    assert (found.counts.tolist(), found.means.shape, found.weights.shape) == ([0, 0, 0], (0, 4), (0,))


@pytest.mark.parametrize(("key", "factor"), [("weights", -1.0), ("weights", 1.1), ("variances", -1.0)])
def test_a_flaw_is_found(key, factor):
    found = fit_mixtures(*drawn(), len(SIZES), 0)
    assert validation_error(replace(found, **{key: vars(found)[key] * factor})) is not None
