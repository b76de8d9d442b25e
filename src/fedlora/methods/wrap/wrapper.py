"""Wrappers: methods around a method, with the same interface."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Features, Fit, Gradient, Merged, Reply, Round, Upload
from fedlora.method import AnyMethod, ClientRound, Local, Method

Request = Fit | Gradient | Features


@dataclass(frozen=True)
class Wrapper(Method[Any, Any, Any]):
    """A method that does all that `inner` does; subclasses override what they change.

    A subclass with a client state of its own overrides `inside`.
    """

    inner: AnyMethod

    def inside(self, known: ClientRound) -> ClientRound:
        """The client's round as the wrapped method knows it."""
        return known

    @property
    def rank(self) -> int:  # type: ignore[override]
        """The wrapped method's."""
        return self.inner.rank

    @property
    def trains_whole_model(self) -> bool:
        """The wrapped method's."""
        return self.inner.trains_whole_model

    def init_server(self, spec: AdapterSpec, seed: int) -> Any:
        """The wrapped method's."""
        return self.inner.init_server(spec, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Any:
        """The wrapped method's."""
        return self.inner.init_client(spec, client, seed)

    def send(self, server: Any, client: ClientInfo, rnd: Round) -> Tensors:
        """The wrapped method's."""
        return self.inner.send(server, client, rnd)

    def view(self, state: Any, download: Tensors, client: ClientInfo) -> Adapter:
        """The wrapped method's."""
        return self.inner.view(state, download, client)

    def work(self, state: Any, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Any, Upload]]:
        """The wrapped method's."""
        return self.inner.work(state, download, client, rnd)

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """The wrapped method's."""
        return self.inner.expected_upload(self.inside(known), upload, template)

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """The wrapped method's."""
        return self.inner.expand(self.inside(known), upload)

    @property
    def collects_mean(self) -> bool:
        """The wrapped method's."""
        return self.inner.collects_mean

    def collect(self, server: Any, collected: Any, reply: Reply) -> Any:
        """The wrapped method's."""
        return self.inner.collect(server, collected, reply)

    def merge(self, server: Any, collected: Any, rnd: Round) -> Merged[Any]:
        """The wrapped method's."""
        return self.inner.merge(server, collected, rnd)

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank] | None:
        """The wrapped method's."""
        return self.inner.update(self.inside(known), upload)


def relay(
    job: Local[Any], ask: Callable[[Request], Request], answer: Callable[[Request, Any], Any]
) -> Generator[Request, Any, Any]:
    """Runs a wrapped method's work; returns its result.

    `ask` changes its requests, `answer` the trainer's answers to the changed requests.
    """
    found: Any = None
    while True:
        try:
            request = ask(job.send(found))
        except StopIteration as done:
            return done.value
        found = answer(request, (yield request))
