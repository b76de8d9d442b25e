"""A comparison as CSV, JSON, Markdown, LaTeX, and for the terminal."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box, table
from rich.console import Group
from rich.text import Text

from fedlora.printable import printable
from fedlora.report.comparison_tables import Cell, Table
from fedlora.report.figures import ComparedCase

WIDTH = 160
"""Minimum width, in columns, at which the tables are readable."""

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
_NUMBERS = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]\d+)?( ± .*| \[.*\])?")
"""Cells that LaTeX sets in math mode."""


def records(cases: Sequence[ComparedCase]) -> list[dict[str, Any]]:
    """A flat mapping for each case, all with the same keys; absent values are None."""
    found = []
    for case in cases:
        record: dict[str, Any] = {"case": case.label, "seeds": len(case.runs)}
        for name, figure in case.figures.items():
            record |= {name: figure.mean, f"{name}.std": figure.std}
            if (difference := figure.difference) is not None:
                interval = difference.interval
                ends = (None, None) if interval is None else (interval.low, interval.high)
                record |= dict(
                    zip((f"{name}.difference", f"{name}.low", f"{name}.high"), (difference.mean, *ends), strict=True)
                )
        found.append(record | {f"chosen.{key}": value for key, value in case.chosen.items()})
    return [{key: record.get(key) for key in _columns(found)} for record in found]


def _columns(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys; those of one figure stand together."""
    keys = dict.fromkeys(key for record in found for key in record)
    order = list(dict.fromkeys(_figure(key) for key in keys))
    return sorted(keys, key=lambda key: order.index(_figure(key)))


def _figure(key: str) -> str:
    return re.sub(r"\.(std|difference|low|high)$", "", key)


def to_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """A header and a line for each record; absent values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def to_json(found: Sequence[Mapping[str, Any]], baseline: str, notes: Sequence[str]) -> str:
    """Strict JSON, in which a number that is not finite is null."""
    cases = [{key: _finite(value) for key, value in record.items() if value is not None} for record in found]
    return json.dumps({"baseline": baseline, "cases": cases, "notes": list(notes)}, indent=1, allow_nan=False) + "\n"


def to_markdown(found: Sequence[Table], notes: Sequence[str]) -> str:
    """The tables, and the notes as a list."""
    blocks = [
        "\n".join(
            [
                f"| {' | '.join(map(_markdown, one.header))} |",
                "|---|" + "---:|" * (len(one.header) - 1),
                *(f"| {' | '.join(_markdown(cell.text) for cell in row)} |" for row in one.rows),
            ]
        )
        for one in found
    ]
    return "\n\n".join([*blocks, *(["\n".join(f"- {_markdown(note)}" for note in notes)] if notes else [])]) + "\n"


def to_latex(found: Sequence[Table], notes: Sequence[str]) -> str:
    """A `tabular` of the package booktabs for each table, and the notes as comments."""
    lines = []
    for one in found:
        lines += [
            f"\\begin{{tabular}}{{l{'r' * (len(one.header) - 1)}}}",
            r"\toprule",
            _latex_row(map(_escaped, one.header)),
            r"\midrule",
            *(_latex_row(map(_latex, row)) for row in one.rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    return "\n".join([*lines, *(f"% {printable(note)}" for note in notes)]).rstrip() + "\n"


def for_terminal(found: Sequence[Table], notes: Sequence[str]) -> Group:
    """The tables, and a line for each note."""
    shown = []
    for one in found:
        grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        for place, name in enumerate(one.header):
            grid.add_column(printable(name), justify="right" if place else "left", overflow="fold")
        for row in one.rows:
            grid.add_row(*(Text(_shown(cell.text), "bold" if cell.best else "") for cell in row))
        shown.append(grid)
    return Group(*shown, *(Text(printable(note), "yellow") for note in notes))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(text: str) -> str:
    return " ± ".join(map(printable, text.split(" ± ")))


def _markdown(text: str) -> str:
    return _shown(text).replace("|", "\\|")


def _latex_row(cells: Any) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex(cell: Cell) -> str:
    if not _NUMBERS.fullmatch(cell.text):
        return _escaped(cell.text)
    text = re.sub(r"e([+-]\d+)", lambda found: rf" \cdot 10^{{{int(found[1])}}}", cell.text)
    text = text.replace("±", r"\pm").replace(" [", r"\ [")
    return rf"$\mathbf{{{text}}}$" if cell.best else f"${text}$"


def _escaped(text: str) -> str:
    return printable(text).translate(_LATEX)
