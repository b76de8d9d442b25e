"""Two lists of coefficients, so that (sum_i p_i b_i)(sum_i q_i a_i) comes near a sum of products of single terms.

The objective is quadratic in p for fixed q and the other way round. For a given p, all that the least-squares problem for q
needs are the rank x rank products of the combined b with each b_i: a step takes (out + in) rank^2 multiplications a term
and in * rank a pair of terms. The Gram blocks b_u^T b_v of all pairs, after which no step depends on the width, would take
as much as `rank` steps, more than are mostly needed, and for many terms more memory than the terms.
Source: Nguyen et al. 2025, arXiv:2509.26399.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.combine import norm
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.terms import WORKING, Terms, shared_rank

_SINGULAR = 1e-12  # relative: directions of the coefficients that do not matter to the objective, kept as they are


@dataclass(frozen=True)
class Layer:
    """One matrix to imitate: sum_uv target[u, v] b_u a_v, its factors in fp64, and where to start.

    `pinned` says that term 0 keeps the coefficient 1.
    """

    left: Float[Tensor, "*batch m rank out"]
    right: Float[Tensor, "*batch m rank in"]
    target: Float[Tensor, "m m"]
    start: Float[Tensor, " m"]
    pinned: bool

    def size(self) -> Float[Tensor, "*batch"]:
        """The squared norm of the target."""
        share = self.target.T @ self.left.flatten(-2)  # [*batch, m, rank * out]
        b, a = share.reshape(self.left.shape).flatten(-3, -2).mT, self.right.flatten(-3, -2)
        return norm(LowRank(b=b, a=a)).square()


@dataclass(frozen=True)
class Coefficients:
    """Weights of the b (p) and of the a (q), in fp64."""

    p: Float[Tensor, "*batch m"]
    q: Float[Tensor, "*batch m"]


def linear(terms: Terms) -> Layer:
    """For coefficients of the factors themselves; they start at the weights, that is at the mean factors.

    Raises:
        ValueError: the ranks differ.
    """
    share = _shares(terms)
    return _layer([factor for _, factor in terms], share.diag(), share, pinned=False)


def affine(terms: Terms, origin: LowRank) -> Layer:
    """For coefficients of the factors' deviations from `origin`, which itself is term 0 with coefficient 1."""
    share = _shares(terms)
    one = share.new_ones(1)
    target = torch.cat([torch.cat([one, share])[None], torch.cat([share[:, None], share.diag()], 1)])
    moved = [LowRank(b=f.b.to(WORKING) - origin.b.to(WORKING), a=f.a.to(WORKING) - origin.a.to(WORKING)) for _, f in terms]
    first = LowRank(b=origin.b.to(WORKING), a=origin.a.to(WORKING))
    return _layer([first, *moved], target, torch.cat([one, share]), pinned=True)


def alternate(layers: Sequence[Layer], shared: bool = False, sweeps: int = 50) -> Coefficients:
    """Exact least squares for q, then for p, until a sweep gains no millionth of the objective, or `sweeps` are done.

    A gain below 1e-12 of the targets' squared norms ends it too, as the objective may be zero but for rounding.
    One pair of coefficients for all `layers` together; each element of the batch has its own, unless `shared`. The
    objective never increases. Where the coefficients are not unique, they stay as near the start as each step allows. Waits
    for the device once a sweep.
    """
    p = q = _start(layers, shared)
    mirrored = [_swapped(layer) for layer in layers]
    size, before = float(_total([layer.size() for layer in layers], shared, 0).sum()), float("-inf")
    for _ in range(sweeps):
        q, _ = _half_step(layers, p, q, shared)
        p, explained = _half_step(mirrored, q, p, shared)
        now = float(explained.sum())
        if now - before <= max(1e-6 * (size - now), 1e-12 * now):
            break
        before = now
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
        loss = size - _explained(layers, now, shared)
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
    return _total([layer.size() for layer in layers], shared, 0) - _explained(layers, at, shared)


