"""Two lists of coefficients, so that (sum_i p_i b_i)(sum_i q_i a_i) comes near a sum of products of single terms.

The objective is quadratic in p for fixed q and the other way round. It is evaluated on the Gram blocks b_u^T b_v and
a_u a_v^T, computed once: after that no step depends on the width of the matrices. For m terms they take 2 (m rank)^2 fp64
numbers per matrix: with many terms, give a batch one matrix at a time.
Source: Nguyen et al. 2025, arXiv:2509.26399.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.terms import WORKING, Terms, shared_rank

_SINGULAR = 1e-12  # relative: directions of the coefficients that do not matter to the objective, kept as they are


@dataclass(frozen=True)
class Blocks:
    """One matrix to imitate: sum_uv target[u, v] b_u a_v, the Gram blocks of its factors, the squared norm
    of the target, and where to start.

    `pinned` says that block 0 keeps the coefficient 1.
    """

    left: Float[Tensor, "*batch m m rank rank"]
    right: Float[Tensor, "*batch m m rank rank"]
    target: Float[Tensor, "m m"]
    size: Float[Tensor, "*batch"]
    start: Float[Tensor, " m"]
    pinned: bool


@dataclass(frozen=True)
class Coefficients:
    """Weights of the b (p) and of the a (q), in fp64."""

    p: Float[Tensor, "*batch m"]
    q: Float[Tensor, "*batch m"]


def linear(terms: Terms) -> Blocks:
    """Blocks for coefficients of the factors themselves; they start at the weights, that is at the mean factors.

    Raises:
        ValueError: the ranks differ.
    """
    share = _shares(terms)
    return _blocks([factor for _, factor in terms], share.diag(), share, pinned=False)


def affine(terms: Terms, origin: LowRank) -> Blocks:
    """Blocks for coefficients of the factors' deviations from `origin`, which itself is block 0 with coefficient 1."""
    share = _shares(terms)
    one = share.new_ones(1)
    target = torch.cat([torch.cat([one, share])[None], torch.cat([share[:, None], share.diag()], 1)])
    moved = [LowRank(b=f.b.to(WORKING) - origin.b.to(WORKING), a=f.a.to(WORKING) - origin.a.to(WORKING)) for _, f in terms]
    first = LowRank(b=origin.b.to(WORKING), a=origin.a.to(WORKING))
    return _blocks([first, *moved], target, torch.cat([one, share]), pinned=True)


def alternate(layers: Sequence[Blocks], shared: bool = False, sweeps: int = 50) -> Coefficients:
    """Exact least squares for q, then for p, until a sweep gains less than 1e-9 of the objective or `sweeps` are done.

    One pair of coefficients for all `layers` together; each element of the batch has its own, unless `shared`. The
    objective never increases. Where the coefficients are not unique, they stay as near the start as each step allows. Waits
    for the device once a sweep.
    """
    p = q = _start(layers, shared)
    before = float("inf")
    for _ in range(sweeps):
        q = _half_step(layers, p, q, shared)
        p = _half_step([_swapped(layer) for layer in layers], q, p, shared)
        now = float(objective(layers, Coefficients(p=p, q=q), shared).sum())
        if before - now <= 1e-9 * now or now <= 0:
            break
        before = now
    return Coefficients(p=p, q=q) if layers[0].pinned else _same_ratio(layers, Coefficients(p=p, q=q), shared)


