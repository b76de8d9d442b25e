"""Two lists of coefficients, so that (sum_i p_i b_i)(sum_i q_i a_i) comes near a sum of products of single terms.

The objective is quadratic in p for fixed q and the other way round. For a given p, all that the least-squares problem for
q needs is the combined b: its product with itself, and with the target. The target is formed once where the ranks of the
terms add up to its width, and stays in factors where they do not. Beside this a step takes in * rank multiplications for
each pair of terms. The Gram blocks b_u^T b_v of all pairs, after which no step depends on the width, would take as much as
`rank` steps, more than are mostly needed, and for many terms more memory than the terms.
Source: Nguyen et al. 2025, arXiv:2509.26399.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.combine import norm
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.terms import WORKING, Terms, dense, shared_rank, sizes

_FACTORS = 1 << 21  # numbers stacked at once: 16 MB; larger batches gain nothing on a CPU
_SINGULAR = 1e-12  # relative: directions of the coefficients that do not matter to the objective, kept as they are


@dataclass(frozen=True)
class Layer:
    """One matrix to imitate: sum_uv target[u, v] b_u a_v, its factors in fp64, and where to start.

    `whole` is that matrix, if it is smaller than its factors; it is as exact as the terms' own dtype. `pinned` says that
    term 0 keeps the coefficient 1.
    """

    left: Float[Tensor, "*batch m rank out"]
    right: Float[Tensor, "*batch m rank in"]
    target: Float[Tensor, "m m"]
    whole: Float[Tensor, "*batch out in"] | None
    start: Float[Tensor, " m"]
    pinned: bool

    def size(self) -> Float[Tensor, "*batch"]:
        """The squared norm of the target."""
        if self.whole is not None:
            return self.whole.square().sum((-2, -1))
        share = self.target.T @ self.left.flatten(-2)  # [*batch, m, rank * out]
        b, a = share.reshape(self.left.shape).flatten(-3, -2).mT, self.right.flatten(-3, -2)
        return norm(LowRank(b=b, a=a)).square()


@dataclass(frozen=True)
class Coefficients:
    """Weights of the b (p) and of the a (q), in fp64."""

    p: Float[Tensor, "*batch m"]
    q: Float[Tensor, "*batch m"]


def at_once(terms: int, rank: int, width: int) -> int:
    """For how many matrices to make one layer, each of so many terms of that rank; `width` is out + in."""
    return max(1, _FACTORS // (terms * rank * width))


def linear(terms: Terms) -> Layer:
    """For coefficients of the factors themselves; they start at the weights, that is at the mean factors.

    Raises:
        ValueError: the ranks differ.
    """
    share = _shares(terms)
    return _layer(terms, [factor for _, factor in terms], share.diag(), share, pinned=False)


def affine(terms: Terms, origin: LowRank) -> Layer:
    """For coefficients of the factors' deviations from `origin`, which itself is term 0 with coefficient 1."""
    share = _shares(terms)
    one = share.new_ones(1)
    target = torch.cat([torch.cat([one, share])[None], torch.cat([share[:, None], share.diag()], 1)])
    moved = [LowRank(b=f.b.to(WORKING) - origin.b.to(WORKING), a=f.a.to(WORKING) - origin.a.to(WORKING)) for _, f in terms]
    first = LowRank(b=origin.b.to(WORKING), a=origin.a.to(WORKING))
    return _layer(terms, [first, *moved], target, torch.cat([one, share]), pinned=True)


