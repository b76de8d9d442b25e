"""The methods, by name. This table is the only list of names there is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fedlora.method import AnyMethod
from fedlora.methods.averaging import FactorAveraging

Head = Literal["frozen", "averaged", "local"]


@dataclass(frozen=True)
class Row:
    """One method: how to make it, where it comes from, what it can do.

    `up` and `down` are floats per adapted layer, client and round, in r (rank), in, out; the head comes on top. For a
    method whose traffic changes with the round they are tuples, repeated.
    """

    name: str
    make: Callable[..., AnyMethod]
    paper: str
    summary: str
    exact: str
    up: tuple[str, ...]
    down: tuple[str, ...]
    head: Head = "averaged"
    personal: bool = False
    mixed_ranks: bool = False
    singles: bool = False
    preset: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What the user may set, with the defaults."""
        return {f.name: f.default for f in fields(self.make) if f.name not in self.preset}  # type: ignore[arg-type]


_ROWS = (
    Row(
        name="fedit",
        make=FactorAveraging,
        preset={"shared": "ba", "schedule": ("ba",)},
        paper="Zhang et al. 2024, arXiv:2305.05644",
        summary="averages b and a separately",
        exact="no: off by the covariance of the factors",
        up=("r * (out + in)",),
        down=("r * (out + in)",),
    ),
    Row(
        name="ffa-lora",
        make=FactorAveraging,
        preset={"shared": "b", "schedule": ("b",)},
        paper="Sun et al. 2024, arXiv:2403.12313",
        summary="freezes a common random a, trains and averages b",
        exact="yes",
        up=("r * out",),
        down=("r * out",),
        head="frozen",
    ),
    Row(
        name="rolora",
        make=FactorAveraging,
        preset={"shared": "ba", "schedule": ("b", "a")},
        paper="Chen et al. 2025, arXiv:2502.01755",
        summary="trains and averages b and a in alternate rounds",
        exact="yes, in each round",
        up=("r * out", "r * in"),
        down=("r * (out + in)",),
    ),
    Row(
        name="fedsa-lora",
        make=FactorAveraging,
        preset={"shared": "a", "schedule": ("ba",)},
        paper="Guo et al. 2025, arXiv:2410.01463",
        summary="averages a; b and the head stay personal",
        exact="a only: there is no global model",
        up=("r * in",),
        down=("r * in",),
        head="local",
        personal=True,
    ),
)

TABLE: Mapping[str, Row] = {row.name: row for row in _ROWS}
