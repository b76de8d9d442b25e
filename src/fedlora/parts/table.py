"""Table of the kinds of adapter parts, the only list of them."""

from collections.abc import Callable, Sequence
from typing import TypeVar, get_args

from torch import Tensor

from fedlora.linalg.lowrank import LowRank
from fedlora.parts.dense import Dense
from fedlora.parts.dora import Dora
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.three_factor import ThreeFactor
from fedlora.parts.tied import Tied
from fedlora.parts.weight_change import WeightChange

Part = LowRank | ThreeFactor | Heads | Experts | WeightChange | Tied | Dora
"""Any part that changes what a module computes: a frozen dataclass whose fields are its factors.

- `rank`: the rank of which `AdapterSpec.scale` gives the scale.
- `product()` is the matrix [out, in], and `as_two_factors()` the same as two factors; both are None if no such matrix
  follows from the factors alone.
- `shapes(out, in_)`: the shapes that the factors must have for a module of that size.
- `unit(factor, scale)`: the number by which the factor that is trained, PEFT's, is multiplied to give the part's.
- `apply(x, dropped, scale, base)`: the update of rows [clients, rows, in], for factors with a client axis, as they are
  trained; or of token ids [clients, rows], if the module is an embedding.
  `dropped` is the input after dropout, and x that before it if the part `reads_input`, else the same as `dropped`. `base`
  is the module without its bias, applied to `dropped`.
- `structure`: what parts that are loaded together must share. Apart from that, `stacked` pads smaller parts.
"""

Factors = Part | Dense
"""Any part of an adapter. A part of the head, `in_head`, is a parameter itself, and needs no more than `shapes`, `unit` and
`structure`."""

Kind = TypeVar("Kind", bound=Factors)


def supported(part: object) -> bool:
    """Whether the part is of a kind in this table. The type must match exactly: a subclass would compute another update."""
    return type(part) in get_args(Factors)


def matrix_of(part: Part | None) -> Tensor | None:
    """The factor of a part whose update is this factor times the input, before dropout and without scale; else None."""
    return part.delta if isinstance(part, WeightChange) else None


def mapped(part: Kind, change: Callable[[Tensor], Tensor]) -> Kind:
    """The part with `change` applied to each factor."""
    return type(part)(**{factor: change(x) for factor, x in vars(part).items()})


def as_trained(part: Kind, scale: float) -> Kind:
    """The part with each factor divided by its `unit`: as PEFT trains them."""
    return type(part)(**{factor: x / part.unit(factor, scale) for factor, x in vars(part).items()})


def stacked(parts: Sequence[Kind]) -> Kind:
    """One part with a new first axis in each factor, in which smaller parts are zero-padded at the end to the largest."""
    return type(parts[0])(**{factor: _padded([vars(part)[factor] for part in parts]) for factor in vars(parts[0])})


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    largest = [max(sizes) for sizes in zip(*(x.shape for x in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *largest)
    for own, x in zip(stacked, tensors, strict=True):
        own[tuple(slice(size) for size in x.shape)] = x
    return stacked