def alternate(layers: Sequence[Layer], shared: bool = False, sweeps: int = 50) -> Coefficients:
    """Exact least squares for q, then for p, until a step would gain no millionth of the objective, or `sweeps` are done.

    What it would gain is told by the objective's slope, and by its curvature at the step before. A gain below 1e-12 of the
    targets' squared norms ends it too, as the objective may be zero but for rounding.
    One pair of coefficients for all `layers` together; each element of the batch has its own, unless `shared`. The
    objective never increases. Where the coefficients are not unique, they stay as near the start as each step allows. Waits
    for the device once a sweep.
    """
    p = q = _start(layers, shared)
    mirrored = [_swapped(layer) for layer in layers]
    size = float(_total([layer.size() for layer in layers], shared, 0).sum())
    inverse: Tensor | None = None
    for _ in range(sweeps):
        slope, explained = _slope(layers, p, q, shared)
        if inverse is not None:
            gain, now = float((slope * _times(inverse, slope)).sum()), float(explained.sum())
            if gain <= max(1e-6 * (size - now), 1e-12 * now):
                break
        inverse = _inverse(layers, p, shared)
        q = q + _times(inverse, slope)
        p = p + _times(_inverse(mirrored, q, shared), _slope(mirrored, q, p, shared)[0])
    return Coefficients(p=p, q=q) if layers[0].pinned else _same_ratio(layers, Coefficients(p=p, q=q), shared)


