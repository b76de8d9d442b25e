"""Coefficients p, q for which (sum_i p_i b_i)(sum_i q_i a_i) approximates a weighted mean of the products b_i a_i.

All computations use the deviations d_i and e_i from the mean factors b and a: the mean product is exactly b a + sum_i
s_i d_i e_i. As b a, which may be far larger than the rest, is never subtracted from another matrix, large arrays can
have the precision of the terms; arrays of the size of one factor or of the coefficients are fp64.

The objective is quadratic in p for fixed q and vice versa. For a given p, the least-squares problem for q needs only
the products of the combined b with itself and with the factored target, and in * rank multiplications for each pair of
terms. Precomputing the Gram blocks b_u^T b_v of all pairs would make steps independent of the width, but costs as much
as `rank` steps, which is more than usually needed, and, for many terms, more memory than the terms.
Source: Nguyen et al. 2025, arXiv:2509.26399.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.combine import norm
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.weighted_terms import WORKING, Terms, shared_rank

_FACTORS = 1 << 21  # elements stacked at once; larger batches are not faster on a CPU
_NOISE = 100  # multiplied by the precision of the deviations: bound on the rounding error of their inner products
_SINGULAR = 1e-12  # relative: directions of smaller curvature do not affect the objective, and are left unchanged


@dataclass(frozen=True)
class Side:
    """The b^T or the a of all terms: their mean, the origin minus the mean, and each term minus the mean.

    With coefficients c the combination is the mean + (1 - sum_i c_i) origin + sum_i c_i deviation_i, which is sum_i c_i
    term_i if the origin is zero, and otherwise the origin plus sum_i c_i (term_i - origin). `deviations` has the terms'
    dtype, but at least fp32; the other fields are fp64.
    """

    mean: Float[Tensor, "*batch rank n"]
    origin: Float[Tensor, "*batch rank n"]
    deviations: Float[Tensor, "*batch m rank n"]

    def displacement(self, coefficients: Tensor) -> Float[Tensor, "*batch rank n"]:
        """The combination minus the mean, in fp64, for coefficients [*batch, m], or [m] for the whole batch."""
        flat = self.deviations.flatten(-2)
        terms = torch.matmul(coefficients[..., None, :].to(flat.dtype), flat).reshape(self.mean.shape)
        return (1 - coefficients.sum(-1))[..., None, None] * self.origin + terms

    def slopes(self, x: Float[Tensor, "*batch rank n"]) -> Float[Tensor, "*batch m"]:
        """Inner products of x with the derivative of the combination by each coefficient."""
        own = torch.matmul(self.deviations.flatten(-2), x.to(self.deviations.dtype).flatten(-2)[..., None])[..., 0]
        return own.to(WORKING) - (x * self.origin).sum((-2, -1))[..., None]

    def curvature(
        self, gram: Float[Tensor, "*batch rank rank"]
    ) -> tuple[Float[Tensor, "*batch m m"], Float[Tensor, "*batch m"]]:
        """<gram x_i, x_j> for these derivatives x_i, and a bound on the rounding of each <gram x_i, x_i>."""
        flat = self.deviations.flatten(-2)
        own = ((gram.to(flat.dtype)[..., None, :, :] @ self.deviations).flatten(-2) @ flat.mT).to(WORKING)
        towards = gram @ self.origin
        mixed = self.slopes(towards)  # <gram origin, x_i>
        both = (towards * self.origin).sum((-2, -1))[..., None, None]
        noise = _NOISE * torch.finfo(flat.dtype).eps * own.diagonal(dim1=-2, dim2=-1)
        return own - mixed[..., None, :] - mixed[..., :, None] - both, noise


@dataclass(frozen=True)
class Layer:
    """One target matrix: the mean of b_i a_i with these weights, which sum to 1. `left` has the b^T, `right` the a.

    `scalable`: multiplying one side's coefficients by c and the other's by 1/c leaves the product unchanged.
    """

    left: Side
    right: Side
    weights: Float[Tensor, " m"]
    scalable: bool

    def residual(self) -> LowRank:
        """The target minus the product of the mean factors."""
        b = self.left.deviations * self.weights[:, None, None].to(self.left.deviations.dtype)
        return LowRank(b=b.flatten(-3, -2).mT, a=self.right.deviations.flatten(-3, -2))

    def size(self) -> Float[Tensor, "*batch"]:
        """The squared norm of the target."""
        means, rest = LowRank(b=self.left.mean.mT, a=self.right.mean), self.residual()
        return norm(LowRank(b=torch.cat([means.b, rest.b], -1), a=torch.cat([means.a, rest.a], -2))).square()

    def times_residual(self, b: Float[Tensor, "*batch k out"]) -> Float[Tensor, "*batch k in"]:
        """b times `residual`, in fp64."""
        left, right = self.left.deviations, self.right.deviations
        each = b.to(left.dtype) @ left.flatten(-3, -2).mT  # [*batch, k, m * rank]
        weights = self.weights.repeat_interleave(left.shape[-2]).to(left.dtype)
        return torch.matmul(each * weights, right.flatten(-3, -2)).to(WORKING)


@dataclass(frozen=True)
class Coefficients:
    """Weights of the b (p) and of the a (q), in fp64."""

    p: Float[Tensor, "*batch m"]
    q: Float[Tensor, "*batch m"]


def batch_size(terms: int, rank: int, width: int) -> int:
    """The number of matrices to batch into one layer, each of `terms` terms of that rank; `width` is out + in."""
    return max(1, _FACTORS // (terms * rank * width))


def linear(terms: Terms) -> Layer:
    """A layer whose coefficients weigh the factors themselves.

    Raises:
        ValueError: the ranks differ.
    """
    first = terms[0][1]
    zero = LowRank(b=torch.zeros_like(first.b), a=torch.zeros_like(first.a))
    return replace(affine(terms, zero), scalable=True)


def affine(terms: Terms, origin: LowRank) -> Layer:
    """A layer whose coefficients weigh the factors' deviations from `origin`; the result is added to `origin`.

    Raises:
        ValueError: the ranks differ.
    """
    shared_rank([*terms, (0.0, origin)])
    weights = torch.tensor([weight for weight, _ in terms], dtype=WORKING, device=origin.b.device)
    weights = weights / weights.sum()
    left = _side([factor.b.mT for _, factor in terms], origin.b.mT, weights)
    return Layer(left, _side([factor.a for _, factor in terms], origin.a, weights), weights, scalable=False)


def alternate(layers: Sequence[Layer], shared: bool = False, sweeps: int = 50) -> Coefficients:
    """Alternating exact least squares for q and p, starting from the mean factors.

    Stops after `sweeps`, or when for every element of the batch the next step would add less than a thousandth to the
    gain of all previous steps, as predicted from the objective's slope and its curvature at the previous step. It also
    stops if a gain is below 1e-14 of the squared norm of the mean factors' product, which may be rounding. All `layers`
    share one pair of coefficients; each element of the batch has its own, unless `shared`. The objective never
    increases. If the coefficients are not unique, each step takes those nearest to the previous ones. Synchronizes with
    the device a few times per sweep.
    """
    p = q = _start(layers, shared)
    mirrored = [replace(layer, left=layer.right, right=layer.left) for layer in layers]
    b, a = ([layer.right.displacement(p) for layer in sides] for sides in (mirrored, layers))
    before = _lengths(mirrored, b, shared), _lengths(layers, a, shared)
    inverse: Tensor | None = None
    least = 1e-14 * (before[0] * before[1]).square()
    gained = torch.zeros_like(least)
    for _ in range(sweeps):
        slope = _slope(layers, b, a, shared)
        if inverse is not None and ((slope * _times(inverse, slope)).sum(-1) <= torch.maximum(1e-3 * gained, least)).all():
            break
        inverse = _inverse(layers, b, shared)
        q = q + (step := _times(inverse, slope))
        gained = gained + (slope * step).sum(-1)
        a = [layer.right.displacement(q) for layer in layers]
        slope = _slope(mirrored, a, b, shared)
        p = p + (step := _times(_inverse(mirrored, a, shared), slope))
        gained = gained + (slope * step).sum(-1)
        b = [layer.left.displacement(p) for layer in layers]
    if not layers[0].scalable:
        return Coefficients(p=p, q=q)
    # the factors' norms keep the ratio of the mean factors' norms
    change = before[0] * _lengths(layers, a, shared) / (before[1] * _lengths(mirrored, b, shared))
    c = change.where(change.isfinite() & (change > 0), 1).sqrt()[..., None]
    return Coefficients(p=p * c, q=q / c)


def descend(layers: Sequence[Layer], shared: bool = False, steps: int = 200, rate: float = 1e-2) -> Coefficients:
    """The published solver: AdamW on multiples of the weights, from 1, with a cosine schedule to 1e-4; the best iterate."""
    start = _start(layers, shared)
    moving = [torch.ones_like(start).requires_grad_() for _ in "pq"]
    optimizer = torch.optim.AdamW(moving, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-4)
    best = Coefficients(p=start, q=start)
    size = _total([layer.size() for layer in layers], shared, 0).clamp_min(torch.finfo(WORKING).tiny)
    least = torch.full_like(size, float("inf"))
    for _ in range(steps + 1):
        now = Coefficients(*(start * x for x in moving))
        loss = _excess(layers, now, shared)
        better = (loss < least)[..., None]
        least = torch.minimum(least, loss).detach()
        best = Coefficients(p=torch.where(better, now.p, best.p).detach(), q=torch.where(better, now.q, best.q).detach())
        optimizer.zero_grad()
        torch.autograd.backward((loss / size).sum())
        optimizer.step()
        schedule.step()
    return best


def objective(layers: Sequence[Layer], coefficients: Coefficients, shared: bool = False) -> Float[Tensor, "*batch"]:
    """The squared Frobenius distance from the targets, summed over the layers (and over the batch if `shared`)."""
    residual = _total([norm(layer.residual()).square() for layer in layers], shared, 0)
    return residual + _excess(layers, coefficients, shared)


def combined(layer: Layer, coefficients: Coefficients) -> LowRank:
    """The combined factors, in fp64."""
    b, a = (
        layer.left.mean + layer.left.displacement(coefficients.p),
        layer.right.mean + layer.right.displacement(coefficients.q),
    )
    return LowRank(b=b.mT.contiguous(), a=a)


def _excess(layers: Sequence[Layer], coefficients: Coefficients, shared: bool) -> Tensor:
    """The objective minus that of the mean factors."""
    parts = []
    for layer in layers:
        start, a0, db, da = (
            layer.left.mean,
            layer.right.mean,
            layer.left.displacement(coefficients.p),
            layer.right.displacement(coefficients.q),
        )
        b, a = torch.cat([start, db], -2), torch.cat([da, a0 + da], -2)  # the product's change is b^T a
        parts.append((a * ((b @ b.mT) @ a - 2 * layer.times_residual(b))).sum((-2, -1)))
    return _total(parts, shared, 0)


def _slope(layers: Sequence[Layer], lefts: Sequence[Tensor], rights: Sequence[Tensor], shared: bool) -> Tensor:
    """Minus half the objective's gradient by q, given the displacements of both sides of each layer."""
    slopes = []
    for layer, db, da in zip(layers, lefts, rights, strict=True):
        start, a = layer.left.mean, layer.right.mean + da
        b = start + db
        slopes.append(layer.right.slopes(layer.times_residual(b) - (b @ start.mT) @ da - (b @ db.mT) @ a))
    return _total(slopes, shared, 1)