def descend(layers: Sequence[Blocks], shared: bool = False, steps: int = 200, rate: float = 1e-2) -> Coefficients:
    """The published solver: AdamW on multiples of the weights that start at 1, cosine rate down to 1e-4, best iterate."""
    start = _start(layers, shared)
    moving = [torch.ones_like(start).requires_grad_() for _ in "pq"]
    optimiser = torch.optim.AdamW(moving, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    best = Coefficients(p=start, q=start)
    size = _total([x.size for x in layers], shared, 0)
    least = torch.full_like(size, float("inf"))
    for _ in range(steps + 1):
        now = Coefficients(*(_pin(layers, start * x) for x in moving))
        loss = objective(layers, now, shared)
        better = (loss < least)[..., None]
        least = torch.minimum(least, loss).detach()
        best = Coefficients(p=torch.where(better, now.p, best.p).detach(), q=torch.where(better, now.q, best.q).detach())
        optimiser.zero_grad()
        torch.autograd.backward((loss / size.clamp_min(torch.finfo(WORKING).tiny)).sum())
        optimiser.step()
        schedule.step()
    return best


def objective(layers: Sequence[Blocks], at: Coefficients, shared: bool = False) -> Float[Tensor, "*batch"]:
    """The squared Frobenius distance from the targets, summed over the layers (and over the batch if `shared`)."""
    matrix, vector = _normal_equations(layers, at.p, shared)
    return (at.q * ((matrix @ at.q[..., None])[..., 0] - 2 * vector)).sum(-1) + _total([x.size for x in layers], shared, 0)


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


def _half_step(layers: Sequence[Blocks], p: Tensor, q: Tensor, shared: bool) -> Tensor:
    """The q nearest to the given one among the minimisers for this p."""
    matrix, vector = _normal_equations(layers, p, shared)
    free = slice(1, None) if layers[0].pinned else slice(None)
    gradient = vector - (matrix @ q[..., None])[..., 0]
    inverse = torch.linalg.pinv(matrix[..., free, free], rtol=_SINGULAR, hermitian=True)
    step = (inverse @ gradient[..., free, None])[..., 0]
    return torch.cat([q[..., :1], q[..., 1:] + step], -1) if layers[0].pinned else q + step


def _normal_equations(layers: Sequence[Blocks], p: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """The matrix [*batch, m, m] and the vector [*batch, m] of the least-squares problem for q."""
    matrices, vectors = [], []
    for layer in layers:
        m, square = layer.left.shape[-3], layer.left.shape[-1] ** 2
        mixed = (p[..., None, :] @ layer.left.flatten(-3)).reshape(*layer.left.shape[:-4], m, square)  # b_hat^T b_u
        gram = p[..., None, :] @ mixed  # b_hat^T b_hat
        matrices.append((layer.right.flatten(-2) @ gram[..., None, :, :].mT)[..., 0])
        wanted = layer.target.mT @ mixed
        vectors.append((layer.right.flatten(-3) @ wanted.flatten(-2)[..., None])[..., 0])
    return _total(matrices, shared, 2), _total(vectors, shared, 1)


def _total(per_layer: Sequence[Tensor], shared: bool, own_axes: int) -> Tensor:
    if shared:
        per_layer = [x.flatten(0, -1 - own_axes).sum(0) if x.ndim > own_axes else x for x in per_layer]
    return torch.stack(list(per_layer)).sum(0)


def _blocks(factors: Sequence[LowRank], target: Tensor, start: Tensor, pinned: bool) -> Blocks:
    b = torch.stack([f.b.to(WORKING) for f in factors], -2)  # [*batch, out, m, rank]
    a = torch.stack([f.a.to(WORKING).mT for f in factors], -2)  # [*batch, in, m, rank]
    left, right = (_grams(x) for x in (b, a))
    imitated = target @ (target @ right.flatten(-3)).reshape(right.shape).flatten(-2)  # [*batch, m, m, rank rank]
    size = (left.flatten(-2) * imitated).sum((-3, -2, -1))
    return Blocks(left=left, right=right, target=target, size=size, start=start, pinned=pinned)


def _grams(x: Tensor) -> Tensor:
    """[*batch, m, m, rank, rank] from [*batch, n, m, rank]."""
    m, rank = x.shape[-2:]
    flat = x.flatten(-2)
    grams = torch.matmul(flat.mT, flat).reshape(*x.shape[:-3], m, rank, m, rank)
    return grams.movedim(-3, -2).contiguous()  # every contraction is then one pass over memory


def _swapped(layer: Blocks) -> Blocks:
    """The transposed problem, in which p and q change places."""
    return replace(layer, left=layer.right, right=layer.left, target=layer.target.mT)


def _start(layers: Sequence[Blocks], shared: bool) -> Tensor:
    return layers[0].start.expand(*(() if shared else layers[0].size.shape), -1)


def _pin(layers: Sequence[Blocks], x: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), x[..., 1:]], -1) if layers[0].pinned else x


def _same_ratio(layers: Sequence[Blocks], found: Coefficients, shared: bool) -> Coefficients:
    """(c p, q / c) is as good for every c: the one whose factors' norms are in the ratio of those of the mean factors."""

    def ratio(p: Tensor, q: Tensor) -> Tensor:
        b = _total([torch.einsum("...u,...v,...uvii->...", p, p, layer.left) for layer in layers], shared, 0)
        a = _total([torch.einsum("...u,...v,...uvii->...", q, q, layer.right) for layer in layers], shared, 0)
        return torch.where((a > 0) & (b > 0), b / a.where(a > 0, 1), 1).sqrt()

    start = _start(layers, shared)
    c = (ratio(start, start) / ratio(found.p, found.q)).sqrt()[..., None]
    return Coefficients(p=found.p * c, q=found.q / c)


def _shares(terms: Terms) -> Tensor:
    shared_rank(terms)
    weights = torch.tensor([weight for weight, _ in terms], dtype=WORKING, device=terms[0][1].b.device)
    return weights / weights.sum()
