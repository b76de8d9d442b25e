"""Table of the wrappers: the only list of their names."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from fedlora.method import AnyMethod
from fedlora.methods.wrap.fedprox import FedProx


@dataclass(frozen=True)
class WrapperRow:
    """One wrapper: its constructor, whose first argument is the wrapped method, its source and what it does."""

    name: str
    make: Callable[..., AnyMethod]
    paper: str
    summary: str

    def settings(self) -> dict[str, Any]:
        """The user's settings, with their defaults."""
        return {field.name: field.default for field in fields(self.make) if field.name != "inner"}  # type: ignore[arg-type]


_ROWS = (
    WrapperRow(
        name="fedprox",
        make=FedProx,
        paper="Li et al. 2020, arXiv:1812.06127",
        summary="adds a penalty on the distance from the start of each training",
    ),
)

WRAPPERS = {row.name: row for row in _ROWS}
"""Name -> wrapper."""