def _inverse(layers: Sequence[Layer], lefts: Sequence[Tensor], shared: bool) -> Tensor:
    """Pseudo-inverse of half the objective's Hessian by q, [*batch, m, m]; zero in directions without effect."""
    parts = []
    for layer, displacement in zip(layers, lefts, strict=True):
        b = layer.left.mean + displacement
        parts.append(layer.right.curvature(b @ b.mT))
    matrix, noise = _total([x for x, _ in parts], shared, 2), _total([x for _, x in parts], shared, 1)
    least = torch.maximum(noise, _SINGULAR * matrix.diagonal(dim1=-2, dim2=-1))
    root, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any() or (root.diagonal(dim1=-2, dim2=-1).square() <= least).any():
        inverse: Tensor = torch.linalg.pinv(matrix, atol=least.amax(-1), hermitian=True)
        return inverse
    return torch.cholesky_inverse(root)


def _lengths(layers: Sequence[Layer], rights: Sequence[Tensor], shared: bool) -> Tensor:
    """The norm of the combined a, given its displacement."""
    squares = [
        (layer.right.mean + displacement).square().sum((-2, -1)) for layer, displacement in zip(layers, rights, strict=True)
    ]
    return _total(squares, shared, 0).sqrt()


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _total(per_layer: Sequence[Tensor], shared: bool, own_axes: int) -> Tensor:
    if shared:
        per_layer = [x.flatten(0, -1 - own_axes).sum(0) if x.ndim > own_axes else x for x in per_layer]
    return torch.stack(list(per_layer)).sum(0)


def _start(layers: Sequence[Layer], shared: bool) -> Tensor:
    return layers[0].weights.expand(*(() if shared else layers[0].left.mean.shape[:-2]), -1)


def _side(factors: Sequence[Tensor], origin: Tensor, weights: Tensor) -> Side:
    first = factors[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    deviations = torch.empty(*first.shape[:-2], len(factors), *first.shape[-2:], dtype=dtype, device=first.device)
    for i, factor in enumerate(factors):
        deviations[..., i, :, :] = factor
    mean = torch.zeros_like(first, dtype=WORKING)
    for _ in range(2):  # the first mean has only the precision of the terms, which is insufficient if they are close
        part = torch.matmul(weights.to(dtype), deviations.flatten(-2)).reshape(mean.shape)
        deviations -= part[..., None, :, :]
        mean += part
    return Side(mean, origin.to(WORKING) - mean, deviations)
