"""Numbers that are too large: the bound of an upload's entries, the check of a state, and the upload to suspect."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.rounds.codec import outline

LARGEST_ENTRY = 1e10
"""The largest magnitude that an entry of an upload may have."""

NOT_FINITE = "NaN or infinite values"

NumericalError = (torch.linalg.LinAlgError, np.linalg.LinAlgError, ArithmeticError)  # type: ignore[attr-defined]
"""What a method raises on values that are too large, where its results are not just NaN or infinite."""


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude of an entry: NaN if there is one, 0 for no entries. In a quarter of the time of `isfinite`."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def is_finite(state: Any) -> bool:
    """Whether no tensor in a state (see `codec.encode_state`) has NaN or infinite values."""
    _, tensors = outline(state)
    return all(math.isfinite(magnitude(tensor)) for tensor in tensors if tensor.is_floating_point())


@dataclass(frozen=True)
class Largest:
    """The accepted upload of a round (counted from 1) that changed most: its client, and by which norm."""

    client: str
    norm: float
    round: int


def divergence(reasons: Iterable[str | None], last: Largest | None) -> str:
    """Names the last round's largest upload if half of a cohort or more was refused for what is not finite, else nothing.

    `reasons` says why each client was refused, None for those that were not.
    """
    diverged = [reason is not None and reason.endswith(NOT_FINITE) for reason in reasons]
    if last is None or 2 * sum(diverged) < len(diverged):
        return ""
    return (
        f"{sum(diverged)} of {len(diverged)} clients had {NOT_FINITE}; the model may have diverged: the largest upload of "
        f"round {last.round}, of client {last.client}, changed by the norm {last.norm:.4g} (sampling.max_norm is its limit)"
    )
