"""Why figures of two cases cannot be compared, or only with care."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fedlora.runs.case import Case
from fedlora.runs.saved_run import SavedRun

_TRAINING = frozenset({"label_smoothing", "class_weights", "augment", "crop_padding"})
"""Settings of `[task]` that change only the training. The others change the examples or the metrics."""

Runs = Mapping[int, SavedRun]
"""The run of each seed."""

ONE_SEED = (
    "differences over one seed: an interval of a test metric needs at least two; that of a held-out metric is over the "
    "clients of this seed, and leaves out how much seeds vary"
)


def same_data(run: SavedRun, other: SavedRun) -> bool:
    """Whether both have the same evaluation, examples and labels; their partitions may differ."""
    return bool(_data(run) == _data(other))


def same_clients(run: SavedRun) -> bool:
    """Whether runs with other seeds have the same clients, instead of a new partition."""
    return run.experiment.clients.partition == "natural" or run.experiment.data.source == "none"


def unfinished(case: Case, runs: Runs) -> Iterator[str]:
    """A line for each of the case's runs that is unfinished, failed, or has not run."""
    for seed, run in runs.items():
        if not run.finished:
            yield f"{case.label}, seed {seed}: unfinished, {run.done} of {run.rounds} rounds; left out"
    for seed, reason in case.failed.items():
        yield f"{case.label}, seed {seed}: no finished run: {reason}"


def within(label: str, runs: Runs) -> Iterator[str]:
    """A line if runs of a case have other models or data than the first, although their settings are the same."""
    if not runs:
        return
    first, *others = runs.values()
    found = {what: [run.experiment.seed for run in others if value(run) != value(first)] for what, value in _EQUAL.items()}
    if differing := [f"{what} of seeds {_listed(seeds)}" for what, seeds in found.items() if seeds]:
        yield (
            f"{label}: other {', other '.join(differing)} than of seed {first.experiment.seed}, with the same settings; "
            "the mean is over different problems"
        )


def edge_of_search(case: Case) -> Iterator[str]:
    """A line for each setting whose chosen value is the smallest or largest of the searched values."""
    if case.searched is None:
        return
    for key, chosen in case.searched.chosen.items():
        values = [candidate[key] for candidate, _ in case.searched.candidates]
        if len(set(values)) > 1 and all(isinstance(value, int | float) for value in values):
            for end, word in ((min(values), "smallest"), (max(values), "largest")):
                if chosen == end:
                    yield f"{case.label}: {key} = {chosen} is the {word} of the searched values; search beyond it"


def against(label: str, runs: Runs, baseline: Runs) -> Iterator[str]:
    """Lines about a case's runs in comparison to those of the baseline."""
    if not runs or not baseline:
        return
    common = [seed for seed in runs if seed in baseline]
    if runs.keys() != baseline.keys():
        found = f"seeds {_listed(runs)}, the baseline has {_listed(baseline)}"
        yield f"{label}: {found}; differences are over {_listed(common)}" if common else f"{label}: {found}; no difference"
    pairs = {seed: (runs[seed], baseline[seed]) for seed in common}
    other = [seed for seed, (run, base) in pairs.items() if not same_data(run, base)]
    if other:
        yield f"{label}, seeds {_listed(other)}: other task or examples than the baseline's; no difference for them"
    moved = [seed for seed in common if seed not in other and _partition(runs[seed]) != _partition(baseline[seed])]
    if moved:
        yield (
            f"{label}, seeds {_listed(moved)}: another partition than the baseline's; the difference is also that of the "
            "partitions, and clients of the same name have other examples"
        )
    differing: dict[str, str] = {}
    for run, base in pairs.values() or [(next(iter(runs.values())), next(iter(baseline.values())))]:
        own, theirs = _budget(run), _budget(base)
        for key in own:
            if key in theirs and own[key] != theirs[key]:
                differing.setdefault(key, f"{key} {own[key]} (the baseline {theirs[key]})")
        if run.manifest.model != base.manifest.model:
            differing.setdefault("model", "another model")
    if differing:
        yield f"{label}: different budget: {', '.join(differing.values())}"


def _data(run: SavedRun) -> Any:
    data = run.manifest.data
    task = {key: value for key, value in run.experiment.task if key not in _TRAINING}
    return task, data.labels, data.train, data.test


def _fixed_test_set(run: SavedRun) -> str | None:
    """Digest of the test set, if it does not depend on the seed."""
    data = run.experiment.data
    return run.manifest.data.test.digest if data.test is not None and data.test_rows is None else None


_EQUAL: Mapping[str, Callable[[SavedRun], Any]] = {
    "model": lambda run: run.manifest.model,
    "labels": lambda run: run.manifest.data.labels,
    "number of examples": lambda run: (run.manifest.data.train.count, run.manifest.data.test.count),
    "test examples": _fixed_test_set,
}
"""What is the same in all seeds of a case, unless a file has changed between the runs."""


def _partition(run: SavedRun) -> str:
    return run.manifest.data.partition


def _budget(run: SavedRun) -> Mapping[str, int]:
    """What a run may use. Local steps are those of accepted uploads, of all clients and rounds.

    With privacy, what a server would not know of its clients is left out.
    """
    privacy, found = run.experiment.privacy, {"rounds": run.rounds}
    if privacy.unit == "none":
        found["local steps"] = sum(one.steps or 0 for row in run.rows for one in row.per_client.values())
    if not privacy.hides_counts:
        found["training examples"] = run.manifest.data.train.count
    return {**found, "train.max_length": run.experiment.train.max_length}


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))
