"""What a client trains: named factors, and the same as a flat mapping of tensors for the wire."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor

from fedlora.linalg.lowrank import Experts, Heads, LowRank, ThreeFactor
from fedlora.randomness import generator

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Dense:
    """A parameter that is trained as it is, any shape: a weight or a bias of the task head."""

    w: Tensor


Factors = LowRank | ThreeFactor | Heads | Experts | Dense
Adapter = Mapping[str, Factors]
Kind = TypeVar("Kind", LowRank, ThreeFactor, Heads, Experts, Dense)


@dataclass(frozen=True)
class Scaling:
    """PEFT's alpha, and whether it is divided by the rank or by its root (rsLoRA). Without an alpha the scale is 1."""

    alpha: float | None = None
    rslora: bool = False

    def of(self, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
        return 1.0 if self.alpha is None else self.alpha / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class AdapterSpec:
    """What can be adapted in one model, read from it once.

    `modules` maps a module's name to (out, in). `head` holds the task head's initial values. `rank_pattern` fixes the rank
    of single modules, whatever the rank of the client. `weight` reads a module's pretrained weight, fp32 [out, in].
    `features` is the width of the last layer, `classes` the number of labels. `scaling` gives the `scale`.
    """

    modules: Mapping[str, tuple[int, int]]
    head: Tensors = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    weight: Callable[[str], Tensor] | None = None
    features: int = 0
    classes: int = 0
    scaling: Scaling = Scaling()

    def rank(self, module: str, rank: int) -> int:
        """The rank of `module` for a client of rank `rank`."""
        return self.rank_pattern.get(module, rank)

    def scale(self, module: str, rank: int) -> float:
        """The factor between PEFT's `lora_B` and b for factors of `rank` at `module`: b = scale * lora_B, and a = lora_A.

        With a middle factor too it is b that takes the scale: c = lora_C. A c between trained factors then learns as in
        (alpha / rank) lora_B lora_C lora_A, and a c between frozen ones as in b c a, whatever alpha is.
        """
        return self.scaling.of(rank)

    def scales(self, rank: int) -> dict[str, float]:
        """Each module's scale for a client of rank `rank`."""
        return {name: self.scale(name, self.rank(name, rank)) for name in self.modules}


def pack(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors as `{"module.factor": tensor}`, in the adapter's order."""
    return {f"{name}.{f.name}": getattr(part, f.name) for name, part in adapter.items() for f in fields(part)}


def unpack(tensors: Tensors, kind: type[Kind]) -> dict[str, Kind]:
    """The inverse of `pack`, for an adapter whose parts are all of one kind.

    Raises:
        ValueError: a factor is missing, or a key names none of the kind's factors.
    """
    expected = {f.name for f in fields(kind)}
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, factor = key.rpartition(".")
        grouped.setdefault(name, {})[factor] = tensor
    for name, found in grouped.items():
        if found.keys() != expected:
            raise ValueError(f"{name!r} has the factors {sorted(found)}, a {kind.__name__} has {sorted(expected)}")
    return {name: kind(**found) for name, found in grouped.items()}


def pick(tensors: Tensors, factors: Iterable[str]) -> dict[str, Tensor]:
    """Only the named factors of a packed adapter: `pick(packed, "b")` keeps every `"module.b"`."""
    wanted = set(factors)
    return {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in wanted}


def lora_init(spec: AdapterSpec, rank: int, seed: int) -> dict[str, LowRank]:
    """Factors of update zero: b = 0 [out, rank], a uniform in +-1/sqrt(in) [rank, in] (PEFT's initialisation).

    Each module draws from its own seed, so that equal shapes do not get equal factors; with a larger rank the first rows of
    `a` are not the same.
    """
    return {
        name: LowRank(
            b=torch.zeros(out, spec.rank(name, rank), dtype=spec.dtype),
            a=_uniform(spec.rank(name, rank), in_, generator(seed, "lora_init", name)).to(spec.dtype),
        )
        for name, (out, in_) in spec.modules.items()
    }


def _uniform(rank: int, in_: int, rng: torch.Generator) -> Tensor:
    return (2 * torch.rand(rank, in_, generator=rng) - 1) / math.sqrt(in_)
