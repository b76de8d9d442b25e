"""A wrapper that adds DoRA's magnitudes to a method that trains two factors: averaged or local."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Features, Fit, Gradient, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local
from fedlora.methods.wrap.beside import Beside, Collected
from fedlora.methods.wrap.wrapper import Request, relay
from fedlora.parts.dora import Dora


@dataclass(frozen=True)
class WithMagnitudes:
    """The state of a wrapped method, and the magnitudes of each module, which it does not see."""

    inner: Any
    magnitudes: Tensors


@dataclass(frozen=True)
class Magnitudes(Beside):
    """Adds DoRA's magnitudes to a method, which gets only b and a, and a spec without magnitudes.

    Magnitudes are trained whenever b is. averaged: their mean has the replies' weights; they are downloaded in each round,
    and uploaded in rounds that train them. local: they stay on the client. The mean of the clients' weights is not the
    weight of the mean factors, even where the mean of b a is exact: with DoRA, no average is exact.
    """

    rule: Literal["averaged", "local"]

    prefix: ClassVar[str] = "magnitude/"

    def init_server(self, spec: AdapterSpec, seed: int) -> WithMagnitudes:
        """The wrapped method's state, and the magnitudes if they are averaged."""
        return WithMagnitudes(self.inner.init_server(_bare(spec), seed), _initial(spec) if self.rule == "averaged" else {})

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> WithMagnitudes:
        """The wrapped method's state, and the magnitudes if they are local."""
        inner = self.inner.init_client(_bare(spec), client, seed)
        return WithMagnitudes(inner, _initial(spec) if self.rule == "local" else {})

    def send(self, server: WithMagnitudes, client: ClientInfo, rnd: Round) -> Tensors:
        """The wrapped method's download, and the magnitudes if they are averaged."""
        return {**self.inner.send(server.inner, client, rnd), **self.marked(server.magnitudes)}

    def view(self, state: WithMagnitudes, download: Tensors, client: ClientInfo) -> Adapter:
        """The wrapped method's adapter with the magnitudes."""
        received, rest = self.split(download)
        return with_magnitudes(self.inner.view(state.inner, rest, client), {**state.magnitudes, **received})

    def work(
        self, state: WithMagnitudes, download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[WithMagnitudes, Upload]]:
        """The wrapped method's work; each training of b that it requests trains the magnitudes too."""
        received, rest = self.split(download)
        magnitudes, trained = {**state.magnitudes, **received}, False

        def ask(request: Request) -> Request:
            nonlocal trained
            if isinstance(request, Features):
                return request
            request = replace(request, start=with_magnitudes(request.start, magnitudes))
            if not isinstance(request, Fit) or "b" not in request.train:
                return request
            trained = True
            return replace(request, train=request.train | {"m"})

        def answer(request: Request, found: Any) -> Any:
            if isinstance(request, Features):
                return found
            if isinstance(request, Gradient):
                return _without_magnitudes(found)
            magnitudes.update({name: part.m for name, part in found.adapter.items() if isinstance(part, Dora)})
            return replace(found, adapter=_without_magnitudes(found.adapter))

        inner, upload = yield from relay(self.inner.work(state.inner, rest, client, rnd), ask, answer)
        if self.rule == "local":
            return WithMagnitudes(inner, magnitudes), upload
        own = self.marked(magnitudes) if trained else {}
        return WithMagnitudes(inner, {}), replace(upload, values={**upload.values, **own})

    def inside(self, known: ClientRound) -> ClientRound:
        """The client's round without the magnitudes."""
        _, rest = self.split(known.download)
        return replace(known, spec=_bare(known.spec), download=rest, initial=known.initial.inner)

    def merge(self, server: WithMagnitudes, collected: Collected | Mean, rnd: Round) -> Merged[WithMagnitudes]:
        """The wrapped method's merge, and the mean of the magnitudes; those that were not uploaded stay unchanged."""
        merged, means = self.merge_both(server, collected, rnd)
        return replace(merged, server=WithMagnitudes(merged.server, {**server.magnitudes, **means}))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank] | None:
        """None: the change of the weight is not of low rank."""
        return None


def with_magnitudes(adapter: Adapter, magnitudes: Tensors) -> Adapter:
    """The adapter with these magnitudes of its modules."""
    return {name: Dora(p.b, p.a, magnitudes[name]) if isinstance(p, LowRank) else p for name, p in adapter.items()}


def _without_magnitudes(adapter: Adapter) -> Adapter:
    return {name: part.without_magnitudes() if isinstance(part, Dora) else part for name, part in adapter.items()}


def _bare(spec: AdapterSpec) -> AdapterSpec:
    return replace(spec, magnitudes={})


def _initial(spec: AdapterSpec) -> dict[str, Tensor]:
    return {name: x.to(spec.dtype) for name, x in spec.magnitudes.items()}
