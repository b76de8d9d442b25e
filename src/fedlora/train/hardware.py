"""Devices of this machine and their numerical precision."""

from typing import Literal

import torch

from fedlora.errors import UserError


def device(choice: str) -> torch.device:
    """The device of `train.device`.

    Raises:
        UserError: the device is not available.
    """
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=choice).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"train.device = {choice!r} is not available: {str(error).splitlines()[0]}") from error


def devices(choice: str, wanted: int | Literal["auto"]) -> int:
    """The number of devices to train on, by `train.device` and `train.devices`.

    Raises:
        UserError: fewer devices are available.
    """
    if device(choice).type != "cuda":
        return 1 if wanted == "auto" else wanted
    available = torch.cuda.device_count()
    if ":" in choice:
        if wanted not in (1, "auto"):
            raise UserError(
                f"train.device = {choice!r} is one device; for train.devices = {wanted}, set train.device = 'cuda'"
            )
        return 1
    if wanted != "auto" and wanted > available:
        raise UserError(f"train.devices = {wanted}: only {available} are available")
    return available if wanted == "auto" else wanted


def slow_precision(precision: str, choice: str) -> str | None:
    """A warning if the device of `train.device` has no instructions for `train.precision`; None if it has."""
    if precision != "bf16" or fast_in_bf16(choice):
        return None
    return (
        "train.precision = 'bf16': this processor has no bf16 instructions and emulates them, up to a hundred times slower "
        "than fp32; set train.precision = 'auto' to use fp32"
    )


def fast_in_bf16(choice: str) -> bool:
    """Whether the device of `train.device` has instructions for bf16.

    Raises:
        UserError: the device is not available.
    """
    if device(choice).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
