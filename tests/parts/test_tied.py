"""A factor used twice."""

import pytest
from kinds import drawn
from torch import nn
from torch.testing import assert_close

from fedlora.adapter import Scaling
from fedlora.linalg.subspace import orthonormal
from fedlora.models.adapted import AdaptedModel
from fedlora.parts.tied import Tied

SIZES = [(5, 9), (9, 5), (6, 6)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def tied(size: tuple[int, int], rank: int = 3, offset: bool = False, seed: int = 0) -> Tied:
    out, in_ = size
    frame = orthonormal(drawn(max(size), min(size)))
    a = drawn(rank, min(size), seed=seed)
    return Tied(a, a.clone() if offset else a[:0], frame if out > in_ else frame.mT)


def adapted_linear(size: tuple[int, int], alpha: float | None) -> tuple[AdaptedModel, nn.Linear]:
    linear = nn.Linear(size[1], size[0], bias=False).double()
    return AdaptedModel(nn.Sequential(linear), Scaling(alpha), ["0"]), linear


@every_size
def test_one_frame_gives_the_updates_of_two(size):
    """As published, left a^T a right: the square frame of the shorter side rotates a."""
    out, in_ = size
    k = min(size)
    left, right = orthonormal(drawn(out, k)), orthonormal(drawn(in_, k)).mT
    a = drawn(3, k)
    both = left @ a.mT @ a @ right
    one = Tied(a @ right, a[:0], left @ right) if out > in_ else Tied(a @ left.mT, a[:0], left @ right)
    assert_close(one.product(), both)


@every_size
def test_the_gradient_is_that_of_the_gram_matrix(size):
    """scale * a (h + h^T), for h the gradient of the weight seen through the frame."""
    (out, in_), scale = size, 8.0
    part, (adapted, linear) = tied(size), adapted_linear(size, 3 * scale)
    (a,) = adapted.load_clients([{"0": part}], "a")
    x = drawn(4, in_)
    adapted.model(x).square().sum().backward()
    weight = (linear.weight + part.product()).detach().requires_grad_()
    (x @ weight.mT).square().sum().backward()
    h = part.frame.mT @ weight.grad if out > in_ else weight.grad @ part.frame.mT
    assert_close(a.grad[0], scale * a.detach()[0] @ (h + h.mT))


@every_size
def test_a_scale_four_times_as_large_gives_four_times_the_product(size):
    x, updates = drawn(4, size[1]), []
    for scale in (1.0, 4.0):
        adapted, linear = adapted_linear(size, 3 * scale)
        (trained,) = adapted.load_clients([{"0": tied(size)}], "a")
        trained.data.copy_(tied(size, seed=1).a[None])
        updates.append((adapted.model(x) - linear(x)).detach())
    assert_close(updates[1], 4 * updates[0])


@every_size
def test_padded_rows_stay_zero_and_get_no_gradient(size):
    adapted, _ = adapted_linear(size, 2.0)
    parts = [{"0": tied(size, rank)} for rank in (1, 3)]
    (a,) = adapted.load_clients(parts, "a")
    adapted.model(drawn(4, size[1])).square().sum().backward()
    assert not a[0, 1:].any() and not a.grad[0, 1:].any() and a.grad[0, :1].all() and a.grad[1].all()


@every_size
def test_with_its_own_value_as_offset_the_factor_changes_nothing_but_can_learn(size):
    adapted, linear = adapted_linear(size, 2.0)
    (a,) = adapted.load_clients([{"0": tied(size, offset=True)}], "a")
    found, x = adapted.model(drawn(4, size[1])), drawn(4, size[1])
    assert_close(found, linear(x))
    found.square().sum().backward()
    assert a.grad.abs().max() > 0.1
