"""A small low-pass filter of gradients along the features of a module."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.messages import GradientFilter

_WEIGHTS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
_AXES = {"b": -2, "a": -1}
"""The axis of the features, of out and of in, in b [..., out, rank] and a [..., rank, in]."""


def binomial5(x: Float[Tensor, "..."], axis: int) -> Float[Tensor, "..."]:
    """x convolved with (1, 4, 6, 4, 1) / 16 along the axis, whose ends are continued by their mirror image: b a | a b c ...

    As a matrix it is symmetric and positive definite, with rows that sum to 1: a constant is unchanged, white noise keeps
    70/256 of its variance.

    Source: Liu et al. 2026, arXiv:2602.19926, section 4.
    """
    n = x.shape[axis]
    found = torch.zeros_like(x)
    for offset, weight in enumerate(_WEIGHTS, -(len(_WEIGHTS) // 2)):
        places = (torch.arange(n, device=x.device) + offset) % (2 * n)
        found.add_(x.index_select(axis, places.minimum(2 * n - 1 - places)), alpha=weight)
    return found


def filter_gradients(parameters: Mapping[str, Tensor], kind: GradientFilter | None) -> None:
    """Filters the gradients of b and a, named as by `pack`, along their features; those of the head stay as they are."""
    if kind is None:
        return
    for key, parameter in parameters.items():
        axis = _AXES.get(key.rpartition(".")[2])
        if axis is not None and parameter.grad is not None:
            parameter.grad = binomial5(parameter.grad, axis)
