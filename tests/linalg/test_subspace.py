import math

import pytest
import torch

from fedlora.linalg.combine import mean
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.subspace import align, aligned_rows, angles, frame, orthonormal, rank_change, similarity

from twins import apart, drifted_terms, random_factor


def rotation(n, seed=0, det=1):
    q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return q if torch.linalg.det(q) * det > 0 else torch.cat([q[:, :-1], -q[:, -1:]], -1)


def turned(factor, r):
    return LowRank(b=factor.b @ r, a=r.mT @ factor.a)


def square(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_likeness_is_the_alignment_of_centred_gram_matrices():
    """The definition: the cosine between h x x^T h and h y y^T h, h the centring matrix."""
    x, y = square(2, 6, 6), square(2, 6, 4, seed=1)
    h = torch.eye(6, dtype=torch.float64) - 1 / 6
    k, m = h @ x @ x.mT @ h, h @ y @ y.mT @ h
    cosine = (k * m).sum((-2, -1)) / (k.square().sum((-2, -1)) * m.square().sum((-2, -1))).sqrt()
    torch.testing.assert_close(similarity(x, y), cosine)
    torch.testing.assert_close(similarity(y, x), cosine)


def test_likeness_is_one_for_equal_matrices_and_blind_to_size_and_to_rotations_from_the_right():
    x = square(6, 6)
    for y in (x, -3 * x, x @ rotation(6), x @ rotation(6, seed=1, det=-1)):
        assert similarity(x, y).item() == pytest.approx(1)
    assert similarity(x, square(6, 6, seed=1)) < 0.9


def test_likeness_is_not_blind_to_rotations_from_the_left():
    x = square(6, 6)
    assert similarity(x, rotation(6) @ x) < 0.9


def test_matrices_of_equal_rows_are_alike_and_give_no_nan():
    assert similarity(torch.ones(3, 3), square(3, 3).float()) == 1
    assert similarity(torch.ones(1, 1), 5 * torch.ones(1, 1)) == 1


@pytest.mark.parametrize(("n", "k"), [(12, 3), (5, 5), (5, 12)])
def test_a_frame_has_orthonormal_columns_as_many_in_turn_as_there_can_be(n, k):
    q = frame(n, k, torch.Generator().manual_seed(0))
    assert q.shape == (n, k)
    for group in torch.split(q, n, dim=1):
        torch.testing.assert_close(group.mT @ group, torch.eye(group.shape[1]))


def test_a_frame_has_the_signs_of_the_gram_schmidt_process():
    drawn = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = []
    for x in drawn.unbind(1):
        for q in columns:
            x = x - (q @ x) * q
        columns.append(x / x.norm())
    torch.testing.assert_close(frame(12, 4, torch.Generator().manual_seed(3)), torch.stack(columns, 1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_orthonormal_basis_spans_the_columns(dtype):
    x = random_factor(4, batch=(2,), dtype=dtype).b
    q = orthonormal(x)
    assert q.dtype == dtype
    assert apart(q @ (q.mT @ x), x) < 1e-6
    torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=dtype).expand(2, -1, -1), rtol=0, atol=1e-6)


def test_angles_are_those_the_planes_were_turned_by():
    eye, wanted = torch.eye(8, dtype=torch.float64), torch.tensor([1e-9, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    v = eye[:, :4] * wanted.cos() + eye[:, 4:] * wanted.sin()
    mixed = v @ rotation(4)
    torch.testing.assert_close(angles(eye[:, :4], mixed), wanted, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(angles(mixed, eye[:, :2]), angles(eye[:, :2], mixed))


def test_a_contained_space_is_at_no_angle():
    x = random_factor(5).b
    assert float(angles(x, x[:, :2] @ rotation(2)).max()) < 1e-14


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_ranks_change_is_the_norm_of_its_dense_product(side, batch):
    start, moved = random_factor(4, seed=1, batch=batch), random_factor(4, seed=2, batch=batch)
    trained = LowRank(b=moved.b if side == "b" else start.b, a=moved.a if side == "a" else start.a)
    columns = (
        trained.b[..., :, None, :] * trained.a.mT[..., None, :, :] - start.b[..., :, None, :] * start.a.mT[..., None, :, :]
    )
    torch.testing.assert_close(rank_change(start, trained, side), columns.square().sum((-3, -2)).sqrt())


def test_a_rank_that_did_not_move_scores_nothing():
    start = random_factor(3)
    trained = LowRank(b=start.b + torch.tensor([0.0, 1.0, 0.0]).double(), a=start.a)
    assert (rank_change(start, trained, "b") > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_aligning_changes_no_product(side, strength):
    factor, reference = random_factor(4, seed=1, batch=(2,)), random_factor(4, seed=2, batch=(2,))
    found = align(factor, reference, side, strength)
    assert apart(found.product(), factor.product()) < 1e-13
    torch.testing.assert_close(torch.linalg.matrix_norm(found.b), torch.linalg.matrix_norm(factor.b))


def test_strength_zero_changes_nothing():
    factor = random_factor(4, seed=1)
    assert apart(align(factor, random_factor(4, seed=2), "a", 0.0).a, factor.a) < 1e-14


@pytest.mark.parametrize("side", ["a", "b"])
def test_no_orthogonal_matrix_brings_the_factors_nearer(side):
    factor, reference = random_factor(3, seed=1), random_factor(3, seed=2)
    distance = lambda f: float((getattr(f, side) - getattr(reference, side)).norm())  # noqa: E731
    found = distance(align(factor, reference, side, proper=False))
    assert all(found <= distance(turned(factor, rotation(3, seed, det=(-1) ** seed))) for seed in range(50))


@pytest.mark.parametrize("side", ["a", "b"])
def test_no_proper_rotation_brings_the_factors_nearer(side):
    factor, reference = turned(random_factor(3, seed=1), rotation(3, det=-1)), random_factor(3, seed=1)
    distance = lambda f: float((getattr(f, side) - getattr(reference, side)).norm())  # noqa: E731
    found = distance(align(factor, reference, side))
    assert found > 0.1
    assert all(found <= distance(turned(factor, rotation(3, seed))) for seed in range(50))


@pytest.mark.parametrize("side", ["a", "b"])
def test_factors_that_differ_by_rotations_average_to_their_common_product(side):
    factor = random_factor(4)
    turns = [turned(factor, rotation(4, seed)) for seed in range(3)]
    aligned = [(1 / 3, align(f, factor, side)) for f in turns]
    assert apart(mean(aligned).product(), factor.product()) < 1e-13
    assert apart(mean([(1 / 3, f) for f in turns]).product(), factor.product()) > 0.1


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_a_soft_rotation_stays_near_the_identity(strength):
    for _, factor in drifted_terms(5, 4, 1.0):
        reference = random_factor(4, seed=3)
        turn = lambda s: torch.linalg.lstsq(factor.b, align(factor, reference, "b", s).b).solution  # noqa: B023, E731
        eye = torch.eye(4, dtype=torch.float64)
        assert (turn(strength) - eye).norm() <= 2 * strength * (turn(1.0) - eye).norm() + 1e-12


def test_ranks_that_differ_and_wrong_strengths_are_refused():
    with pytest.raises(ValueError, match="rank 3"):
        align(random_factor(3), random_factor(4), "a")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        align(random_factor(3), random_factor(3), "a", strength=1.5)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("many", [3, 5])
def test_aligned_rows_do_not_depend_on_the_basis_and_no_others_are_more_aligned(rank, many):
    rows, fallback = square(many, 9), square(3, 9, seed=1)
    reference = square(3, rank, seed=2) @ square(rank, 9, seed=3)
    found = aligned_rows(rows, reference, fallback, 1e-12)
    for seed in range(4):
        other = aligned_rows(rotation(many, seed) @ rows, reference, fallback, 1e-12)
        torch.testing.assert_close(other, found, rtol=0, atol=1e-9)
    for seed in range(100):
        turn = rotation(many, seed, det=(-1) ** seed)[:3]
        assert (found * reference).sum() >= (turn @ rows * reference).sum() - 1e-9
    turn = found @ torch.linalg.pinv(rows)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3, dtype=torch.float64))
