"""Metrics of one evaluation, as a table and as JSON."""

import json
import math
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedlora.printable import number, printable


def table(metrics: Mapping[str, int | float]) -> Table:
    """A line for each metric, and one for the number of examples."""
    found = Table("metric", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    found.add_column("value", justify="right")
    for name, value in metrics.items():
        found.add_row(Text(printable(name)), str(value) if isinstance(value, int) else number(value, 4))
    return found


def to_json(metrics: Mapping[str, int | float]) -> str:
    """An object in one line of strict JSON: numbers that are not finite are null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()}, allow_nan=False)
