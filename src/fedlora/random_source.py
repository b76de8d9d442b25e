"""Random numbers of private training: reproducible ones for simulations, secret ones for deployments."""

import math
import os
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class RandomSource(Protocol):
    """Independent random numbers."""

    def uniform(self, count: int) -> Tensor:
        """Numbers from [0, 1)."""

    def normal(self, shape: torch.Size) -> Tensor:
        """Standard normal numbers."""


class SeededSource:
    """Numbers that a seed determines: whoever knows it can remove the noise."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, count: int) -> Tensor:
        """See `RandomSource`."""
        return torch.rand(count, generator=self._generator, device=self._generator.device, dtype=torch.float64)

    def normal(self, shape: torch.Size) -> Tensor:
        """See `RandomSource`."""
        return torch.randn(shape, generator=self._generator, device=self._generator.device)


class SecretSource:
    """Numbers from the operating system's cryptographic generator, which are stored nowhere.

    torch's generator on the CPU has seeds of 32 bits, all of which can be tried.
    """

    def uniform(self, count: int) -> Tensor:
        """See `RandomSource`."""
        return _fractions(count)

    def normal(self, shape: torch.Size) -> Tensor:
        """See `RandomSource`: by the method of Box and Muller."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        radius = (-2 * torch.log1p(-_fractions(pairs))).sqrt()
        angle = 2 * math.pi * _fractions(pairs)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(shape)


def _fractions(count: int) -> Tensor:
    """Uniform multiples of 2^-53 in [0, 1)."""
    if not count:
        return torch.empty(0, dtype=torch.float64)
    words = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    return (words & ((1 << 53) - 1)).double() * 2.0**-53
