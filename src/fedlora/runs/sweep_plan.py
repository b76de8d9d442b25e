"""Runs of a sweep, and the next ones to start."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedlora.config.experiment import Experiment
from fedlora.config.sweep import Point, Settings, Sweep, label_of
from fedlora.tasks.metric_names import check_metric
from fedlora.tasks.table import task_of


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep. Its name is unique among different settings and the same for equal ones."""

    name: str
    point: int
    title: str
    experiment: Experiment


@dataclass(frozen=True)
class Outcome:
    """End of a run: the value of the search's metric and its name, if there is a search, or the reason of its failure."""

    metric: float | None = None
    name: str = ""
    failed: str | None = None


Outcomes = Mapping[str, Outcome]
"""Outcomes of the runs that have ended, by the runs' names."""


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep."""

    sweep: Sweep

    @cached_property
    def candidates(self) -> list[list[PlannedRun]]:
        """For each point, a run for each candidate of its search."""
        seed = self.sweep.search_seed
        return [[self._run(i, one, seed) for one in point.candidates] for i, point in enumerate(self.sweep.points)]

    def chosen(self, point: int, outcomes: Outcomes) -> Settings | None:
        """Settings of the best candidate, the first of equals; none if a candidate has not ended, or all have failed."""
        search, best, chosen = self.sweep.search, math.nan, None
        if search is None:
            return {}
        for run, settings in zip(self.candidates[point], self.sweep.points[point].candidates, strict=True):
            if run.name not in outcomes:
                return None
            outcome = outcomes[run.name]
            if outcome.metric is not None and math.isfinite(outcome.metric):
                value = -outcome.metric if self._minimizes(run, outcome.name) else outcome.metric
                if chosen is None or value > best:
                    best, chosen = value, settings
        return chosen

    def _minimizes(self, run: PlannedRun, metric: str) -> bool:
        """Whether the smallest value of the metric is the best."""
        search = self.sweep.search
        assert search is not None
        if search.mode is not None:
            return search.mode == "min"
        _, name, statistic = metric.split(".")
        return statistic == "spread" or name in task_of(dict(run.experiment.task)).lower_is_better

    def runs(self, point: int, outcomes: Outcomes) -> dict[int, PlannedRun]:
        """The run of each seed with the chosen settings; empty while these are unknown."""
        settings = self.chosen(point, outcomes)
        return {} if settings is None else {seed: self._run(point, settings, seed) for seed in self.sweep.seeds}

    def all_failed(self, point: int, outcomes: Outcomes) -> bool:
        """Whether the point has a search, all of whose candidates have failed."""
        runs = self.candidates[point]
        return bool(runs) and all(one.name in outcomes for one in runs) and self.chosen(point, outcomes) is None

    def ready(self, outcomes: Outcomes) -> list[PlannedRun]:
        """Runs that can start: first the candidates, then seed by seed, so that successive runs have the same model."""
        points = range(len(self.sweep.points))
        found = {run.name: run for runs in self.candidates for run in runs}
        seeds = [self.runs(point, outcomes) for point in points]
        for seed in self.sweep.seeds:
            found |= {runs[seed].name: runs[seed] for runs in seeds if runs}
        return [run for run in found.values() if run.name not in outcomes]

    def count(self, point: int) -> int:
        """Number of runs of the point; a candidate that also is the run of a seed counts once."""
        candidates, seeds = len(self.candidates[point]), len(self.sweep.seeds)
        return candidates + seeds - (bool(candidates) and self.sweep.search_seed in self.sweep.seeds)

    def ended(self, point: int, outcomes: Outcomes) -> Iterator[Outcome]:
        """Outcomes of the point's runs."""
        runs = {run.name for run in [*self.candidates[point], *self.runs(point, outcomes).values()]}
        yield from (outcomes[name] for name in sorted(runs) if name in outcomes)

    def missing(self, outcomes: Outcomes) -> list[str]:
        """Titles of all runs that have not ended; those that depend on the search have no values yet."""
        found = {run.name: run.title for run in self.ready(outcomes)}
        for i, point in enumerate(self.sweep.points):
            if not self.runs(i, outcomes):
                seeds = [seed for seed in self.sweep.seeds if seed != self.sweep.search_seed]
                found |= {f"{i} {seed}": f"{point.label} (best of the search) seed={seed}" for seed in seeds}
        return list(found.values())

    @cached_property
    def _planned(self) -> dict[tuple[int, str, int], PlannedRun]:
        return {}

    def _run(self, index: int, more: Settings, seed: int) -> PlannedRun:
        """The run, planned once: a live table asks for all runs several times a second."""
        key = index, str(dict(more)), seed
        if key not in self._planned:
            self._planned[key] = self._new_run(index, more, seed)
        return self._planned[key]

    def _new_run(self, index: int, more: Settings, seed: int) -> PlannedRun:
        point: Point = self.sweep.points[index]
        experiment = self.sweep.experiment({**point.settings, **more}, seed)
        title = " ".join(filter(None, [point.label, label_of(more), f"seed={seed}"]))
        digest = hashlib.sha256(experiment.to_toml().encode()).hexdigest()[:8]
        slug = re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-.")
        return PlannedRun(f"{slug[:80]}-{digest}", index, title, experiment)


def check_metrics(sweep: Sweep) -> None:
    """Checks that the tasks of all points have the metric of the search, and that of early stopping.

    Raises:
        UserError: one has not; names its metrics.
    """
    for point in sweep.points:
        for candidate in point.candidates or [{}]:
            experiment = sweep.experiment({**point.settings, **candidate}, sweep.search_seed)
            metrics = {"evaluate.metric": experiment.evaluate.metric}
            if sweep.search is not None and sweep.search.metric is not None:
                metrics["search.metric"] = sweep.search.metric
            for key, metric in metrics.items():
                check_metric(key, metric, dict(experiment.task), ("O", "B-NAME"))  # tags of entities have most metrics
