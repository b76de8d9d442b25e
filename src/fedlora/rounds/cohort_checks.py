"""Comparison of each upload with the others of its round: large ones are scaled down or rejected, weights are bounded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Upload

CLIP_ABOVE = 3.0
"""An upload whose change is larger than this multiple of the cohort's median is scaled down to it."""
REJECT_ABOVE = 30.0
"""An upload whose change is larger than this multiple of the cohort's median is rejected."""
MAX_SHARE = 2.0
"""A weight above this multiple of the cohort's median weight is reduced to it."""
_SMALLEST_COHORT = 3  # with fewer, a median says nothing about who is wrong


@dataclass(frozen=True)
class Size:
    """The size of one upload: its weight, the Frobenius norm of its difference from the template, and the spectral norm of
    the change of the weights that it stands for (the largest over modules; None if it stands for none)."""

    client: str
    weight: float
    norm: float
    spectral: float | None


@dataclass(frozen=True)
class CohortCheck:
    """Results for a cohort's uploads: final weights, factors in (0, 1) of clipped differences, reasons for rejection."""

    weights: Mapping[str, float]
    clipped: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)


def check_cohort(sizes: Sequence[Size]) -> CohortCheck:
    """Compares the uploads of a cohort that is complete. Fewer than three uploads are accepted as they are."""
    if len(sizes) < _SMALLEST_COHORT:
        return CohortCheck({one.client: one.weight for one in sizes})
    norms = {one.client: one.norm for one in sizes}
    spectral = {one.client: one.spectral for one in sizes if one.spectral is not None}
    factors: dict[str, float] = {}
    rejected: dict[str, str] = {}
    for kind, values in (("norm", norms), ("spectral norm", spectral)):
        middle = median(values.values()) if values else 0.0
        for client, value in values.items():
            if middle > 0 and value > REJECT_ABOVE * middle:
                found = f"its change has the {kind} {value:.4g}"
                rejected.setdefault(client, f"{found}, more than {REJECT_ABOVE:g} times the round's median {middle:.4g}")
            elif middle > 0 and value > CLIP_ABOVE * middle:
                factors[client] = min(factors.get(client, 1.0), CLIP_ABOVE * middle / value)
    bound = MAX_SHARE * median(one.weight for one in sizes)
    accepted = [one for one in sizes if one.client not in rejected]
    return CohortCheck(
        {one.client: min(one.weight, bound) for one in accepted},
        {client: factor for client, factor in factors.items() if client not in rejected},
        rejected,
    )


def difference_norm(upload: Upload, template: Upload) -> float:
    """Frobenius norm, over all values, of the upload minus the template.

    Values whose shape depends on choices are changes: their template is zero.
    """
    total = 0.0
    for name, x in upload.values.items():
        before = template.values[name]
        change = x - before if before.shape == x.shape else x
        total += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
    return math.sqrt(total)


def spectral_norm(update: Mapping[str, LowRank]) -> float:
    """The largest singular value of any module's matrix, from thin QR decompositions of its factors."""
    return max((float(torch.linalg.matrix_norm(_core(part), 2)) for part in update.values()), default=0.0)


def _core(part: LowRank) -> Tensor:
    """A [ranks, ranks] matrix with the singular values of the product."""
    left, right = (torch.linalg.qr(x.double(), mode="r").R for x in (part.b, part.a.mT))
    core: Tensor = left @ right.mT
    return core


def clipped(upload: Upload, template: Upload, factor: float) -> Upload:
    """The upload with its difference from the template multiplied by the factor."""
    values: dict[str, Tensor] = {}
    for name, x in upload.values.items():
        before = template.values[name]
        values[name] = torch.lerp(before, x, factor) if before.shape == x.shape else factor * x
    return Upload(values, upload.choices)