def combined(terms: Terms, at: Coefficients, origin: LowRank | None = None) -> LowRank:
    """The factors (sum_i p_i b_i, sum_i q_i a_i), in the dtype of the terms; with `origin`, those of `affine`."""
    factors = [factor for _, factor in terms]
    dtype = factors[0].b.dtype
    b, a = (torch.stack([getattr(f, side).to(WORKING) for f in factors]) for side in "ba")
    p, q = (x.movedim(-1, 0)[..., None, None] for x in (at.p, at.q))
    if origin is not None:
        b = torch.cat([origin.b.to(WORKING)[None], b - origin.b.to(WORKING)])
        a = torch.cat([origin.a.to(WORKING)[None], a - origin.a.to(WORKING)])
    return LowRank(b=(p * b).sum(0).to(dtype), a=(q * a).sum(0).to(dtype))


def _half_step(layers: Sequence[Layer], p: Tensor, q: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """The q nearest to the given one among the minimisers for this p, and how much of the targets it explains."""
    matrices, vectors = [], []
    for layer in layers:
        gram, wanted = _seen_through(layer, p)
        flat = layer.right.flatten(-2)
        matrices.append((gram[..., None, :, :] @ layer.right).flatten(-2) @ flat.mT)
        vectors.append((flat @ wanted.flatten(-2)[..., None])[..., 0])
    matrix, vector = _total(matrices, shared, 2), _total(vectors, shared, 1)
    free = slice(1, None) if layers[0].pinned else slice(None)
    gradient = vector - (matrix @ q[..., None])[..., 0]
    inverse = torch.linalg.pinv(matrix[..., free, free], rtol=_SINGULAR, hermitian=True)
    step = (inverse @ gradient[..., free, None])[..., 0]
    q = torch.cat([q[..., :1], q[..., 1:] + step], -1) if layers[0].pinned else q + step
    return q, (q * (2 * vector - (matrix @ q[..., None])[..., 0])).sum(-1)


def _explained(layers: Sequence[Layer], at: Coefficients, shared: bool) -> Tensor:
    """The squared norm of the targets minus the objective."""
    parts = []
    for layer in layers:
        gram, wanted = _seen_through(layer, at.p)
        a = _combination(layer.right, at.q)
        parts.append((a * (2 * wanted - gram @ a)).sum((-2, -1)))
    return _total(parts, shared, 0)


def _seen_through(layer: Layer, p: Tensor) -> tuple[Tensor, Tensor]:
    """With b the combination of the left factors: b^T b [*batch, rank, rank] and b^T target [*batch, rank, in]."""
    m, rank = layer.left.shape[-3:-1]
    b = _combination(layer.left, p)  # its transpose, [*batch, rank, out]
    each = (b @ layer.left.flatten(-3, -2).mT).reshape(*b.shape[:-1], m, rank)  # b^T b_u, [*batch, rank, m, rank]
    gram = (each * p[..., None, :, None]).sum(-2)
    share = torch.einsum("uv,...iuj->...ivj", layer.target, each).flatten(-2)  # [*batch, rank, m * rank]
    return gram, share @ layer.right.flatten(-3, -2)


def _combination(factors: Tensor, coefficients: Tensor) -> Tensor:
    """[*batch, rank, n] from [*batch, m, rank, n]."""
    return torch.matmul(coefficients[..., None, :], factors.flatten(-2)).reshape(*factors.shape[:-3], *factors.shape[-2:])


def _total(per_layer: Sequence[Tensor], shared: bool, own_axes: int) -> Tensor:
    if shared:
        per_layer = [x.flatten(0, -1 - own_axes).sum(0) if x.ndim > own_axes else x for x in per_layer]
    return torch.stack(list(per_layer)).sum(0)


def _layer(factors: Sequence[LowRank], target: Tensor, start: Tensor, pinned: bool) -> Layer:
    left = torch.stack([f.b.mT.to(WORKING) for f in factors], -3)
    right = torch.stack([f.a.to(WORKING) for f in factors], -3)
    return Layer(left=left, right=right, target=target, start=start, pinned=pinned)


def _swapped(layer: Layer) -> Layer:
    """The transposed problem, in which p and q change places."""
    return replace(layer, left=layer.right, right=layer.left, target=layer.target.mT)


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
