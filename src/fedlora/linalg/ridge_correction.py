"""Corrections of the mean b, so that its product with the mean a approximates the mean of the products, m.

Only the part of m in the row space of a can be corrected: for any strength, the result is exact only if all terms have
the same a. No [out, in] matrix is formed: only `cross` and norms of m are used.
Source: Bian et al. 2025, arXiv:2411.14961, equation 8.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.combine import mean
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.weighted_terms import WORKING, Terms, concat_factors, shared_rank

_SINGULAR = 1e-13  # relative: smaller eigenvalues of a a^T are rounding


def cross(factor: LowRank, a: Float[Tensor, "*batch rank in"]) -> Float[Tensor, "*batch out rank"]:
    """b (a_own a^T), linear in each product; its weighted sum over the terms is m a^T, which `ridge` needs."""
    return _cross(factor, a).to(factor.b.dtype)


def ridge(center: LowRank, crosses: Float[Tensor, "*batch out rank"], strength: float) -> LowRank:
    """(b + d, a) with the d that minimizes |m - (b + d) a|^2 + strength |d|^2, in closed form.

    `center` holds the mean factors, `crosses` is m a^T. For strength 0 the product is m projected onto the row space of
    a, and d is the smallest such correction.

    Raises:
        ValueError: strength is negative.
    """
    if strength < 0:
        raise ValueError(f"expected strength >= 0, got {strength}")
    b, a = center.b.to(WORKING), center.a.to(WORKING)
    gram = a @ a.mT
    values, vectors = torch.linalg.eigh(gram)
    divisor = values + strength
    inverse = torch.where(values > _SINGULAR * values[..., -1:], 1 / divisor, 0)
    step = (crosses.to(WORKING) - b @ gram) @ vectors
    return LowRank(b=(b + (step * inverse[..., None, :]) @ vectors.mT).to(center.b.dtype), a=center.a)


def corrected(terms: Terms, strength: float) -> LowRank:
    """`ridge` of the terms, with normalized weights.

    Raises:
        ValueError: the ranks differ, or strength is negative.
    """
    center = mean(terms)
    crosses = torch.zeros_like(center.b, dtype=WORKING)
    for weight, factor in _normalized(terms):
        crosses += weight * _cross(factor, center.a)
    return ridge(center, crosses, strength)


class CosineLoss:
    """1 - cos(m, x a) + strength |x - b|^2 as a function of x, without a dense matrix.

    With `per_column`, the cosine is replaced by the mean of the columns' cosines. With `squared` False, the penalty is
    not squared. The cosine does not depend on the norm of the product.
    """

    def __init__(self, terms: Terms, strength: float, per_column: bool = False, squared: bool = True) -> None:
        total = concat_factors(_normalized(terms), WORKING)
        self.center = mean([(w, LowRank(b=f.b.to(WORKING), a=f.a.to(WORKING))) for w, f in terms])
        self.strength, self.per_column, self.squared = strength, per_column, squared
        self._total = total
        lengths = ((total.b.mT @ total.b @ total.a) * total.a).sum(-2).clamp_min(0)  # [*batch, in], squared
        self._lengths = (lengths if per_column else lengths.sum(-1, keepdim=True)).sqrt()
        self._cross = total.b @ (total.a @ self.center.a.mT)

    def value(self, x: Float[Tensor, "*batch out rank"]) -> Float[Tensor, "*batch"]:
        """The loss at x."""
        deviation = (x - self.center.b).square().sum((-2, -1))
        shared, own = self._overlap(x)
        cosine = _ratio(shared, self._lengths * own).mean(-1)
        return 1 - cosine + self.strength * (deviation if self.squared else deviation.sqrt())

    def gradient(self, x: Float[Tensor, "*batch out rank"]) -> Float[Tensor, "*batch out rank"]:
        """The derivative of the loss with respect to x; that of the unsquared norm at x = b is set to 0."""
        deviation = x - self.center.b
        shared, own = self._overlap(x)
        near, far = _ratio(1.0, self._lengths * own), _ratio(shared, self._lengths * own**3)
        if self.per_column:
            a, in_ = self.center.a, x.new_tensor(self.center.a.shape[-1])
            towards = self._total.b @ (self._total.a @ (a * near[..., None, :]).mT) / in_
            away = x @ ((a * far[..., None, :]) @ a.mT) / in_
        else:
            towards = self._cross * near[..., None]
            away = x @ (self.center.a @ self.center.a.mT) * far[..., None]
        length = deviation.square().sum((-2, -1), keepdim=True).sqrt()
        return away - towards + self.strength * (2 * deviation if self.squared else _ratio(deviation, length))

    def _overlap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """<m, x a> and |x a|, [*batch, 1], or per column, [*batch, in]."""
        a = self.center.a
        if not self.per_column:
            shared = (self._cross * x).sum((-2, -1))[..., None]
            return shared, ((x.mT @ x) * (a @ a.mT)).sum((-2, -1))[..., None].clamp_min(0).sqrt()
        image = self._total.a.mT @ (self._total.b.mT @ x)  # m^T x, [*batch, in, rank]
        return (image.mT * a).sum(-2), ((x.mT @ x @ a) * a).sum(-2).clamp_min(0).sqrt()


def descend(loss: CosineLoss, steps: int, rate: float, start: Float[Tensor, "*batch out rank"] | None = None) -> LowRank:
    """The mean a, and the b found by plain gradient descent from `start`, or from the mean b; in fp64.

    The influence of a random start decays as (1 - 2 rate strength)^steps, and persists if strength * rate * steps is small.
    """
    x = loss.center.b if start is None else start.to(WORKING)
    for _ in range(steps):
        x = x - rate * loss.gradient(x)
    return LowRank(b=x, a=loss.center.a)


def _cross(factor: LowRank, a: Tensor) -> Tensor:
    return torch.matmul(factor.b.to(WORKING), factor.a.to(WORKING) @ a.mT.to(WORKING))


def _normalized(terms: Terms) -> list[tuple[float, LowRank]]:
    shared_rank(terms)
    total = sum(weight for weight, _ in terms)
    return [(weight / total, factor) for weight, factor in terms]


def _ratio(x: Tensor | float, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y > 0, x / y.where(y > 0, 1), 0)
