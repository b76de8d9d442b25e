"""Runs that differ only in their seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Searched:
    """The candidates of a search, each with its settings and the metric that it reached, and the settings chosen.

    The metric of a candidate that failed is NaN.
    """

    metric: str
    candidates: Sequence[tuple[Mapping[str, Any], float]]
    chosen: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A label, and the run directory of each seed. `failed` has the reason for each seed without a finished run."""

    label: str
    runs: Mapping[int, Path]
    searched: Searched | None = None
    failed: Mapping[int, str] = field(default_factory=dict)
