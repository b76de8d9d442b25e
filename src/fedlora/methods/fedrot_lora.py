"""FedRot-LoRA: each client rotates its factors toward the downloaded ones, so that averaging cancels less."""

from dataclasses import dataclass
from typing import Literal

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.subspace import Side, align
from fedlora.messages import ClientInfo, Merged, Replies, Round, RunningMean
from fedlora.method import Local, fit
from fedlora.methods.ideal import MeanUpdate
from fedlora.ranges import PositiveInt, UnitInterval, checked


@dataclass(frozen=True)
@checked
class FedRotLoRA:
    """FedIT, but client k uploads (b_k q, q^T a_k), the same product, with the orthogonal q nearest to the download.

    `strength` (the paper's lambda, in [0, 1]) is 0 for no rotation, which is FedIT, and 1 for the rotation by which the
    factor is nearest to the downloaded one. `align` selects that factor: "alternate" is a in odd and b in even rounds,
    counted from 0 by the server; "a" and "b" are always the same one. Round 0 has no rotation, as the download is still
    random. With `proper` False q may also be a reflection; this, with strength 1, is the released code's default. The
    default strength is not 1/2, at which a rotation by 180 degrees has no unique midpoint.

    Source: Zhang et al. 2026, arXiv:2602.23638.
    """

    rank: PositiveInt = 8
    strength: UnitInterval = 0.6
    """The strength of the rotation; 0: none, which is FedIT."""
    align: Literal["alternate", "a", "b"] = "alternate"
    """The factor that is aligned with the download: a in odd and b in even rounds (alternate), or always the same one."""
    proper: bool = True
    """Whether reflections are excluded."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """Factors with zero update."""
        return pack(lora_init(spec, self.rank, seed))

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> None:
        """Stateless."""

    def send(self, server: Tensors, client: ClientInfo, rnd: Round) -> Tensors:
        """The mean factors, which are also the reference."""
        return server

    def view(self, state: None, download: Tensors, client: ClientInfo) -> Adapter:
        """Downloaded adapter."""
        return unpack(download, LowRank)

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Tensors]]:
        """Trains, rotates and uploads both factors."""
        reference = unpack(download, LowRank)
        trained = yield from fit(reference)
        if rnd.index == 0:
            return state, pack(trained)
        side = self._side(rnd)
        turned = {
            n: align(f, reference[n], side, self.strength, self.proper) for n, f in unpack(pack(trained), LowRank).items()
        }
        return state, pack(turned)

    def merge(self, server: Tensors, replies: Replies, rnd: Round) -> Merged[Tensors]:
        """The mean factors."""
        means, ideal = RunningMean(), MeanUpdate()
        for reply in replies:
            means.add(reply.weight, reply.upload, reply.client.id)
            ideal = ideal.add(reply.weight, unpack(reply.upload, LowRank))
        mean = means.mean()
        return Merged(mean, notes={"aggregation_error": ideal.error(unpack(mean, LowRank))})

    def _side(self, rnd: Round) -> Side:
        if self.align == "alternate":
            return "a" if rnd.index % 2 else "b"
        return self.align