def descend(layers: Sequence[Layer], shared: bool = False, steps: int = 200, rate: float = 1e-2) -> Coefficients:
    """The published solver: AdamW on multiples of the weights that start at 1, cosine rate down to 1e-4, best iterate."""
    start = _start(layers, shared)
    moving = [torch.ones_like(start).requires_grad_() for _ in "pq"]
    optimiser = torch.optim.AdamW(moving, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    best = Coefficients(p=start, q=start)
    size = _total([layer.size() for layer in layers], shared, 0)
    least = torch.full_like(size, float("inf"))
    for _ in range(steps + 1):
        now = Coefficients(*(_pin(layers, start * x) for x in moving))
        loss = size - _slope(layers, now.p, now.q, shared)[1]
        better = (loss < least)[..., None]
        least = torch.minimum(least, loss).detach()
        best = Coefficients(p=torch.where(better, now.p, best.p).detach(), q=torch.where(better, now.q, best.q).detach())
        optimiser.zero_grad()
        torch.autograd.backward((loss / size.clamp_min(torch.finfo(WORKING).tiny)).sum())
        optimiser.step()
        schedule.step()
    return best


def objective(layers: Sequence[Layer], at: Coefficients, shared: bool = False) -> Float[Tensor, "*batch"]:
    """The squared Frobenius distance from the targets, summed over the layers (and over the batch if `shared`)."""
    return _total([layer.size() for layer in layers], shared, 0) - _slope(layers, at.p, at.q, shared)[1]


def combined(layer: Layer, at: Coefficients) -> LowRank:
    """The factors (sum_i p_i b_i, sum_i q_i a_i), in fp64."""
    return LowRank(b=_combination(layer.left, at.p).mT.contiguous(), a=_combination(layer.right, at.q))


def _slope(layers: Sequence[Layer], p: Tensor, q: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Minus half the objective's gradient by q, zero where q is pinned, and how much of the targets p and q explain."""
    slopes, parts = [], []
    for layer in layers:
        b, a = _combination(layer.left, p), _combination(layer.right, q)
        wanted, given = _through_target(layer, b), (b @ b.mT) @ a
        slopes.append((layer.right.flatten(-2) @ (wanted - given).flatten(-2)[..., None])[..., 0])
        parts.append((a * (2 * wanted - given)).sum((-2, -1)))
    slope = _total(slopes, shared, 1)
    if layers[0].pinned:
        slope = torch.cat([torch.zeros_like(slope[..., :1]), slope[..., 1:]], -1)
    return slope, _total(parts, shared, 0)


def _inverse(layers: Sequence[Layer], p: Tensor, shared: bool) -> Tensor:
    """Of half the objective's second derivative by q, [*batch, m, m]; zero where q is pinned or does not matter."""
    matrices = []
    for layer in layers:
        b, flat = _combination(layer.left, p), layer.right.flatten(-2)
        matrices.append(((b @ b.mT)[..., None, :, :] @ layer.right).flatten(-2) @ flat.mT)
    matrix, pinned = _total(matrices, shared, 2), int(layers[0].pinned)
    inverse = torch.linalg.pinv(matrix[..., pinned:, pinned:], rtol=_SINGULAR, hermitian=True)
    return torch.nn.functional.pad(inverse, (pinned, 0, pinned, 0))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _through_target(layer: Layer, b: Tensor) -> Tensor:
    """The combined b^T, [*batch, rank, out], times the target."""
    if layer.whole is not None:
        return b @ layer.whole
    m, rank = layer.left.shape[-3:-1]
    each = (b @ layer.left.flatten(-3, -2).mT).reshape(*b.shape[:-1], m, rank)  # b^T b_u, [*batch, rank, m, rank]
    share = torch.einsum("uv,...iuj->...ivj", layer.target, each).flatten(-2)  # [*batch, rank, m * rank]
    return share @ layer.right.flatten(-3, -2)


def _combination(factors: Tensor, coefficients: Tensor) -> Tensor:
    """[*batch, rank, n] from [*batch, m, rank, n]."""
    return torch.matmul(coefficients[..., None, :], factors.flatten(-2)).reshape(*factors.shape[:-3], *factors.shape[-2:])


def _total(per_layer: Sequence[Tensor], shared: bool, own_axes: int) -> Tensor:
    if shared:
        per_layer = [x.flatten(0, -1 - own_axes).sum(0) if x.ndim > own_axes else x for x in per_layer]
    return torch.stack(list(per_layer)).sum(0)


def _layer(terms: Terms, factors: Sequence[LowRank], target: Tensor, start: Tensor, pinned: bool) -> Layer:
    out, in_, ranks = sizes(terms)
    whole = None
    if ranks >= min(out, in_):
        total = sum(weight for weight, _ in terms)
        shares = [(weight / total, factor) for weight, factor in terms]
        whole = dense(shares, torch.promote_types(terms[0][1].b.dtype, torch.float32)).to(WORKING)
    left = _stacked([f.b.mT for f in factors])
    return Layer(left, _stacked([f.a for f in factors]), target, whole, start, pinned)


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """[*batch, m, rank, n] from m times [*batch, rank, n], in fp64."""
    first = factors[0]
    stack = torch.empty(*first.shape[:-2], len(factors), *first.shape[-2:], dtype=WORKING, device=first.device)
    for i, factor in enumerate(factors):
        stack[..., i, :, :] = factor
    return stack


def _swapped(layer: Layer) -> Layer:
    """The transposed problem, in which p and q change places."""
    whole = None if layer.whole is None else layer.whole.mT
    return replace(layer, left=layer.right, right=layer.left, target=layer.target.mT, whole=whole)


def _start(layers: Sequence[Layer], shared: bool) -> Tensor:
    return layers[0].start.expand(*(() if shared else layers[0].left.shape[:-3]), -1)


def _pin(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), x[..., 1:]], -1) if layers[0].pinned else x


def _same_ratio(layers: Sequence[Layer], found: Coefficients, shared: bool) -> Coefficients:
    """(c p, q / c) is as good for every c: the one whose factors' norms are in the ratio of those of the mean factors."""

    def ratio(p: Tensor, q: Tensor) -> Tensor:
        b = _total([_combination(layer.left, p).square().sum((-2, -1)) for layer in layers], shared, 0)
        a = _total([_combination(layer.right, q).square().sum((-2, -1)) for layer in layers], shared, 0)
        return torch.where((a > 0) & (b > 0), b / a.where(a > 0, 1), 1).sqrt()

    start = _start(layers, shared)
    c = (ratio(start, start) / ratio(found.p, found.q)).sqrt()[..., None]
    return Coefficients(p=found.p * c, q=found.q / c)


def _shares(terms: Terms) -> Tensor:
    shared_rank(terms)
    weights = torch.tensor([weight for weight, _ in terms], dtype=WORKING, device=terms[0][1].b.device)
    return weights / weights.sum()
