"""Privacy as data: the releases of a mechanism, which an accountant composes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Truncation:
    """A limit on a Poisson sample: of more than `largest` drawn units out of `units`, `largest` are kept, at random.

    Raises:
        ValueError: a value is below 1.
    """

    largest: int
    units: int

    def __post_init__(self) -> None:
        if self.largest < 1 or self.units < 1:
            raise ValueError(f"largest = {self.largest}, units = {self.units}: expected whole numbers of at least 1")


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian release of a sum over a Poisson sample, made `count` times.

    The noise's standard deviation is `noise_multiplier` times the largest norm of one unit's term. Each unit is in a sample
    with probability `rate`, independently of all others; with a `truncation`, not all of these are kept.

    Raises:
        ValueError: a value is out of range.
    """

    noise_multiplier: float
    rate: float = 1.0
    count: int = 1
    truncation: Truncation | None = None

    kind: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < float("inf"):
            raise ValueError(f"noise_multiplier = {self.noise_multiplier}: expected a finite number of at least 0")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate = {self.rate}: expected a number above 0 and at most 1")
        if self.count < 0:
            raise ValueError(f"count = {self.count}: expected a whole number of at least 0")


Ledger = Sequence[Gaussian]
"""All releases about the same units."""


def to_json(ledger: Ledger) -> list[dict[str, Any]]:
    """The ledger as a list of objects."""
    return [{"kind": event.kind, **asdict(event)} for event in ledger]


def from_json(entries: Sequence[Mapping[str, Any]]) -> list[Gaussian]:
    """Inverse of `to_json`.

    Raises:
        ValueError: an entry is not an event, or a value is out of range.
    """
    ledger = []
    for entry in entries:
        values = {name: value for name, value in entry.items() if name != "kind"}
        if entry.get("kind") != Gaussian.kind or values.keys() != {field.name for field in fields(Gaussian)}:
            raise ValueError(f"expected an event of kind {Gaussian.kind!r} with all its values, found {sorted(entry)}")
        limit = values["truncation"]
        truncation = None if limit is None else Truncation(int(limit["largest"]), int(limit["units"]))
        noise, rate, count = float(values["noise_multiplier"]), float(values["rate"]), int(values["count"])
        ledger.append(Gaussian(noise, rate, count, truncation))
    return ledger
