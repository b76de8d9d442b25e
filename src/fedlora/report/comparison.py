"""Comparison of runs: mean and spread over seeds, and paired differences to a baseline."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config.hints import nearest
from fedlora.errors import UserError
from fedlora.printable import counted
from fedlora.report import comparability, comparison_formats, comparison_plot, figures
from fedlora.report.comparison_tables import Table, tables
from fedlora.report.figures import ComparedCase, Difference
from fedlora.report.intervals import over_seeds, over_seeds_and_clients
from fedlora.runs.case import Case
from fedlora.runs.cases import find_cases
from fedlora.runs.result import package
from fedlora.runs.saved_run import SavedRun


@dataclass(frozen=True, repr=False)
class Comparison:
    """Figures of each case, differences to the baseline, and notes on what cannot be compared.

    The tables have the figures of `metrics`, which docs/sweeps.md describes. Smaller values are better for metrics in
    `lower_is_better`.
    """

    cases: Sequence[ComparedCase]
    baseline: str
    metrics: Sequence[str]
    notes: Sequence[str]
    lower_is_better: Collection[str]

    def to_pandas(self) -> Any:
        """Returns a `pandas.DataFrame` with one row per case, and the columns of `to_csv`.

        Raises:
            UserError: pandas is not installed.
        """
        return package("pandas").DataFrame(comparison_formats.records(self.cases))

    def to_csv(self) -> str:
        """A line for each case; a figure's columns are NAME (the mean), NAME.std, NAME.difference, NAME.low, NAME.high."""
        return comparison_formats.to_csv(comparison_formats.records(self.cases))

    def to_json(self) -> str:
        """The lines of `to_csv` as objects of strict JSON, with the baseline and the notes."""
        return comparison_formats.to_json(comparison_formats.records(self.cases), self.baseline, self.notes)

    def tables(self) -> list[Table]:
        """A table for each metric and one of the costs."""
        return tables(self.cases, self.baseline, self.metrics, self.lower_is_better)

    def to_markdown(self) -> str:
        """The tables, and the notes as a list."""
        return comparison_formats.to_markdown(self.tables(), self.notes)

    def to_latex(self) -> str:
        """The tables for the package booktabs, and the notes as comments.

        The best mean is bold if it is distinguishable from the baseline: the interval of the difference, over at least two
        common seeds, is on the better side of 0, and no other case has a better difference.
        """
        return comparison_formats.to_latex(self.tables(), self.notes)

    def plot(self, metric: str | None = None) -> Any:
        """Returns new `matplotlib` axes with the mean of a metric by round and a band of one standard deviation over seeds.

        The metric is the first one if none is given; on the test set, or on held-out examples without scores on it.

        Raises:
            UserError: matplotlib is not installed, no run has the metric, or no run was evaluated.
        """
        if metric is None and not self.metrics:
            raise UserError("no run was evaluated; there is nothing to plot")
        metric = metric or self.metrics[0]
        _require_metrics([metric], [run for case in self.cases for run in case.runs.values()])
        return comparison_plot.plot({case.label: case.runs for case in self.cases}, metric)

    def __repr__(self) -> str:
        cases = [f"{case.label} ({counted(len(case.runs), 'seed')})" for case in self.cases]
        return f"Comparison({', '.join(cases)})"


