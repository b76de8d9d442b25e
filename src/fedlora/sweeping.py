"""Python interface to sweeps: `sweep`."""

import gc
import signal
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedlora.api import finish_run
from fedlora.config.sweep import Search, Sweep
from fedlora.errors import RunStopped, UserError
from fedlora.report.sweep_progress import SweepProgress, shown_sweep
from fedlora.reuse import Reuse
from fedlora.rounds import durable
from fedlora.rounds.early_stopping import until_best
from fedlora.rounds.progress import NullProgress
from fedlora.rounds.row import RoundRow
from fedlora.runs.folder import RunFolder
from fedlora.runs.result import Result
from fedlora.runs.start import opened, resolve_settings
from fedlora.runs.sweep_folder import SweepFolder, SweepResult, cases_of_sweep
from fedlora.runs.sweep_plan import Outcome, PlannedRun, SweepPlan, check_metrics
from fedlora.sweep_workers import Next, check_devices, on_devices

_TRACEBACK = "traceback.txt"
_LOCK_SECONDS = 10.0  # the processes of a killed sweep end a moment later


def sweep(
    source: str | Path | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: bool | SweepProgress = True,
    *,
    resume: str | Path | None = None,
    overrides: Iterable[str] = (),
    devices: int = 1,
) -> SweepResult:
    """Runs all experiments of a sweep; a run that fails does not stop the others, its reason is in its case.

    Args:
        source: a sweep file (docs/sweeps.md), or its tables as a mapping.
        out: a new directory for the sweep; by default in `runs/`.
        progress: whether to show a table, if standard output is a terminal or a notebook; or an object with callbacks.
        resume: the directory of an earlier sweep, in place of `source`: complete runs are kept, failed ones run again.
        overrides: changes of the base, as for `--set`.
        devices: the number of processes, each on its own device; on the CPU they share its threads. 1: this process.

    Raises:
        UserError: the sweep or one of its experiments is invalid, or the directory cannot be used; nothing was trained.
        RunStopped: the sweep's directory cannot be written.
    """
    folder, outcomes = open_sweep(source, out, resume, overrides, devices)
    with shown_sweep(folder.plan, outcomes, progress) as callbacks:
        return run_sweep(folder, outcomes, callbacks, devices)


def open_sweep(
    source: str | Path | Mapping[str, Any] | None,
    out: str | Path | None,
    resume: str | Path | None,
    overrides: Iterable[str],
    devices: int = 1,
) -> tuple[SweepFolder, dict[str, Outcome]]:
    """Locks the directory of a new or an earlier sweep; returns it with the outcomes of the complete runs.

    A new directory is created only if the sweep is valid and there are `devices` for it.
    """
    if resume is not None:
        if source is not None or out is not None or list(overrides):
            raise UserError(
                "--resume: expected no sweep file, no --out and no --set, as a sweep keeps its settings and its directory"
            )
        folder, outcomes = SweepFolder.open(Path(resume))
        try:
            check_devices([run.experiment for run in folder.plan.ready({})], devices)
        except UserError:
            folder.release()
            raise
        return folder, outcomes
    sweep = read_sweep(source, overrides)
    check_devices([run.experiment for run in SweepPlan(sweep).ready({})], devices)
    path = Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-sweep") if out is None else Path(out)
    return SweepFolder.create(path, sweep), {}


def read_sweep(source: str | Path | Mapping[str, Any] | None, overrides: Iterable[str]) -> Sweep:
    """The sweep in a file or a table; see `Sweep.load`."""
    if source is None:
        raise UserError("expected a sweep file or --resume SWEEP_DIR, found neither")
    sweep = Sweep.load(source, list(overrides))
    check_metrics(sweep)
    return sweep


def run_sweep(
    folder: SweepFolder, outcomes: Mapping[str, Outcome], progress: SweepProgress, devices: int = 1
) -> SweepResult:
    """Runs what the sweep lacks, and releases its directory."""
    try:
        _run_all(folder, dict(outcomes), progress, devices)
        return SweepResult(folder.path, cases_of_sweep(folder.path))
    finally:
        folder.release()


