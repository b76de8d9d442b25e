"""Sweep file: experiments that differ in some settings, with several seeds and a search."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from fedlora.config.error_message import error_message
from fedlora.config.experiment import Experiment, build
from fedlora.config.reading import overridden, read_table, with_settings
from fedlora.config.sections import Section, sections
from fedlora.errors import UserError
from fedlora.paths import absolute, is_local, looks_local
from fedlora.ranges import NonNegativeInt

Settings = Mapping[str, Any]
"""Values by dotted key, as in {"train.lr": 0.001}."""


class Search(Section):
    """A search over settings of each point, by a metric on the clients' held-out examples."""

    values: dict[str, Any] = Field(default_factory=dict)
    """A list of values for each searched setting; every combination is tried."""
    metric: str | None = None
    """The metric of the last evaluated round: `clients.NAME.mean`, `clients.NAME.worst_decile` or `clients.NAME.spread`.
    If omitted, the mean of the task's main metric, such as `clients.accuracy.mean`."""
    mode: Literal["max", "min"] | None = None
    """Whether the largest or the smallest value is the best. If omitted, as the task says; for a spread the smallest."""
    seed: NonNegativeInt | None = None
    """The seed of the search. If omitted, the first of `seeds`."""


class SweepFile(Section):
    """The tables of a sweep file."""

    base: str | dict[str, Any] = Field(default_factory=dict)
    """The experiment that the points change: a file, relative to the sweep file, or a table."""
    seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0])
    """The seeds with which each point is run."""
    axes: dict[str, Any] = Field(default_factory=dict)
    """A list of values for each setting; every combination is a point."""
    points: list[dict[str, Any]] = Field(default_factory=list)
    """Settings of single points, each with an optional `label`; each is combined with every combination of the axes."""
    search: Search = Field(default_factory=Search)
    """The search, if any."""


@dataclass(frozen=True)
class Point:
    """Settings in which a point differs from the base; for each candidate of the search, its settings."""

    label: str
    settings: Settings
    candidates: Sequence[Settings] = ()


@dataclass(frozen=True)
class Sweep:
    """A valid sweep: all of its experiments are valid."""

    base: Mapping[str, Any]
    seeds: Sequence[int]
    points: Sequence[Point]
    search: Search | None
    text: str
    """The sweep as TOML, with the base as a table and absolute paths."""

    @property
    def search_seed(self) -> int:
        """The seed of the search."""
        return self.seeds[0] if self.search is None or self.search.seed is None else self.search.seed

    def experiment(self, settings: Settings, seed: int) -> Experiment:
        """The base with these settings and this seed."""
        return build(with_settings(self.base, {**settings, "seed": seed}))

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> "Sweep":
        """The sweep in a file or a table, with overrides of the base as for `--set`.

        Raises:
            UserError: no such file, an invalid setting of the sweep or of an experiment; names file, point and key.
        """
        origin = "sweep" if isinstance(source, Mapping) else str(source)
        folder = Path() if isinstance(source, Mapping) else Path(source).parent
        try:
            file = SweepFile.model_validate(source if isinstance(source, Mapping) else read_table(Path(source)))
        except ValidationError as error:
            raise UserError(f"{origin}: {error_message(error, SweepFile)}") from None
        try:
            return _planned(file, folder, overrides)
        except ValueError as error:
            raise UserError(f"{origin}: {error}") from None
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None


def _planned(file: SweepFile, folder: Path, overrides: Sequence[str]) -> Sweep:
    base = read_table(folder / file.base) if isinstance(file.base, str) else file.base
    base = with_settings({}, _absolute(_flat(overridden(base, overrides))))
    build(base, origin="base")
    if not file.seeds or len(set(file.seeds)) < len(file.seeds):
        raise ValueError(f"seeds = {file.seeds}: expected one or more different seeds")
    axes = {key: _absolute_list(key, values) for key, values in _lists("axes", file.axes).items()}
    search = file.search if "search" in file.model_fields_set else None
    searched = _lists("search.values", file.search.values)
    if both := searched.keys() & axes.keys():
        raise ValueError(f"{min(both)} is both in axes and in search.values; remove it from one of them")
    points = [replaced for given in file.points or [{}] for replaced in _points(given, axes)]
    _check_search(search)
    candidates = _grid(searched) if searched else []
    points = _labelled([Point(one.label, one.settings, candidates) for one in points])
    tables: dict[str, Any] = {"base": base, "seeds": file.seeds}
    tables["points"] = [{"label": one.label, **one.settings} for one in points]
    if search:
        search = search.model_copy(update={"values": searched})
        tables["search"] = search.model_dump(exclude_none=True)
    sweep = Sweep(base, file.seeds, points, search, tomli_w.dumps(tables))
    for point in points:
        for candidate in point.candidates or [{}]:
            where = f"point {point.label!r}" + (f", {label_of(candidate)}" if candidate else "")
            try:
                experiment = sweep.experiment({**point.settings, **candidate}, sweep.search_seed)
            except UserError as error:
                raise UserError(f"{where}: {str(error).removeprefix('experiment: ')}") from None
            if search and (experiment.evaluate.clients == "none" or not experiment.clients.held_out):
                found, wanted = (
                    ("clients.held_out = 0", "clients.held_out = 0.2")
                    if not experiment.clients.held_out
                    else ("evaluate.clients = 'none'", "evaluate.clients = 'all'")
                )
                raise UserError(
                    f"{where}: {found}: a search needs the clients' scores on held-out examples; set {wanted}, for example"
                )
    return sweep


