"""Processes that share the runs of a sweep, each on its own device."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from fedlora.config.experiment import Experiment
from fedlora.config.sweep import Search
from fedlora.errors import UserError
from fedlora.report.sweep_progress import NullSweepProgress, SweepProgress
from fedlora.reuse import Reuse
from fedlora.rounds.row import RoundRow
from fedlora.runs.sweep_plan import Outcome, PlannedRun
from fedlora.train import hardware
from fedlora.watchdog import end_with_parent

Next = Callable[[], tuple[PlannedRun, Path] | None]
"""The next run and its directory; None if no run can start now."""
Execute = Callable[[PlannedRun, Path, Search | None, SweepProgress, Reuse], Outcome]


def check_devices(experiments: Sequence[Experiment], count: int) -> None:
    """Checks that each of `count` processes can have a device.

    Raises:
        UserError: fewer than one process, too few GPUs, or an experiment chooses its own devices.
    """
    if count < 1:
        raise UserError(f"devices = {count}: expected at least 1")
    if count == 1:
        return
    for train in (one.train for one in experiments):
        if ":" in train.device or train.devices != 1:
            raise UserError(
                f"devices = {count}: train.device = {train.device!r} and train.devices = {train.devices!r} choose devices "
                "themselves; set train.devices = 1 and a device without number"
            )
        if hardware.device(train.device).type == "cuda" and count > torch.cuda.device_count():
            raise UserError(f"devices = {count}: only {torch.cuda.device_count()} are available")


class Worker:
    """A process that executes one run after the other, with GPU `index` as its only one."""

    def __init__(self, index: int, threads: int, execute: Execute, search: Search | None) -> None:
        context = get_context("spawn")
        self.connection, remote_end = context.Pipe()
        self.run: PlannedRun | None = None
        self._process = context.Process(target=_serve, args=(remote_end, index, threads, execute, search), daemon=True)
        self._process.start()
        remote_end.close()

    def start(self, run: PlannedRun, path: Path) -> None:
        """Starts a run; `receive` returns its rows and at last its outcome."""
        self.run = run
        self.connection.send((run, path))

    def receive(self) -> RoundRow | Outcome:
        """The next row of the run, or its outcome, also if the process has ended."""
        try:
            found: RoundRow | Outcome = self.connection.recv()
            return found
        except (EOFError, OSError):
            self._process.join(1)
            return Outcome(failed=f"its process ended with exit code {self._process.exitcode}")

    @property
    def alive(self) -> bool:
        """Whether the process can execute another run."""
        return self._process.is_alive()

    def stop(self) -> None:
        """Ends the process; a run that has not ended can be resumed."""
        self._process.terminate()
        self._process.join()


def on_devices(
    count: int, execute: Execute
) -> Callable[[Next, Search | None, SweepProgress], Iterator[tuple[PlannedRun, Outcome]]]:
    """A function that executes the runs in `count` processes, and yields each with its outcome when it has ended."""

    def work(next_run: Next, search: Search | None, progress: SweepProgress) -> Iterator[tuple[PlannedRun, Outcome]]:
        threads = max(1, torch.get_num_threads() // count)
        workers: list[Worker | None] = [None] * count
        try:
            while True:
                for i, worker in enumerate(workers):
                    if (worker is None or worker.run is None) and (found := next_run()):
                        if worker is None or not worker.alive:
                            worker = workers[i] = Worker(i, threads, execute, search)
                        worker.start(*found)
                busy = [worker for worker in workers if worker and worker.run]
                if not busy:
                    return
                for connection in wait([worker.connection for worker in busy]):
                    worker = next(one for one in busy if one.connection is connection)
                    run, received = worker.run, worker.receive()
                    assert run is not None
                    if isinstance(received, Outcome):
                        worker.run = None
                        yield run, received
                    else:
                        progress.round_ended(run, received)
        finally:
            for worker in workers:
                if worker is not None:
                    worker.stop()

    return work


class _Sender(NullSweepProgress):
    """Sends the rows of a run to the process of the sweep."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def round_ended(self, run: PlannedRun, row: RoundRow) -> None:
        """Sends the row."""
        self._connection.send(row)


def _serve(connection: Connection, index: int, threads: int, execute: Execute, search: Search | None) -> None:
    end_with_parent()  # a run without its sweep would keep its directory locked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process, which ends this one
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    torch.set_num_threads(threads)
    reuse, progress = Reuse(), _Sender(connection)
    while True:
        try:
            run, path = connection.recv()
        except EOFError:
            return
        connection.send(execute(run, path, search, progress, reuse))
