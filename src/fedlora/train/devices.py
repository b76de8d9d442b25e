"""Training on several devices of one machine, with a process and a model for each; requests are distributed over them."""

import io
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fedlora.adapter import Adapter
from fedlora.errors import RunStopped
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, FitRequest, Gradient, LabelledFeatures, Round, Statistics, Trained
from fedlora.tasks.task import Examples
from fedlora.train.local import LocalTrainer
from fedlora.train.record_privacy import RecordPrivacy


class TrainerProcess:
    """A trainer in a separate process, which ends when this object or this process does."""

    def __init__(self, name: str, make: Callable[..., LocalTrainer], *arguments: Any) -> None:
        """Starts the process, which calls `make(*arguments)`; all of these must be picklable. Does not wait."""
        self._name = name
        context = get_context("spawn")
        self._connection, remote_end = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve_calls, args=(remote_end, make, arguments), daemon=True)
        self._process.start()
        remote_end.close()

    def start_call(self, call: str, *arguments: Any) -> None:
        """Starts a call of the trainer's method; each call must be followed by `result`.

        Raises:
            RunStopped: the process has ended.
        """
        try:
            self._connection.send_bytes(_pickled((call, arguments)))
        except OSError as error:
            raise self._ended() from error

    def result(self) -> Any:
        """The result of the call; an exception of the call is raised again.

        Raises:
            RunStopped: the process has ended.
        """
        try:
            found, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as ended:
            raise self._ended() from ended
        if error is not None:
            raise error
        return found

    def _ended(self) -> RunStopped:
        self._process.join(1)
        return RunStopped(f"the process for {self._name} ended with exit code {self._process.exitcode}")


class MultiDeviceTrainer:
    """One trainer per device, all but one in separate processes. The distribution of clients affects rounding only."""

    def __init__(self, here: LocalTrainer, processes: Sequence[TrainerProcess]) -> None:
        self._here, self._processes = here, processes

    @property
    def clients_per_step(self) -> int:
        """Clients per step, summed over all devices."""
        return self._here.clients_per_step * (1 + len(self._processes))

    @property
    def max_tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self._here.max_tokens

    @property
    def test(self) -> Examples:
        """The global test set."""
        return self._here.test

    @property
    def privacy(self) -> Mapping[str, RecordPrivacy]:
        """As that of each device."""
        return self._here.privacy

    def steps(self, asked: FitRequest) -> int:
        """As `LocalTrainer.steps`."""
        return self._here.steps(asked)

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> list[Trained]:
        """As `LocalTrainer.fit`."""
        return self._distribute("fit", asked, [self._here.steps(one) for one in asked], rnd)

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> list[Statistics | None]:
        """As `LocalTrainer.scores`."""
        return self._distribute("scores", asked, [len(self._here.held_out[client.id]) for client, _ in asked])

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """As `LocalTrainer.gradient`."""
        return self._here.gradient(client, request)

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """As `LocalTrainer.features`."""
        return self._here.features(client)

    def evaluate(self, adapter: Adapter) -> Mapping[str, int | float]:
        """As `LocalTrainer.evaluate`."""
        return self._here.evaluate(adapter)

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Changes the base on every device."""
        for process in self._processes:
            process.start_call("merge_into_base", change)
        self._all_results(lambda: self._here.merge_into_base(change))

    def _distribute(self, call: str, asked: Sequence[Any], costs: Sequence[int], *more: Any) -> list[Any]:
        """Distributes the requests over the devices, and returns the results in the order of `asked`."""
        parts = balance(costs, 1 + len(self._processes))
        for process, part in zip(self._processes, parts[1:], strict=True):
            process.start_call(call, [asked[i] for i in part], *more)
        here, others = self._all_results(lambda: getattr(self._here, call)([asked[i] for i in parts[0]], *more))
        found = {i: x for part, own in zip(parts, [here, *others], strict=True) for i, x in zip(part, own, strict=True)}
        return [found[i] for i in range(len(asked))]

    def _all_results(self, here: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """The results of the call in this process and of all other processes, which are awaited even if one has failed."""
        found: list[Any] = []
        failed: list[Exception] = []
        for call in (here, *(process.result for process in self._processes)):
            try:
                found.append(call())
            except Exception as error:  # raised below
                failed.append(error)
        if failed:
            raise failed[0]
        return found[0], found[1:]


def balance(costs: Sequence[int], devices: int) -> list[list[int]]:
    """Indices of the jobs for each device: the longest job is assigned first, each to the least loaded device."""
    parts: list[list[int]] = [[] for _ in range(devices)]
    totals = [0] * devices
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = totals.index(min(totals))
        parts[least].append(i)
        totals[least] += costs[i]
    return [sorted(part) for part in parts]


def _serve_calls(connection: Connection, make: Callable[..., LocalTrainer], arguments: tuple[Any, ...]) -> None:
    """Executes calls until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process, whose end ends this one
    trainer = make(*arguments)
    while True:
        try:
            call, values = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            result = _pickled((getattr(trainer, call)(*values), None))
        except Exception as error:  # handled by the caller
            result = _pickled((None, error))
        connection.send_bytes(result)


class _Pickler(pickle.Pickler):
    """Pickles tensors as bytes: torch would share memory, with an open file for each tensor."""

    def reducer_override(self, x: Any) -> Any:
        if type(x) is not torch.Tensor:
            return NotImplemented
        x = x.detach().cpu().contiguous()
        return _tensor, (bytearray(x.flatten().view(torch.uint8).numpy()), x.dtype, tuple(x.shape))


def _tensor(raw: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def _pickled(x: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(x)
    return file.getvalue()
