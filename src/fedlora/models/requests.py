"""Validates a client's request against the model and the trainer before training starts."""

import math
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, pack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Fit, Gradient, GradientFilter
from fedlora.parts.table import Factors, supported


def check_request(spec: AdapterSpec, request: Fit | Gradient) -> None:
    """Rejects a request that names modules or factors missing from the adapter or the model, or that has an invalid value.

    Raises:
        ValueError: names the field, and the module and the factor, if any.
    """
    check_adapter(spec, request.start)
    known = {factor for part in request.start.values() for factor in vars(part)}
    if not request.train or not request.train <= known:
        raise ValueError(f"train = {sorted(request.train)}: expected some of the adapter's factors {sorted(known)}")
    if isinstance(request, Gradient):
        return
    if not frozenset(request.alternate) <= request.train or len(set(request.alternate)) < len(request.alternate):
        raise ValueError(f"alternate = {request.alternate}: expected different factors of train = {sorted(request.train)}")
    _check_filter(request)
    if request.epochs is not None and request.epochs < 1:
        raise ValueError(f"epochs = {request.epochs}: expected at least 1, or None for the run's own setting")
    if request.steps is not None and (request.steps < 1 or request.epochs is not None):
        raise ValueError(
            f"steps = {request.steps}, epochs = {request.epochs}: expected one of them, at least 1, or neither"
        )
    check_update(spec, request.frozen_extra or {}, "frozen_extra")
    tensors = pack(request.start)
    for key, x in (request.correction or {}).items():
        if key not in tensors or x.shape != tensors[key].shape:
            raise ValueError(f"correction of {key!r}: expected the name and the shape of a factor, got {tuple(x.shape)}")
    for key, mask in (request.mask or {}).items():
        if key not in tensors:
            raise ValueError(f"mask of {key!r}: the adapter has no such factor")
        if mask.dtype != torch.bool or not _broadcasts(mask, tensors[key]):
            raise ValueError(
                f"mask of {key!r}: expected a bool tensor that broadcasts to {tuple(tensors[key].shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
    for factor, rate in (request.rates or {}).items():
        if factor not in known:
            raise ValueError(f"rate of {factor!r}: expected one of the adapter's factors {sorted(known)}")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"rate of {factor!r} = {rate}: expected a finite number, at least 0")


def check_adapter(spec: AdapterSpec, adapter: Adapter) -> None:
    """Rejects an adapter of which the model would ignore a part, or compute another update.

    Raises:
        ValueError: an unknown module or parameter, a type of factors that no layer supports, or a factor whose shape
            does not fit its module; names them.
    """
    for name, part in adapter.items():
        if name not in (spec.head if part.in_head else spec.modules):
            raise ValueError(f"{name!r}: the model has no such {'head parameter' if part.in_head else 'module'}")
        if not supported(part):
            raise ValueError(f"{name!r}: parts of kind {type(part).__name__} are not supported")
        _check_shapes(name, part, part.shapes(*(spec.head[name].shape if part.in_head else spec.modules[name])))


def check_update(spec: AdapterSpec, update: Mapping[str, LowRank], field: str) -> None:
    """Rejects a base update, or frozen extra factors, that the model would ignore or compute differently.

    Raises:
        ValueError: see `check_adapter`, and any type other than LowRank.
    """
    for name, part in update.items():
        if name not in spec.modules:
            raise ValueError(f"{field}: the model has no adapted module {name!r}")
        if type(part) is not LowRank:
            raise ValueError(f"{field}: expected two factors for {name!r}, got {type(part).__name__}")
        _check_shapes(f"{field} {name}", part, part.shapes(*spec.modules[name]))


def _check_filter(request: Fit) -> None:
    """Rejects a filter that the trainer does not have, or that would not apply to all trained factors but the head's."""
    if request.gradient_filter is None:
        return
    if request.gradient_filter not in get_args(GradientFilter):
        allowed = list(get_args(GradientFilter))
        raise ValueError(f"gradient_filter = {request.gradient_filter!r}: expected one of {allowed}, or None")
    for name, part in request.start.items():
        if not part.in_head and type(part) is not LowRank:
            raise ValueError(
                f"gradient_filter: expected two factors for {name!r}, got {type(part).__name__}, which it does not support"
            )


def _check_shapes(name: str, part: Factors, expected: Mapping[str, tuple[int, ...]]) -> None:
    for factor, shape in expected.items():
        if (found := tuple(getattr(part, factor).shape)) != shape:
            raise ValueError(f"{name}.{factor}: expected the shape {shape}, got {found}")


def _broadcasts(mask: Tensor, to: Tensor) -> bool:
    try:
        mask.expand(to.shape)
    except RuntimeError:
        return False
    return True