def compare(
    paths: str | Path | Iterable[str | Path], *, baseline: str | None = None, metrics: Sequence[str] = ()
) -> Comparison:
    """Compares runs and sweeps by their directories. Runs that differ only in their seed are one case.

    Args:
        paths: directories of runs or of sweeps.
        baseline: label of the case to which the others are compared; by default the first.
        metrics: names of metrics, such as "accuracy"; by default the task's main metric and the loss.

    Raises:
        UserError: not a run or sweep directory, damaged, from another version, none of the runs is finished, or an unknown
            baseline or metric.
    """
    found = find_cases([Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths])
    labels = [case.label for case in found]
    if baseline is not None and baseline not in labels:
        raise UserError(f"no case has the label {baseline!r} of the baseline{nearest(baseline, labels)}")
    cases, notes = [], []
    for case in found:
        runs = {seed: SavedRun.read(path) for seed, path in case.runs.items()}
        notes += [*comparability.unfinished(case, runs), *comparability.edge_of_search(case)]
        finished_runs = {seed: run for seed, run in runs.items() if run.finished}
        notes += comparability.within(case.label, finished_runs)
        cases.append(_compared(case, finished_runs))
    finished = [run for one in cases for run in one.runs.values()]
    if not finished:
        raise UserError(
            f"no run is finished; {notes[0]}" if notes else "expected directories of runs or sweeps, found none"
        )
    _require_metrics(metrics, finished)
    base = cases[0 if baseline is None else labels.index(baseline)]
    for one in cases:
        if one is not base:
            notes += comparability.against(one.label, one.runs, base.runs)
    compared = [_with_differences(one, base) for one in cases]
    differences = [figure.difference for one in compared for figure in one.figures.values()]
    if any(difference is not None and difference.seeds == 1 for difference in differences):
        notes.append(comparability.ONE_SEED)
    known = figures.metrics(finished[0].final)
    main = [name for name in known if name in (known[0], "loss")]
    lower = figures.lower_is_better(finished[0])
    return Comparison(compared, base.label, list(dict.fromkeys(metrics or main)), notes, lower)


def _compared(case: Case, runs: Mapping[int, SavedRun]) -> ComparedCase:
    """The case without differences."""
    values = _values(runs)
    found = {name: figures.over_seeds(by_seed) for name, by_seed in values.items()}
    return ComparedCase(case.label, runs, found, {} if case.searched is None else case.searched.chosen)


def _values(runs: Mapping[int, SavedRun]) -> dict[str, dict[int, float]]:
    """Name of a figure -> seed -> its value."""
    found: dict[str, dict[int, float]] = {}
    for seed, run in runs.items():
        for name, value in figures.figures(run).items():
            found.setdefault(name, {})[seed] = value
    return found


def _with_differences(case: ComparedCase, base: ComparedCase) -> ComparedCase:
    """The case with the differences of its scores to those of the baseline."""
    if case is base:
        return case
    pairs = [
        (run, base.runs[seed])
        for seed, run in case.runs.items()
        if seed in base.runs and comparability.same_data(run, base.runs[seed])
    ]
    numbers = [(figures.figures(run), figures.figures(other)) for run, other in pairs]
    found = dict(case.figures)
    for name, figure in case.figures.items():
        if (
            not name.startswith(("global.", "clients."))
            or not numbers
            or not all(name in a and name in b for a, b in numbers)
        ):
            continue
        differences = [own[name] - other[name] for own, other in numbers]
        if name.startswith("clients.") and name.endswith(".mean"):
            metric = name.removeprefix("clients.").removesuffix(".mean")
            same = all(comparability.same_clients(run) for pair in pairs for run in pair)
            interval = over_seeds_and_clients(differences, [_clients(*pair, metric) for pair in pairs], same)
        else:
            interval = over_seeds(differences)
        found[name] = replace(
            figure, difference=Difference(len(differences), sum(differences) / len(differences), interval)
        )
    return replace(case, figures=found)


def _clients(run: SavedRun, other: SavedRun, metric: str) -> dict[str, tuple[float, float]]:
    """The difference of each client that both runs evaluated, and its weight: the number of its held-out examples.

    Rows of earlier releases do not have that number; the number of training examples takes its place.
    """
    own, theirs = run.final.clients, other.final.clients
    assert own is not None and theirs is not None
    each, base = own[metric].each, theirs[metric].each
    examples = run.final.held_out or {one.id: one.examples for one in run.manifest.data.clients}
    return {name: (value - base[name], float(examples.get(name) or 1)) for name, value in each.items() if name in base}


def _require_metrics(names: Iterable[str], runs: Iterable[SavedRun]) -> None:
    """Checks that some run has each of the metrics.

    Raises:
        UserError: it does not; names the allowed ones.
    """
    allowed = list(dict.fromkeys(name for run in runs for name in figures.metrics(run.final)))
    for name in names:
        if name not in allowed:
            raise UserError(f"no run has the metric {name!r}{nearest(name, allowed)}")