def _check_search(search: Search | None) -> None:
    if search is None:
        return
    if not search.values:
        raise ValueError("search.values is empty; list the values of at least one setting, as in train.lr = [0.001, 0.003]")
    if search.metric is None:
        return
    first, *rest = search.metric.split(".")
    if first == "global":
        raise ValueError(
            f"search.metric = {search.metric!r} is measured on the test set, which no longer tests settings that were "
            "chosen by it; choose one of the clients' held-out examples, as in clients.NAME.mean, or omit it for the "
            "task's main metric"
        )
    if first != "clients" or len(rest) != 2 or rest[1] not in ("mean", "worst_decile", "spread"):
        raise ValueError(
            f"search.metric = {search.metric!r}: expected clients.NAME.mean, clients.NAME.worst_decile or "
            "clients.NAME.spread"
        )


def _points(given: Mapping[str, Any], axes: Mapping[str, list[Any]]) -> Iterator[Point]:
    """The points of one entry of the list: one for each combination of the axes."""
    settings = dict(given)
    label = settings.pop("label", "")
    if not isinstance(label, str):
        raise ValueError(f"points: label = {label!r}: expected text")
    own = _absolute(_flat(settings))
    _check_keys("points", own)
    if both := own.keys() & axes.keys():
        raise ValueError(f"{min(both)} is both in axes and in a point; remove it from one of them")
    for combination in _grid(axes):
        named = [label, label_of(combination)] if label else []
        yield Point(", ".join(filter(None, named)), {**own, **combination})


def _labelled(points: Sequence[Point]) -> list[Point]:
    """The points, those without a label labelled by the settings that differ between points; all labels are different."""
    keys = dict.fromkeys(key for one in points for key in one.settings)
    differ = [
        k for k in keys if len(points) == 1 or any(one.settings.get(k) != points[0].settings.get(k) for one in points)
    ]
    named = [
        Point(
            one.label or label_of({k: one.settings[k] for k in differ if k in one.settings}) or "base",
            one.settings,
            one.candidates,
        )
        for one in points
    ]
    labels = [one.label for one in named]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"two points have the label {twice!r}; give them different settings or labels")
    return named


def label_of(settings: Settings) -> str:
    """Settings in one line, the method by its name alone, as in "fedit train.lr=0.001"."""
    return " ".join(str(value) if key == "method.name" else f"{key}={value}" for key, value in settings.items())


def _grid(values: Mapping[str, Sequence[Any]]) -> list[Settings]:
    return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


def _lists(where: str, table: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists of values in a table, by dotted key."""
    found = _flat(table)
    for key, values in found.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}.{key}: expected a list of values, found {type(values).__name__}")
        if any(values.count(value) > 1 for value in values):
            raise ValueError(f"{where}.{key} has a value twice")
    _check_keys(where, found)
    return found


def _check_keys(where: str, keys: Mapping[str, Any]) -> None:
    if "seed" in keys:
        raise ValueError(f"{where}.seed: the seeds of all points are the list `seeds`")


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an experiment by dotted key; a value that is a table, such as lora.rank_pattern, stays one."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if not isinstance(value, Mapping) or name not in (*sections(Experiment), "wrap"):
            found[name] = value
            continue
        for key, inner in value.items():
            if name == "wrap" and isinstance(inner, Mapping):
                found |= {f"wrap.{key}.{own}": one for own, one in inner.items()}
            else:
                found[f"{name}.{key}"] = inner
    if missing := next((key for key, value in found.items() if _has_none(value)), None):
        raise ValueError(
            f"{missing}: None cannot be stored, as TOML has no null; leave the setting out, as in another point"
        )
    return found


def _has_none(value: Any) -> bool:
    if isinstance(value, (Mapping, list, tuple)):
        return any(map(_has_none, value.values() if isinstance(value, Mapping) else value))
    return value is None


def _absolute(settings: Settings) -> dict[str, Any]:
    return {key: _absolute_list(key, [value])[0] for key, value in settings.items()}


def _absolute_list(key: str, values: Sequence[Any]) -> list[Any]:
    """Values of a setting, with absolute paths: a sweep may be resumed from another folder."""
    local = {"model": is_local, "data": looks_local, "data.source": looks_local, "data.test": looks_local}
    if (names_a_path := local.get(key)) is None:
        return list(values)
    return [absolute(value) if isinstance(value, str) and names_a_path(value) else value for value in values]
