"""A wrapper that adds the task head to any method: frozen, averaged or local."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Features, Fit, Gradient, Mean, Merged, Reply, Round, Upload
from fedlora.method import AnyMethod, ClientRound, Local
from fedlora.methods.row import Head
from fedlora.methods.wrap.wrapper import Request, Wrapper, relay
from fedlora.parts.dense import Dense

_MARK = "head/"


def with_head(method: AnyMethod, rule: Head) -> AnyMethod:
    """The method, wrapped with this head rule; "method-managed": the method itself, which handles the head."""
    return method if rule == "method-managed" else HeadRule(method, rule)


@dataclass(frozen=True)
class WithHead:
    """The state of a wrapped method, and the head, which it does not see."""

    inner: Any
    head: Tensors


@dataclass(frozen=True)
class Collected:
    """What a wrapped method has collected, and the mean of the heads."""

    inner: Any
    heads: Mean


@dataclass(frozen=True)
class HeadRule(Wrapper):
    """Adds the task head to a method, which gets only its factors, and a spec without a head.

    frozen: the head of the loaded model, which is not sent. averaged: it is trained, and averaged with the replies'
    weights, which is exact. local: it is trained, and stays on the client.
    """

    rule: Head

    def init_server(self, spec: AdapterSpec, seed: int) -> WithHead:
        """The wrapped method's state, and the head if it is averaged."""
        return WithHead(self.inner.init_server(_headless(spec), seed), spec.head if self.rule == "averaged" else {})

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> WithHead:
        """The wrapped method's state, and the head unless it is averaged."""
        return WithHead(self.inner.init_client(_headless(spec), client, seed), spec.head if self.rule != "averaged" else {})

    def send(self, server: WithHead, client: ClientInfo, rnd: Round) -> Tensors:
        """The wrapped method's download, and the head if it is averaged."""
        return {**self.inner.send(server.inner, client, rnd), **_marked(server.head)}

    def view(self, state: WithHead, download: Tensors, client: ClientInfo) -> Adapter:
        """The wrapped method's adapter with the head."""
        head, rest = _split(download)
        return {**self.inner.view(state.inner, rest, client), **_parts({**state.head, **head})}

    def work(self, state: WithHead, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[WithHead, Upload]]:
        """The wrapped method's work; each training that it requests trains the head too, unless that is frozen."""
        received, rest = _split(download)
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
            return WithHead(inner, {}), replace(upload, values={**upload.values, **_marked(head)})
        return WithHead(inner, head), upload

    def inside(self, known: ClientRound) -> ClientRound:
        """The client's round without the head."""
        _, rest = _split(known.download)
        return replace(known, spec=_headless(known.spec), download=rest, initial=known.initial.inner)

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """The upload that the wrapped method expects, with the head."""
        (_, rest), (head, expected) = _split(upload.values), _split(template.values)
        inner = replace(upload, values=rest), replace(template, values=expected)
        found = self.inner.expected_upload(self.inside(known), *inner)
        return replace(found, values={**found.values, **_marked(head)})

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """The wrapped method's expanded upload, with the head."""
        head, rest = _split(upload.values)
        return {**self.inner.expand(self.inside(known), replace(upload, values=rest)), **_marked(head)}

    def collect(self, server: WithHead, collected: Collected | Mean | None, reply: Reply) -> Collected:
        """The wrapped method's collection, and the mean of the heads."""
        so_far = collected if isinstance(collected, Collected) else Collected(None, Mean())
        head, rest = _split(reply.upload.values)
        so_far.heads.add(reply.weight, head, reply.client.id)
        bare = replace(reply, upload=replace(reply.upload, values=rest))
        return replace(so_far, inner=self.inner.collect(server.inner, so_far.inner, bare))

    def merge(self, server: WithHead, collected: Collected | Mean, rnd: Round) -> Merged[WithHead]:
        """The wrapped method's merge, and the mean of the heads."""
        if isinstance(collected, Mean):
            marked = {name: name.removeprefix(_MARK) for name in collected.names() if name.startswith(_MARK)}
            rest = {name: name for name in collected.names() if name not in marked}
            collected = Collected(collected.select(rest), collected.select(marked))
        merged = self.inner.merge(server.inner, collected.inner, rnd)
        return Merged(WithHead(merged.server, collected.heads.tensors()), merged.base_update, merged.notes)

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank] | None:
        """The wrapped method's: the head is no module."""
        _, rest = _split(upload.values)
        return self.inner.update(self.inside(known), replace(upload, values=rest))


def _headless(spec: AdapterSpec) -> AdapterSpec:
    return replace(spec, head={})


def _marked(head: Tensors) -> dict[str, Tensor]:
    return {_MARK + name: tensor for name, tensor in head.items()}


def _split(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The head's tensors, without their prefix, and the other tensors."""
    head = {name.removeprefix(_MARK): tensor for name, tensor in tensors.items() if name.startswith(_MARK)}
    return head, {name: tensor for name, tensor in tensors.items() if not name.startswith(_MARK)}


def _parts(head: Tensors) -> dict[str, Dense]:
    return {name: Dense(tensor) for name, tensor in head.items()}


def _without(adapter: Adapter, head: Tensors) -> Adapter:
    return {name: part for name, part in adapter.items() if name not in head}
