"""A wrapper that adds the task head to any method: frozen, averaged or local."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Dense, Tensors
from fedlora.messages import ClientInfo, Features, Gradient, Merged, Replies, Reply, Round, RunningMean
from fedlora.method import AnyMethod, Local, SelectiveUpload
from fedlora.methods.row import Head

_MARK = "head/"


def with_head(method: AnyMethod, rule: Head) -> AnyMethod:
    """The method, wrapped with this head rule; "method-managed": the method itself, which handles the head."""
    return method if rule == "method-managed" else HeadRule(method, rule)


@dataclass(frozen=True)
class WithHead:
    """The state of the wrapped method, and the head."""

    inner: Any
    head: Tensors


@dataclass(frozen=True)
class HeadRule:
    """Adds the task head to a method, which gets only its factors, and a spec without a head.

    frozen: the head of the loaded model, which is not sent. averaged: it is trained, and averaged with the replies'
    weights, which is exact. local: it is trained, and stays on the client.
    """

    inner: AnyMethod
    rule: Head

    @property
    def rank(self) -> int:
        """The wrapped method's rank."""
        return self.inner.rank

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

    def work(self, state: WithHead, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[WithHead, Tensors]]:
        """The wrapped method's work; its training requests also train the head, unless it is frozen."""
        received, rest = _split(download)
        head: Tensors = {**state.head, **received}
        job, answer = self.inner.work(state.inner, rest, client, rnd), None
        while True:
            try:
                request = job.send(answer)
            except StopIteration as done:
                inner, upload = done.value
                if self.rule == "averaged":
                    return WithHead(inner, {}), {**upload, **_marked(head)}
                return WithHead(inner, head), upload
            if isinstance(request, Features):
                answer = yield request
                continue
            start: Adapter = {**request.start, **_parts(head)}
            if isinstance(request, Gradient):
                slope = yield replace(request, start=start)
                answer = {name: part for name, part in slope.items() if name not in head}
                continue
            train = request.train if self.rule == "frozen" or not head else request.train | {"w"}
            trained = yield replace(request, start=start, train=train)
            head = {name: part.w for name, part in trained.items() if isinstance(part, Dense)}
            answer = {name: part for name, part in trained.items() if name not in head}

    def expected_upload(
        self, spec: AdapterSpec, upload: Tensors, template: Tensors, client: ClientInfo, rnd: Round
    ) -> Tensors:
        """The wrapped method's expected upload, with the head."""
        if not isinstance(self.inner, SelectiveUpload):
            return template
        (_, rest), (head, alike) = _split(upload), _split(template)
        return {**self.inner.expected_upload(_headless(spec), rest, alike, client, rnd), **_marked(head)}

    def merge(self, server: WithHead, replies: Replies, rnd: Round) -> Merged[WithHead]:
        """The wrapped method's merge, and the mean of the heads; the replies are read once, so they can be streamed."""
        heads = RunningMean()

        def bare() -> Iterator[Reply]:
            for reply in replies:
                head, rest = _split(reply.upload)
                heads.add(reply.weight, head, reply.client.id)
                yield replace(reply, upload=rest)

        merged = self.inner.merge(server.inner, Replies(bare()), rnd)
        return Merged(WithHead(merged.server, heads.mean()), merged.base_update, merged.notes)


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
