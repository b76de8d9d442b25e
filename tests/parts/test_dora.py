"""DoRA's part against its definition."""

import pytest
import torch
from kinds import Linear, drawn
from torch.testing import assert_close

from fedlora.parts.dora import Dora, changed_row_norms
from fedlora.parts.table import stacked

every_size = pytest.mark.parametrize("size", [(5, 7), (7, 5), (6, 6)], ids=str)


def of_rank(size: tuple[int, int], rank: int = 3) -> tuple[torch.Tensor, Dora]:
    """A weight, and a part for it."""
    out, in_ = size
    return drawn(*size, seed=5), Dora(drawn(out, rank), drawn(rank, in_), drawn(out, seed=1).abs())


def by_definition(weight: torch.Tensor, part: Dora) -> torch.Tensor:
    """diag(m / n) (W + b a), n detached."""
    changed = weight + part.b @ part.a
    return torch.diag(part.m / torch.linalg.norm(changed, dim=1).detach()) @ changed


@every_size
def test_the_norms_are_those_of_the_dense_sum(size):
    weight, part = of_rank(size)
    b, a = (torch.stack([x, 2 * x]) for x in (part.b, part.a))  # two clients
    expected = torch.stack([(weight + y @ x).norm(dim=1) for y, x in zip(b, a, strict=True)])
    assert_close(changed_row_norms(b, a, weight, weight.norm(dim=1)), expected)


@every_size
def test_the_changed_weight_is_that_of_the_definition(size):
    weight, part = of_rank(size)
    assert_close(part.changed(weight), by_definition(weight, part))


@every_size
def test_the_update_and_its_gradients_are_those_of_the_dense_weight(size):
    weight, part = of_rank(size)
    x, scale = drawn(1, 4, size[1]), torch.full((1, 1, 1), 0.5).double()
    b, a, m = (leaf.clone()[None].requires_grad_() for leaf in (part.b / 0.5, part.a, part.m))
    inputs = x.clone().requires_grad_()
    found = inputs @ weight.mT + Dora(b, a, m).apply(inputs, inputs, scale, Linear(weight, inputs))
    dense = [leaf.detach()[0].clone().requires_grad_() for leaf in (b, a, m)]
    twin = x.clone().requires_grad_()
    expected = twin @ by_definition(weight, Dora(0.5 * dense[0], dense[1], dense[2])).mT
    assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for leaf, other in zip((b, a, m), dense, strict=True):
        assert_close(leaf.grad[0], other.grad)
    assert_close(inputs.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_update_the_weight_is_unchanged_bit_for_bit(dtype):
    weight = drawn(50, 70).float()
    part = Dora(torch.zeros(50, 3), drawn(3, 70).float(), weight.norm(dim=1))
    x = drawn(1, 4, 70).to(dtype)
    assert not stacked([part]).apply(x, x, torch.ones(1, 1, 1), Linear(weight, x.float())).any()
    assert torch.equal(part.changed(weight), weight)


def test_a_row_of_zeros_stays_zero_and_has_finite_gradients():
    weight = drawn(5, 7).index_fill(0, torch.tensor(2), 0)
    part = Dora(torch.zeros(1, 5, 3).double().requires_grad_(), drawn(1, 3, 7), weight.norm(dim=1)[None].requires_grad_())
    x = drawn(1, 4, 7)
    found = x @ weight.mT + part.apply(x, x, torch.ones(1, 1, 1).double(), Linear(weight, x))
    assert_close(found, x @ weight.mT)
    found.square().sum().backward()
    assert part.b.grad.isfinite().all() and part.m.grad.isfinite().all() and part.b.grad.any()
