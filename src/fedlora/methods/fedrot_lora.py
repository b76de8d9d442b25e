"""FedRot-LoRA: each client rotates its factors toward the downloaded ones, so that averaging cancels less."""

from dataclasses import dataclass
from typing import Literal

from fedlora.adapter import AdapterSpec, Tensors, lora_init, low_rank, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.subspace import Side, align
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import Local, Method, fit
from fedlora.ranges import PositiveInt, UnitInterval, checked


@dataclass(frozen=True)
@checked
class FedRotLoRA(Method[Tensors, None, Mean]):
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

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Upload]]:
        """Trains, rotates and uploads both factors; the downloaded mean factors are the reference."""
        reference = unpack(download, LowRank)
        trained = low_rank((yield from fit(reference)))
        if rnd.index == 0:
            return state, Upload(pack(trained))
        side = self._side(rnd)
        rotated = {n: align(part, reference[n], side, self.strength, self.proper) for n, part in trained.items()}
        return state, Upload(pack(rotated))

    def merge(self, server: Tensors, collected: Mean, rnd: Round) -> Merged[Tensors]:
        """The mean factors."""
        return Merged(collected.tensors())

    def _side(self, rnd: Round) -> Side:
        if self.align == "alternate":
            return "a" if rnd.index % 2 else "b"
        return self.align
