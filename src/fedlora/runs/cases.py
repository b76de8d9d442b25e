"""Cases of the directories of runs and sweeps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.config.method_choice import MethodChoice
from fedlora.config.sweep import label_of
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.runs.case import Case
from fedlora.runs.manifest import Manifest
from fedlora.runs.sweep_folder import SWEEP, cases_of_sweep

_OF_THE_RUN = frozenset({"seed", "train.device", "train.devices"})
"""Settings in which the runs of a case may differ: the seed, and where a run computes."""


def find_cases(paths: Sequence[Path]) -> list[Case]:
    """The cases of these directories of sweeps, then of runs; runs that differ only in their seed are one case.

    A label that several cases have is preceded by the name of the sweep's directory, or of the case's first run.

    Raises:
        UserError: as `cases_of_runs` and `cases_of_sweep`, or a sweep is given twice.
    """
    sweeps = [path for path in paths if (path / SWEEP).is_file()]
    runs = [path for path in paths if path not in sweeps]
    if twice := [path for path, count in Counter(path.resolve() for path in sweeps).items() if count > 1]:
        raise UserError(f"{twice[0]}: the sweep is given twice; leave out one of them")
    found = [(path, case) for path in sweeps for case in cases_of_sweep(path)]
    return _with_unique_labels([*found, *((next(iter(one.runs.values())), one) for one in cases_of_runs(runs))])


def _with_unique_labels(found: Sequence[tuple[Path, Case]]) -> list[Case]:
    """The cases; repeated labels have the names of their directories, or the paths where these are also the same."""
    labels = Counter(case.label for _, case in found)
    names = Counter(path.name for path in {path.resolve() for path, _ in found})
    cases = []
    for path, case in found:
        place = path.resolve()
        name = place.name if names[place.name] == 1 else str(place)
        cases.append(case if labels[case.label] == 1 else replace(case, label=f"{name} {case.label}"))
    return cases


def cases_of_runs(paths: Sequence[Path]) -> list[Case]:
    """The cases of these runs, in the order of their first runs.

    A case's label is the settings in which the cases differ, as in `fedit train.lr=0.001`; for one case, the method's name.

    Raises:
        UserError: not a run directory, settings of another version, or two runs have the same settings and seed.
    """
    runs: list[tuple[dict[str, Any], dict[int, Path]]] = []
    for path in paths:
        settings = _settings(path)
        seed = settings["seed"]
        case = {key: value for key, value in settings.items() if key not in _OF_THE_RUN}
        known = next((own for other, own in runs if other == case), None)
        if known is None:
            runs.append((case, known := {}))
        if seed in known:
            raise UserError(f"{path}: has the same settings and seed as {known[seed]}; leave out one of them")
        known[seed] = path
    labels = _labels([case for case, _ in runs])
    return [Case(label, dict(sorted(own.items()))) for label, (_, own) in zip(labels, runs, strict=True)]


def _settings(path: Path) -> dict[str, Any]:
    """Settings of a run by their dotted names."""
    manifest = Manifest.find(path)
    if manifest is None:
        raise UserError(f"{path}: expected the directory of a run that has begun, or of a sweep")
    try:
        experiment = manifest.settings()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    found: dict[str, Any] = {}
    for section, value in experiment.model_dump(mode="json").items():
        found |= {f"{section}.{key}": own for key, own in value.items()} if isinstance(value, Mapping) else {section: value}
    return found


def _labels(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each case: the settings that differ, except for those that are the default of the case's method."""
    if len(cases) == 1:
        return [str(cases[0]["method.name"])]
    defaults = [_defaults(case["method.name"]) for case in cases]
    keys = [
        key
        for key in dict.fromkeys(key for case in cases for key in case)
        if any(case[key] != other[key] for case in cases for other in cases if key in case and key in other)
        and any(case[key] != default.get(key) for case, default in zip(cases, defaults, strict=True) if key in case)
    ]
    return [label_of({key: case[key] for key in keys if key in case}) for case in cases]


def _defaults(method: str) -> Mapping[str, Any]:
    """The method's own settings by their dotted names."""
    found = MethodChoice(name=method).model_dump(mode="json") if method in TABLE else {}
    return {f"method.{key}": value for key, value in found.items() if key != "name"}
