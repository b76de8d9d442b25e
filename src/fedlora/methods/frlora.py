"""FRLoRA: every round starts from the principal part of the pretrained weights, and merges its change into the base."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, pick, unpack
from fedlora.linalg.combine import stack
from fedlora.linalg.fit import truncate
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.ranges import PositiveFloat, PositiveInt, checked


@dataclass(frozen=True)
@checked
class FRLoRA(Method[Mapping[str, LowRank], None, Mean]):
    """Training starts from (b_0, a_0), the best rank-r part of the pretrained weight w, on the base minus b_0 a_0.

    The base update is b_mean a_mean - b_0 a_0, of rank 2 r, and the factors return to (b_0, a_0). Between rounds the
    update of the adapter is zero, so that a round starts from exactly the evaluated model. After t rounds the rank of
    the base's change is at most (t + 1) r. The mean of the factors is inexact, and its error persists in the base.

    The paper trains both factors; with `train_a` False, as in the released code, only b is trained and sent, which
    makes the merge exact. The server computes and sends (b_0, a_0), as singular vectors differ in sign between
    machines. With w = u s vt and c = `scale_in_init`, b_0 = u (c s)^1/2 and a_0 = (s / c)^1/2 vt. In the released code
    c is the scale of the model's LoRA layers, which gives PEFT's "pissa" factors; in the paper it is 1. The product is
    the same.

    The code weighs clients equally (`method.weights` "uniform"). `train.weight_decay` should be 0, as it would shrink
    the pretrained weights.

    Source: Yan et al. 2025, ICLR, openreview e0rQRMUhs7, Algorithm 1.
    """

    rank: PositiveInt = 8
    train_a: bool = True
    """Whether a is trained, too; if false, only b is trained and sent, and the aggregate is exact."""
    scale_in_init: PositiveFloat = 1.0
    """The initial b is multiplied by the square root of this value, and a divided by it; the product is unchanged."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Mapping[str, LowRank]:
        """The principal parts: b_0 [out, rank], a_0 [rank, in] of each module.

        Raises:
            ValueError: the spec cannot read the pretrained weights.
        """
        if spec.weight is None:
            raise ValueError("FRLoRA starts from the pretrained weights, and this spec has no `weight` to read them with")
        principal: dict[str, LowRank] = {}
        for name in spec.modules:
            part = truncate(spec.weight(name), spec.rank(name, self.rank), "balanced")
            b, a = part.b * self.scale_in_init**0.5, part.a / self.scale_in_init**0.5
            principal[name] = LowRank(b=b.to(spec.dtype), a=a.to(spec.dtype))
        return principal

    def send(self, server: Mapping[str, LowRank], client: ClientInfo, rnd: Round) -> Tensors:
        """The initial factors, the same in each round; the round loop sends the base update."""
        return pack(server)

    def view(self, state: None, download: Tensors, client: ClientInfo) -> Adapter:
        """A zero update: all changes are in the base."""
        return {name: LowRank(b=torch.zeros_like(part.b), a=part.a) for name, part in unpack(download, LowRank).items()}

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Upload]]:
        """Trains the principal part, with its negative as frozen extra factors, and uploads the trained factors."""
        train = "ba" if self.train_a else "b"
        start = unpack(download, LowRank)
        trained = yield from fit(start, train, frozen_extra=_negative(start))
        return state, Upload(pick(pack(trained), train))

    def merge(self, server: Mapping[str, LowRank], collected: Mean, rnd: Round) -> Merged[Mapping[str, LowRank]]:
        """The change of the product of the mean factors, as a base update."""
        mean = unpack({**pack(server), **collected.tensors()}, LowRank)
        return Merged(server, {name: self._change(server[name], part) for name, part in mean.items()})

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The change of the product since the start of training."""
        return changes(unpack({**known.download, **upload.values}, LowRank), unpack(known.download, LowRank))

    def _change(self, before: LowRank, after: LowRank) -> LowRank:
        if not self.train_a:
            return LowRank(b=after.b - before.b, a=before.a)
        return stack([(1.0, after), (-1.0, before)])


def _negative(adapter: Mapping[str, LowRank]) -> dict[str, LowRank]:
    return {name: LowRank(b=-part.b, a=part.a) for name, part in adapter.items()}
