"""Adapters: named factors, and their representation as a flat mapping of tensors in messages."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from fedlora.linalg.fit import truncate
from fedlora.linalg.lowrank import LowRank
from fedlora.parts.table import Factors, Kind
from fedlora.randomness import generator

Tensors = Mapping[str, Tensor]
Adapter = Mapping[str, Factors]
Init = Literal["uniform", "gaussian", "pissa"]
"""PEFT's initializations of the factors: its default, "gaussian", and "pissa"."""


@dataclass(frozen=True)
class Scaling:
    """PEFT's alpha, divided by the rank or, for rsLoRA, by its square root. The scale is 1 without an alpha.

    `alphas` has those of individual modules, which replace alpha.
    """

    alpha: float | None = None
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = self.alphas.get(module, self.alpha)
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class AdapterSpec:
    """The modules and parameters of a model that can be adapted.

    `modules` maps a module's name to (out, in). `head` holds the task head's initial values. `rank_pattern` fixes the rank
    of individual modules, regardless of the client's rank. `weight` reads a module's pretrained weight, fp32 [out, in].
    `embeddings` are the modules whose input is a token id, with the size of the vocabulary as in. `init` is the
    initialization of `lora_init`.
    `features` is the width of the last layer, `classes` the number of labels. `scaling` determines `scale`.
    `magnitudes` are DoRA's initial magnitudes, the norms of the rows of each module's weight [out]; empty without DoRA.
    """

    modules: Mapping[str, tuple[int, int]]
    head: Tensors = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    weight: Callable[[str], Tensor] | None = None
    features: int = 0
    classes: int = 0
    scaling: Scaling = Scaling()
    embeddings: frozenset[str] = frozenset()
    init: Init = "uniform"
    magnitudes: Tensors = field(default_factory=dict)

    def rank(self, module: str, rank: int) -> int:
        """Rank of `module` for a client of rank `rank`."""
        return self.rank_pattern.get(module, rank)

    def scale(self, module: str, rank: int) -> float:
        """Factor between PEFT's `lora_B` and b for factors of `rank` in `module`: b = scale * lora_B, and a = lora_A.

        With a middle factor c, b contains the scale, and c = lora_C. If b and a are trained, all three are trained as
        in (alpha / rank) lora_B lora_C lora_A; if they are frozen, c is trained as in b c a, independently of alpha.
        """
        return self.scaling.of(module, rank)

    def scales(self, rank: int) -> dict[str, float]:
        """Scale of each module for a client of rank `rank`."""
        return {name: self.scale(name, self.rank(name, rank)) for name in self.modules}


def pack(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the adapter's tensors as `{"module.factor": tensor}`, in the adapter's order."""
    return {f"{name}.{f.name}": getattr(part, f.name) for name, part in adapter.items() for f in fields(part)}


def units(adapter: Adapter, scaling: Scaling) -> dict[str, float]:
    """The number by which PEFT's factor is multiplied to give that of the adapter, named as by `pack`."""
    scales = {name: 1.0 if part.in_head else scaling.of(name, part.rank) for name, part in adapter.items()}
    return {f"{name}.{f}": float(part.unit(f, scales[name])) for name, part in adapter.items() for f in vars(part)}


def unpack(tensors: Tensors, kind: type[Kind]) -> dict[str, Kind]:
    """Inverse of `pack`, for an adapter whose factors are all of this type.

    Raises:
        ValueError: a factor is missing, or a key does not name a factor of that type.
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


def low_rank(adapter: Adapter) -> dict[str, LowRank]:
    """The parts of the adapter that are two factors."""
    return {name: part for name, part in adapter.items() if isinstance(part, LowRank)}


def pick(tensors: Tensors, factors: Iterable[str]) -> dict[str, Tensor]:
    """Selects the named factors of a packed adapter: `pick(packed, "b")` keeps every `"module.b"`."""
    wanted = set(factors)
    return {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in wanted}


def lora_init(spec: AdapterSpec, rank: int, seed: int) -> dict[str, LowRank]:
    """Initial factors with zero update: b = 0 [out, rank], a uniform in +-1/sqrt(in) [rank, in] (PEFT's initialization).

    With the initialization "gaussian", a is normal with standard deviation 1 / rank. For an embedding, it is always
    standard normal: PEFT has a = 0 and such a b, but all methods train b first or alone. Each module has its own seed, so
    that modules of equal shape get different factors. The first rows of `a` depend on the rank.

    With "pissa", the update is that of `principal_parts`, which the base lacks.
    """
    if spec.init == "pissa":
        return principal_parts(spec, rank)
    found: dict[str, LowRank] = {}
    for name, (out, in_) in spec.modules.items():
        rng, own = generator(seed, "lora_init", name), spec.rank(name, rank)
        if name in spec.embeddings or spec.init == "gaussian":
            a = torch.randn(own, in_, generator=rng) / (1 if name in spec.embeddings else own)
        else:
            a = _uniform(own, in_, rng)
        found[name] = LowRank(b=torch.zeros(out, own, dtype=spec.dtype), a=a.to(spec.dtype))
    return found


def principal_parts(spec: AdapterSpec, rank: int) -> dict[str, LowRank]:
    """The best approximations of the pretrained weights: PEFT's factors are balanced, lora_B^T lora_B = lora_A lora_A^T.

    The product is the same on all machines up to rounding, the factors only up to sign.

    Source: Meng et al. 2024, arXiv:2404.02948 (PiSSA).
    """
    assert spec.weight is not None, "the spec cannot read the pretrained weights"
    found: dict[str, LowRank] = {}
    for name in spec.modules:
        own = spec.rank(name, rank)
        part, root = truncate(spec.weight(name), own, "balanced"), spec.scale(name, own) ** 0.5
        found[name] = LowRank(b=(part.b * root).to(spec.dtype), a=(part.a / root).to(spec.dtype))
    return found


def _uniform(rank: int, in_: int, rng: torch.Generator) -> Tensor:
    return (2 * torch.rand(rank, in_, generator=rng) - 1) / math.sqrt(in_)