def _run_all(folder: SweepFolder, outcomes: dict[str, Outcome], progress: SweepProgress, devices: int) -> None:
    running: set[str] = set()

    def next_run() -> tuple[PlannedRun, Path] | None:
        run = next((one for one in folder.plan.ready(outcomes) if one.name not in running), None)
        if run is None:
            return None
        running.add(run.name)
        return run, folder.run(run.name)

    work = _in_this_process if devices == 1 else on_devices(devices, execute)
    for run, outcome in work(next_run, folder.plan.sweep.search, progress):
        running.discard(run.name)
        outcomes[run.name] = outcome
        folder.save(outcomes)
        progress.run_ended(run, outcome)


def _in_this_process(
    next_run: Next, search: Search | None, progress: SweepProgress
) -> Iterator[tuple[PlannedRun, Outcome]]:
    reuse, ignored = Reuse(), signal.getsignal(signal.SIGINT)
    while found := next_run():
        run, path = found
        outcome = execute(run, path, search, progress, reuse)
        if outcome.failed is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN is not ignored:
            raise KeyboardInterrupt  # compiled code may raise another error when it is interrupted
        yield run, outcome


def execute(run: PlannedRun, path: Path, search: Search | None, progress: SweepProgress, reuse: Reuse) -> Outcome:
    """Begins or resumes the run in its directory; returns its outcome, also if it fails."""
    threads = torch.get_num_threads()
    try:
        (path / _TRACEBACK).unlink(missing_ok=True)
        result = _finished(run, path, _RunProgress(run, progress), reuse)
        return Outcome() if search is None else _measured(result, search.metric)
    except (UserError, RunStopped) as error:
        return Outcome(failed=str(error))
    except Exception as error:  # a programming error, or an error of a library, must not stop the other runs
        durable.folder(path)
        durable.replace(path / _TRACEBACK, traceback.format_exc().encode(), mode=0o600)  # it may quote data
        return Outcome(failed=f"{type(error).__name__}; see runs/{path.name}/{_TRACEBACK} in the sweep directory")
    finally:
        torch.set_num_threads(threads)  # a run with several processes on the CPU takes fewer
        gc.collect()  # models are part of reference cycles, and the next run needs their memory


def _finished(run: PlannedRun, path: Path, progress: "_RunProgress", reuse: Reuse) -> Result:
    if (path / "experiment.toml").exists():
        with opened(path, _LOCK_SECONDS) as (folder, experiment):
            return finish_run(experiment, folder, progress, None, reuse)
    folder = RunFolder.create(path, _LOCK_SECONDS)
    try:
        return finish_run(resolve_settings(run.experiment), folder, progress, None, reuse)
    finally:
        folder.release()


def _measured(result: Result, metric: str | None) -> Outcome:
    """The metric of the result, by default the mean of the task's main one.

    It is that of the last evaluated round, or of the best one with `evaluate.stop_after`.
    """
    row = next((row for row in reversed(until_best(result.rows)) if row.clients), None)
    if row is None or not row.clients:
        return Outcome(
            failed="the search needs scores on held-out examples, and no client has any; raise clients.held_out or lower "
            "clients.count"
        )
    metric = metric or f"clients.{next(iter(row.clients))}.mean"
    _, name, statistic = metric.split(".")
    if name not in row.clients:
        known = ", ".join(f"clients.{one}.{statistic}" for one in row.clients)
        return Outcome(failed=f"search.metric = {metric!r}: no such metric; available: {known}")
    return Outcome(float(getattr(row.clients[name], statistic)), metric)


class _RunProgress(NullProgress):
    """Callbacks of one run, passed on with the run."""

    def __init__(self, run: PlannedRun, progress: SweepProgress) -> None:
        self._run, self._progress = run, progress

    def round_ended(self, row: RoundRow) -> None:
        """Passes the row on."""
        self._progress.round_ended(self._run, row)
