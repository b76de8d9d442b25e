"""Weighted mean of low-rank updates, module by module, one term at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.linalg.combine import leading, norm, pad, stack
from fedlora.linalg.fit import Split
from fedlora.linalg.lowrank import LowRank, beside_identity
from fedlora.linalg.running_sum import RunningSum
from fedlora.linalg.weighted_terms import dense

Updates = Mapping[str, LowRank]
"""Module name -> factors of an update, of a summand of it, or of a base update."""


def alike(adapter: Updates) -> tuple[tuple[str, ...], ...]:
    """The modules' names grouped by shape, so that one call of linear algebra can process a group as a batch."""
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name, part in adapter.items():
        groups.setdefault((part.b.shape[-2], part.a.shape[-1], part.rank), []).append(name)
    return tuple(tuple(names) for names in groups.values())


def batch(adapter: Updates, names: Sequence[str], rank: int = 0) -> LowRank:
    """The named modules as b [module, out, rank] and a [module, rank, in], zero-padded to the largest rank or to `rank`."""
    rank = max(rank, *(adapter[name].rank for name in names))
    padded = [pad(adapter[name], rank) if adapter[name].rank < rank else adapter[name] for name in names]
    return LowRank(b=torch.stack([part.b for part in padded]), a=torch.stack([part.a for part in padded]))


def unbatch(factor: LowRank, names: Sequence[str], dtype: torch.dtype) -> dict[str, LowRank]:
    """The inverse of `batch`, in `dtype`."""
    return {name: LowRank(b=factor.b[i].to(dtype), a=factor.a[i].to(dtype)) for i, name in enumerate(names)}


@dataclass(frozen=True)
class MeanUpdate:
    """M = sum_k w_k b_k a_k / sum_k w_k for each module, accumulated one term at a time; ranks may differ.

    Stored as factors while those are smaller than the matrices, then as matrices: memory does not grow with the terms. In
    at least fp32. `sums` has one batch for each of `groups`: modules of equal shape, and of equal rank in each update so
    far, so that no padding is needed.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    sums: tuple[RunningSum, ...] = ()
    weight: float = 0.0

    @staticmethod
    def of(mean: Mapping[str, Tensor]) -> "MeanUpdate":
        """The mean update with the given matrices [out, in]."""
        groups: dict[torch.Size, list[str]] = {}
        for name, matrix in mean.items():
            groups.setdefault(matrix.shape, []).append(name)
        wide = [torch.stack([mean[name] for name in names]) for names in groups.values()]
        sums = tuple(RunningSum(matrix=x.to(torch.promote_types(x.dtype, torch.float32))) for x in wide)
        return MeanUpdate(tuple(map(tuple, groups.values())), sums, 1.0)

    def add(self, weight: float, update: Updates) -> "MeanUpdate":
        """The mean update with one more term."""
        known = list(zip(self.groups, self.sums, strict=True)) or [(tuple(update), RunningSum())]
        groups, grown = list[tuple[str, ...]](), list[RunningSum]()
        for names, total in known:
            for some in alike({name: update[name] for name in names}):
                own = total if len(some) == len(names) else total.select([names.index(name) for name in some])
                groups.append(some)
                grown.append(own.add(weight, batch(update, some)))
        return MeanUpdate(tuple(groups), tuple(grown), self.weight + weight)

    def times(self, factor: float) -> "MeanUpdate":
        """The same M, with the weight of all terms so far multiplied by `factor`."""
        return MeanUpdate(self.groups, tuple(total.times(factor) for total in self.sums), factor * self.weight)

    def subtract(self, part: Updates) -> "MeanUpdate":
        """M minus a part of it."""
        return replace(self.add(-self.weight, part), weight=self.weight) if part else self

    def best_fit(self, template: Updates, split: Split = "left", seed: int = 0) -> dict[str, LowRank]:
        """The matrices nearest to M with the ranks and the dtype of `template`; see `linalg.fit.best_fit`.

        Raises:
            ValueError: no term has a positive weight.
        """
        self._check()
        found: dict[str, LowRank] = {}
        for names, total in zip(self.groups, self.sums, strict=True):
            fitted = total.best_fit(max(template[name].rank for name in names), 1 / self.weight, split, seed)
            found |= unbatch(fitted, names, template[names[0]].b.dtype)
        return {name: leading(found[name], part.rank) for name, part in template.items()}

    def factors(self, ranks: Mapping[str, int] | None = None) -> dict[str, LowRank]:
        """M as a base update: the terms' concatenated factors, or the best fit of `ranks`, exact if M has no more.

        If the matrix is smaller than such factors, the factors are the matrix and an identity.

        Raises:
            ValueError: no term has a positive weight.
        """
        self._check()
        found: dict[str, LowRank] = {}
        for names, total in zip(self.groups, self.sums, strict=True):
            out, in_ = _shape(total)
            rank = max(ranks[name] for name in names) if ranks is not None else None
            if rank is not None and rank * (out + in_) < out * in_:
                base_update = total.best_fit(rank, 1 / self.weight)
            elif rank is None and total.matrix is None:
                base_update = stack([(1 / self.weight, factor) for factor in total.factors])
            else:
                base_update = beside_identity(_dense(total) / self.weight)
            found |= unbatch(base_update, names, base_update.b.dtype)
        return found

    def error(self, *parts: Updates) -> float:
        """The Frobenius distance of the sum of `parts` from M over all modules, divided by the norm of M; 0 if M is zero.

        Accurate to the precision of fp32, or of fp64 for fp64 factors.
        """
        rest = self
        for part in parts:
            rest = rest.subtract(part)
        size = self._norm()
        return rest._norm() / size if size > 0 else 0.0

    def _norm(self) -> float:
        each = [size for total in self.sums for size in _norm(total).tolist()]
        return math.hypot(*each) / self.weight if self.weight > 0 else 0.0

    def _check(self) -> None:
        if not self.weight > 0:
            raise ValueError("cannot merge: no reply has a positive weight")


def _norm(total: RunningSum) -> Tensor:
    """Norms [module]."""
    if total.matrix is None:
        return norm(stack([(1.0, factor) for factor in total.factors]))
    return _dense(total).square().sum((-2, -1)).sqrt()


def _dense(total: RunningSum) -> Tensor:
    """Dense matrices [module, out, in]."""
    if total.matrix is None:
        return dense([(1.0, factor) for factor in total.factors], total.factors[0].b.dtype)
    if not total.factors:
        return total.matrix
    return total.matrix + dense([(1.0, factor) for factor in total.factors], total.matrix.dtype)


def _shape(total: RunningSum) -> tuple[int, int]:
    if total.matrix is not None:
        return total.matrix.shape[-2], total.matrix.shape[-1]
    return total.factors[0].b.shape[-2], total.factors[0].a.shape[-1]
