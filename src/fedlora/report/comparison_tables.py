"""Tables of a comparison, as text cells: one for each metric, and one of the costs."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.report.figures import ComparedCase, Figure
from fedlora.report.terminal import size

_ABSENT, _UNDEFINED = "-", "undefined"


class Cell(NamedTuple):
    """Text of a cell, and whether it is the best of its column and distinguishable from the baseline."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and a row of cells for each case; the first column has the labels."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def tables(
    cases: Sequence[ComparedCase], baseline: str, metrics: Sequence[str], lower_is_better: Collection[str]
) -> list[Table]:
    """The tables of these metrics and of the costs, without columns that no case has a value for."""
    return [*(_of_metric(cases, baseline, metric, metric in lower_is_better) for metric in metrics), _of_costs(cases)]


def _of_metric(cases: Sequence[ComparedCase], baseline: str, metric: str, lower_is_better: bool) -> Table:
    decile = "top decile" if lower_is_better else "bottom decile"
    columns = {"case": [Cell(case.label) for case in cases], "seeds": [Cell(str(len(case.runs))) for case in cases]}
    for name, key in (("test", f"global.{metric}"), ("held-out", f"clients.{metric}.mean")):
        figures, best = [case.figures.get(key) for case in cases], _best(cases, baseline, key, lower_is_better)
        columns[f"{name} {metric}"] = [
            Cell(_mean(figure), case.label == best) for case, figure in zip(cases, figures, strict=True)
        ]
        columns[f"{name} difference"] = _differences(cases, baseline, figures)
    for name, key, style in ((decile, "worst_decile", ".3f"), ("variance", "variance", ".4f")):
        columns[name] = [Cell(_mean(case.figures.get(f"clients.{metric}.{key}"), style)) for case in cases]
    return _table(metric, columns)


def _of_costs(cases: Sequence[ComparedCase]) -> Table:
    columns = {"case": [Cell(case.label) for case in cases]}
    columns["aggregation error"] = [Cell(_mean(case.figures.get("aggregation_error"), ".2g")) for case in cases]
    for name, key in (("up", "bytes_up"), ("down", "bytes_down")):
        found = [case.figures.get(key) for case in cases]
        columns[name] = [Cell(_ABSENT if figure is None else size(round(figure.mean))) for figure in found]
    columns["seconds"] = [Cell(_mean(case.figures.get("seconds"), ".1f")) for case in cases]
    chosen = [" ".join(f"{key}={value}" for key, value in case.chosen.items()) for case in cases]
    columns["chosen"] = [Cell(text or _ABSENT) for text in chosen]
    return _table("costs", columns)


def _table(title: str, columns: Mapping[str, Sequence[Cell]]) -> Table:
    present = {name: cells for name, cells in columns.items() if any(cell.text != _ABSENT for cell in cells)}
    return Table(title, list(present), list(zip(*present.values(), strict=True)))


def _best(cases: Sequence[ComparedCase], baseline: str, key: str, lower: bool) -> str | None:
    """Label of the case with the best mean, if intervals show that it is better than the baseline; the baseline, than all.

    As means may be over different seeds, its difference over the common seeds must also be the best.
    """
    means = {case.label: case.figures[key].mean for case in cases if key in case.figures}
    if len(means) < 2 or any(math.isnan(mean) for mean in means.values()):
        return None
    best = (min if lower else max)(means, key=lambda label: means[label])
    better, others = -1 if lower else 1, {case.label: case.figures[key] for case in cases if case.label in means}
    others.pop(baseline, None)
    if best == baseline:
        return best if all(_distinguishable(figure, -better) for figure in others.values()) else None
    gains = {label: better * figure.difference.mean for label, figure in others.items() if figure.difference}
    return best if _distinguishable(others[best], better) and gains[best] >= max(gains.values()) else None


def _distinguishable(figure: Figure, side: int) -> bool:
    """Whether the interval is above 0 (`side` 1) or below (-1); that of one seed leaves out how much seeds vary."""
    difference = figure.difference
    if difference is None or difference.seeds < 2 or difference.interval is None:
        return False
    return difference.interval.excludes_zero and side * difference.interval.low > 0


def _mean(figure: Figure | None, style: str = ".3f") -> str:
    if figure is None:
        return _ABSENT
    if math.isnan(figure.mean):
        return _UNDEFINED
    return f"{figure.mean:{style}}" + ("" if figure.std is None else f" ± {figure.std:{style}}")


def _differences(cases: Sequence[ComparedCase], baseline: str, figures: Sequence[Figure | None]) -> list[Cell]:
    """A cell for each case; if there are differences, that of the baseline names it."""
    found = [_difference(figure) for figure in figures]
    if any(text != _ABSENT for text in found):
        found = ["baseline" if case.label == baseline else text for case, text in zip(cases, found, strict=True)]
    return [Cell(text) for text in found]


def _difference(figure: Figure | None) -> str:
    if figure is None or figure.difference is None:
        return _ABSENT
    if math.isnan(figure.difference.mean):
        return _UNDEFINED
    interval = figure.difference.interval
    return f"{figure.difference.mean:+.3f}" + ("" if interval is None else f" [{interval.low:.3f}, {interval.high:.3f}]")
