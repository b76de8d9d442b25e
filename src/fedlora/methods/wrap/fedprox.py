"""FedProx: training with a penalty on the distance from its start."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Scaling, Tensors, pack, units
from fedlora.messages import ClientInfo, Fit, Round, Upload
from fedlora.method import ClientRound, Local
from fedlora.methods.wrap.wrapper import Request, Wrapper, relay
from fedlora.ranges import NonNegativeFloat, checked


@dataclass(frozen=True)
class Scaled:
    """A wrapped method's client state, and the scaling between PEFT's factors and ours."""

    inner: Any
    scaling: Scaling


@dataclass(frozen=True)
@checked
class FedProx(Wrapper):
    """Adds mu / 2 |x - x_0|^2 to the loss of each training for an upload, x_0 its start, over all trained tensors.

    That includes the task head, if it is trained; frozen extra factors are excluded. Factors are PEFT's, so that mu does
    not depend on alpha. The penalty is one on the factors, not on their product. With mu = 0 nothing changes.

    Source: Li et al. 2020, arXiv:1812.06127.
    """

    mu: NonNegativeFloat = 0.01
    """Weight of the penalty on the distance from the start of the training; 0: none."""

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Scaled:
        """The wrapped method's state, with the model's scaling."""
        return Scaled(self.inner.init_client(spec, client, seed), spec.scaling)

    def view(self, state: Scaled, download: Tensors, client: ClientInfo) -> Adapter:
        """The wrapped method's."""
        return self.inner.view(state.inner, download, client)

    def work(self, state: Scaled, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Scaled, Upload]]:
        """The wrapped method's work, with the penalty in each training for an upload."""

        def ask(request: Request) -> Request:
            if not isinstance(request, Fit) or request.role != "upload" or not self.mu:
                return request
            penalty = partial(proximal, self.mu, trained(request), units(request.start, state.scaling))
            return replace(request, penalties=(*request.penalties, penalty))

        job = self.inner.work(state.inner, download, client, rnd)
        inner, upload = yield from relay(job, ask, lambda _, answer: answer)
        return replace(state, inner=inner), upload

    def inside(self, known: ClientRound) -> ClientRound:
        """The client's round without the scaling."""
        return replace(known, initial=known.initial.inner)


def trained(request: Fit) -> dict[str, Tensor]:
    """The tensors that the request trains, at its start."""
    return {key: x for key, x in pack(request.start).items() if key.rpartition(".")[2] in request.train}


def proximal(mu: float, start: Tensors, units: Mapping[str, float], live: Tensors) -> Tensor:
    """mu / 2 times the squared distance of the current tensors from the start, in PEFT's units."""
    terms = [((live[key] - x.to(live[key])) / units[key]).square().sum() for key, x in start.items()]
    return mu / 2 * sum(terms[1:], terms[0])
