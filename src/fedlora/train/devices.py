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
from fedlora.messages import ClientInfo, FitRequest, Gradient, LabelledFeatures, Round, Score
from fedlora.tasks.classification import Encoded
from fedlora.train.local import LocalTrainer


class TrainerProcess:
    """A trainer in a separate process, which ends when this object or this process does."""

    def __init__(self, name: str, make: Callable[..., LocalTrainer], *arguments: Any) -> None:
        """Starts the process, which calls `make(*arguments)`; all of these must be picklable. Does not wait."""
        self._name = name
        context = get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_help, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, call: str, *arguments: Any) -> None:
        """Starts a call of the trainer's method; each call must be followed by `answer`.

        Raises:
            RunStopped: the process has ended.
        """
        try:
            self._line.send_bytes(_pickled((call, arguments)))
        except OSError as error:
            raise self._ended() from error

    def answer(self) -> Any:
        """The result of the call; an exception of the call is raised again.

        Raises:
            RunStopped: the process has ended.
        """
        try:
            found, error = pickle.loads(self._line.recv_bytes())
        except (EOFError, OSError) as ended:
            raise self._ended() from ended
        if error is not None:
            raise error
        return found

    def _ended(self) -> RunStopped:
        self._process.join(1)
        return RunStopped(f"the process for {self._name} has ended with exit code {self._process.exitcode}")


class MultiDeviceTrainer:
    """One trainer per device: one in this process, the others in their own. Placement of clients affects only rounding."""

    def __init__(self, here: LocalTrainer, helpers: Sequence[TrainerProcess]) -> None:
        self._here, self._helpers = here, helpers

    @property
    def clients_per_step(self) -> int:
        """Clients per step, summed over all devices."""
        return self._here.clients_per_step * (1 + len(self._helpers))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self._here.tokens

    @property
    def test(self) -> Encoded:
        """The global test set."""
        return self._here.test

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> list[tuple[Adapter, Mapping[str, float]]]:
        """As `LocalTrainer.fit`."""
        return self._shared("fit", asked, [self._here.steps(one) for one in asked], rnd)

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> list[Score | None]:
        """As `LocalTrainer.scores`."""
        return self._shared("scores", asked, [len(self._here.held_out[client.id]) for client, _ in asked])

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """As `LocalTrainer.gradient`."""
        return self._here.gradient(client, request)

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """As `LocalTrainer.features`."""
        return self._here.features(client)

    def evaluate(self, adapter: Adapter) -> Score:
        """As `LocalTrainer.evaluate`."""
        return self._here.evaluate(adapter)

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Changes the base on every device."""
        for helper in self._helpers:
            helper.ask("merge_into_base", change)
        self._with_answers(lambda: self._here.merge_into_base(change))

    def _shared(self, call: str, asked: Sequence[Any], works: Sequence[int], *more: Any) -> list[Any]:
        """Distributes the requests over the devices, and returns the results in the order of `asked`."""
        parts = shares(works, 1 + len(self._helpers))
        for helper, part in zip(self._helpers, parts[1:], strict=True):
            helper.ask(call, [asked[i] for i in part], *more)
        state, answers = self._with_answers(lambda: getattr(self._here, call)([asked[i] for i in parts[0]], *more))
        found = {i: x for part, own in zip(parts, [state, *answers], strict=True) for i, x in zip(part, own, strict=True)}
        return [found[i] for i in range(len(asked))]

    def _with_answers(self, here: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """The results of the call here and of all other processes. All are awaited, even if one has failed."""
        found: list[Any] = []
        failed: list[Exception] = []
        for call in (here, *(helper.answer for helper in self._helpers)):
            try:
                found.append(call())
            except Exception as error:  # raised below
                failed.append(error)
        if failed:
            raise failed[0]
        return found[0], found[1:]


def shares(works: Sequence[int], devices: int) -> list[list[int]]:
    """Indices of the jobs for each device, balanced by assigning the longest job first, to the least loaded device."""
    parts: list[list[int]] = [[] for _ in range(devices)]
    totals = [0] * devices
    for i in sorted(range(len(works)), key=lambda i: -works[i]):
        least = totals.index(min(totals))
        parts[least].append(i)
        totals[least] += works[i]
    return [sorted(part) for part in parts]


def _help(line: Connection, make: Callable[..., LocalTrainer], arguments: tuple[Any, ...]) -> None:
    """Executes calls until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process, whose end ends this one
    trainer = make(*arguments)
    while True:
        try:
            call, given = pickle.loads(line.recv_bytes())
        except EOFError:
            return
        try:
            answer = _pickled((getattr(trainer, call)(*given), None))
        except Exception as error:  # handled by the caller
            answer = _pickled((None, error))
        line.send_bytes(answer)


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
