"""A wrapper that adds the task head to any method: frozen, averaged or local."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Features, Fit, Gradient, Mean, Merged, Round, Upload
from fedlora.method import AnyMethod, ClientRound, Local
from fedlora.methods.row import Head
from fedlora.methods.wrap.beside import Beside, Collected
from fedlora.methods.wrap.wrapper import Request, relay
from fedlora.parts.dense import Dense


def with_head(method: AnyMethod, rule: Head) -> AnyMethod:
    """The method, wrapped with this head rule; "method-managed": the method itself, which handles the head."""
    return method if rule == "method-managed" else HeadRule(method, rule)


@dataclass(frozen=True)
class WithHead:
    """The state of a wrapped method, and the head, which it does not see."""

    inner: Any
    head: Tensors


@dataclass(frozen=True)
class HeadRule(Beside):
    """Adds the task head to a method, which gets only its factors, and a spec without a head.

    frozen: the head of the loaded model, which is not sent. averaged: it is trained, and averaged with the replies'
    weights, which is exact. local: it is trained, and stays on the client.
    """

    rule: Head

    prefix: ClassVar[str] = "head/"

    def init_server(self, spec: AdapterSpec, seed: int) -> WithHead:
        """The wrapped method's state, and the head if it is averaged."""
        return WithHead(self.inner.init_server(_headless(spec), seed), spec.head if self.rule == "averaged" else {})

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> WithHead:
        """The wrapped method's state, and the head unless it is averaged."""
        return WithHead(self.inner.init_client(_headless(spec), client, seed), spec.head if self.rule != "averaged" else {})

    def send(self, server: WithHead, client: ClientInfo, rnd: Round) -> Tensors:
        """The wrapped method's download, and the head if it is averaged."""
        return {**self.inner.send(server.inner, client, rnd), **self.marked(server.head)}

    def view(self, state: WithHead, download: Tensors, client: ClientInfo) -> Adapter:
        """The wrapped method's adapter with the head."""
        head, rest = self.split(download)
        return {**self.inner.view(state.inner, rest, client), **_parts({**state.head, **head})}

    def work(self, state: WithHead, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[WithHead, Upload]]:
        """The wrapped method's work; each training that it requests trains the head too, unless that is frozen."""
        received, rest = self.split(download)
        head: Tensors = {**state.head, **received}

        def ask(request: Request) -> Request:
            if isinstance(request, Features):
                return request
            request = replace(request, start={**request.start, **_parts(head)})
            learns = isinstance(request, Fit) and self.rule != "frozen" and head
            return replace(request, train=request.train | {"w"}) if learns else request

        def answer(request: Request, found: Any) -> Any:
            nonlocal head
            if isinstance(request, Features):
                return found
            if isinstance(request, Gradient):
                return _without(found, head)
            head = {name: part.w for name, part in found.adapter.items() if name in head and isinstance(part, Dense)}
            return replace(found, adapter=_without(found.adapter, head))

        inner, upload = yield from relay(self.inner.work(state.inner, rest, client, rnd), ask, answer)
        if self.rule == "averaged":
            return WithHead(inner, {}), replace(upload, values={**upload.values, **self.marked(head)})
        return WithHead(inner, head), upload

    def inside(self, known: ClientRound) -> ClientRound:
        """The client's round without the head."""
        _, rest = self.split(known.download)
        return replace(known, spec=_headless(known.spec), download=rest, initial=known.initial.inner)

    def merge(self, server: WithHead, collected: Collected | Mean, rnd: Round) -> Merged[WithHead]:
        """The wrapped method's merge, and the mean of the heads."""
        merged, heads = self.merge_both(server, collected, rnd)
        return replace(merged, server=WithHead(merged.server, heads))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank] | None:
        """The wrapped method's: the head is no module."""
        _, rest = self.split(upload.values)
        return self.inner.update(self.inside(known), replace(upload, values=rest))


def _headless(spec: AdapterSpec) -> AdapterSpec:
    return replace(spec, head={})


def _parts(head: Tensors) -> dict[str, Dense]:
    return {name: Dense(tensor) for name, tensor in head.items()}


def _without(adapter: Adapter, head: Tensors) -> Adapter:
    return {name: part for name, part in adapter.items() if name not in head}
