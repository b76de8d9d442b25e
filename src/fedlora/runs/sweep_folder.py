"""Sweep directory: the sweep, its runs, and what became of them."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config.sweep import Sweep
from fedlora.errors import UserError
from fedlora.rounds import durable
from fedlora.runs.case import Case, Searched
from fedlora.runs.lock import LOCK, FolderLock
from fedlora.runs.sweep_plan import Outcome, Outcomes, SweepPlan

SWEEP, STATE, RUNS = "sweep.toml", "sweep.json", "runs"
VERSION = 1
"""Version of sweep.json; it changes if the meaning of a key changes."""
NOT_RUN = "not run yet"
"""The reason of a seed whose run has not ended."""


class SweepFolder:
    """Directory of a sweep, locked for this process.

    sweep.toml   the sweep with its base, which suffices to resume it
    runs/NAME/   a run directory for each run
    sweep.json   for each point its settings, the candidates of its search, and its runs
    """

    def __init__(self, path: Path, plan: SweepPlan, lock: FolderLock) -> None:
        self.path, self.plan, self._lock = path, plan, lock

    @classmethod
    def create(cls, path: Path, sweep: Sweep) -> "SweepFolder":
        """Creates and locks the directory of a new sweep.

        Raises:
            UserError: it has been used before, or cannot be created.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be created: {error.strerror}; choose another directory with --out") from error
        lock = FolderLock(path, 0.0)
        try:
            _require_unused(path, sweep)
            durable.replace(path / SWEEP, sweep.text.encode())
            folder = cls(path, SweepPlan(sweep), lock)
            folder.save({})
            return folder
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: Path) -> tuple["SweepFolder", dict[str, Outcome]]:
        """Locks the directory of an earlier sweep; returns it with the outcomes of its complete runs.

        Raises:
            UserError: not a sweep directory, locked by another process, or its sweep has changed.
        """
        text = _text(path)
        lock = FolderLock(path, 0.0)
        try:
            plan = SweepPlan(replace(Sweep.load(path / SWEEP), text=text))
            if not (path / STATE).exists():  # the process was killed before it was written
                return cls(path, plan, lock), {}
            state = _state(path)
            if state["sweep"] != _digest(text):
                raise UserError(
                    f"{path / SWEEP} has changed since the sweep began; a resumed sweep keeps its settings: restore the "
                    "file, or start a new sweep with --out"
                )
            return cls(path, plan, lock), _complete(state)
        except BaseException:
            lock.release()
            raise

    def release(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def run(self, name: str) -> Path:
        """Directory of a run."""
        return self.path / RUNS / name

    def save(self, outcomes: Outcomes) -> None:
        """Writes sweep.json.

        Raises:
            RunStopped: the disk is full, or the directory no longer exists.
        """
        self._lock.require()
        sweep = self.plan.sweep
        state = {
            "version": VERSION,
            "sweep": _digest(sweep.text),
            "points": [self._point(i, outcomes) for i in range(len(sweep.points))],
        }
        durable.replace(self.path / STATE, (json.dumps(state, indent=1, allow_nan=False) + "\n").encode())

    def _point(self, index: int, outcomes: Outcomes) -> dict[str, Any]:
        point, sweep = self.plan.sweep.points[index], self.plan.sweep
        runs = self.plan.runs(index, outcomes)
        found: dict[str, Any] = {"label": point.label, "settings": dict(point.settings)}
        if sweep.search is not None:
            candidates = [
                {"settings": dict(settings), "run": run.name, **_json(outcomes.get(run.name))}
                for settings, run in zip(point.candidates, self.plan.candidates[index], strict=True)
            ]
            names = [outcomes[run.name].name for run in self.plan.candidates[index] if run.name in outcomes]
            found["search"] = {
                "metric": sweep.search.metric or next(filter(None, names), None),
                "seed": sweep.search_seed,
                "candidates": candidates,
                "chosen": self.plan.chosen(index, outcomes),
            }
        found["runs"] = [{"seed": seed, "run": run.name, **_json(outcomes.get(run.name))} for seed, run in runs.items()]
        if self.plan.all_failed(index, outcomes):
            reason = "; ".join(
                f"{run.title}: {outcomes[run.name].failed or 'the metric is undefined'}"
                for run in self.plan.candidates[index]
            )
            found["failed"] = f"all candidates of the search failed: {reason}"
        return found


@dataclass(frozen=True)
class SweepResult:
    """A sweep's directory, and its cases."""

    folder: Path
    cases: list[Case]


def cases_of_sweep(path: Path) -> list[Case]:
    """A case for each point of the sweep in this directory, which need not be complete.

    Raises:
        UserError: not a sweep directory, or sweep.json is damaged or from another version.
    """
    _text(path)
    found, seeds = [], Sweep.load(path / SWEEP).seeds
    for point in _state(path)["points"]:
        runs = {one["seed"]: one for one in point["runs"]}
        done = {seed: path / RUNS / one["run"] for seed, one in runs.items() if one.get("done")}
        failed = {
            seed: point.get("failed") or runs.get(seed, {}).get("failed") or NOT_RUN for seed in seeds if seed not in done
        }
        found.append(Case(point["label"], done, _searched(point.get("search")), failed))
    return found


def _searched(search: Mapping[str, Any] | None) -> Searched | None:
    if search is None or search["chosen"] is None:
        return None
    candidates = [
        (one["settings"], math.nan if one.get("metric") is None else one["metric"]) for one in search["candidates"]
    ]
    return Searched(search["metric"], candidates, search["chosen"])


def _json(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {}
    if outcome.failed is not None:
        return {"failed": outcome.failed}
    known = outcome.metric is not None and math.isfinite(outcome.metric)
    return {"done": True, **({"metric": outcome.metric if known else None} if outcome.metric is not None else {})}


def _complete(state: Mapping[str, Any]) -> dict[str, Outcome]:
    found = {}
    for point in state["points"]:
        search = point.get("search", {})
        for one in [*point["runs"], *search.get("candidates", ())]:
            if one.get("done"):
                metric = one.get("metric", math.nan)  # an undefined one is null
                found[one["run"]] = (
                    Outcome(math.nan if metric is None else metric, search["metric"]) if search else Outcome()
                )
    return found


def _text(path: Path) -> str:
    try:
        return (path / SWEEP).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not a sweep directory: it has no readable {SWEEP}") from None


def _state(path: Path) -> dict[str, Any]:
    file = path / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = state["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is missing or damaged") from None
    if version != VERSION:
        raise UserError(f"{file}: expected version {VERSION}, found {version}; read it with the release that wrote it")
    return state


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _require_unused(path: Path, sweep: Sweep) -> None:
    if not any(entry.name != LOCK and entry.suffix != ".partial" for entry in path.iterdir()):
        return
    same = (path / SWEEP).is_file() and _text(path) == sweep.text
    what = "has this sweep already" if same else "is not empty"
    how = f"resume it with: fedlora sweep --resume {path}" if same else "choose another directory with --out"
    raise UserError(f"{path}: {what}; {how}")
