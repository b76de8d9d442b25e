"""FedSVD: clients train b on a common a, which the server reorthonormalizes without changing the product."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.adapter import AdapterSpec, Tensors, lora_init, pack, pick, unpack
from fedlora.linalg.combine import pad
from fedlora.linalg.fit import svd
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import Local, Method, fit
from fedlora.ranges import NonNegativeInt, PositiveInt, checked


@dataclass(frozen=True)
@checked
class FedSVD(Method[Mapping[str, LowRank], None, Mean]):
    """The mean b; then, after every `every` rounds, b <- u s and a <- vt of the singular value decomposition b a = u s vt.

    All clients have the same a, so the mean is exact, and the rank of b a is at most r, so nothing is truncated. As the
    rows of a are orthonormal, noise on b has the same norm in the product, and a does not distort the gradients of b
    that are clipped for privacy. b^T b is diagonal, in descending order. If the rank exceeds out or in, excess rows are
    zero.

    The initial a is LoRA's, and does not change in the first `warmup` rounds. With `every` 0 it never changes, which is
    FFA-LoRA.

    Source: Lee et al. 2025, arXiv:2505.12805.
    """

    rank: PositiveInt = 8
    every: NonNegativeInt = 1
    """The number of rounds between two orthonormalizations of a; 0: never, which is FFA-LoRA."""
    warmup: NonNegativeInt = 0
    """The number of initial rounds without orthonormalization."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Mapping[str, LowRank]:
        """Factors with zero update."""
        return lora_init(spec, self.rank, seed)

    def send(self, server: Mapping[str, LowRank], client: ClientInfo, rnd: Round) -> Tensors:
        """Both factors, since a changes, too."""
        return pack(server)

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Upload]]:
        """Trains b, and uploads it."""
        trained = yield from fit(self.view(state, download, client), train="b")
        return state, Upload(pick(pack(trained), "b"))

    def merge(self, server: Mapping[str, LowRank], collected: Mean, rnd: Round) -> Merged[Mapping[str, LowRank]]:
        """The mean b on the common a, reorthonormalized every `every` rounds."""
        adapter = unpack({**pack(server), **collected.tensors()}, LowRank)
        done = rnd.index + 1
        if self.every and done > self.warmup and done % self.every == 0:
            adapter = {name: orthonormalized(part) for name, part in adapter.items()}
        return Merged(adapter)


def orthonormalized(factor: LowRank) -> LowRank:
    """The same matrix at the same rank, with orthonormal rows in a, and orthogonal columns in b by descending norm.

    From thin QR decompositions of the factors: O((out + in) r^2). Rows of a are orthonormal even where b is zero.
    """
    u, s, vt = svd([(1.0, factor)])
    return pad(LowRank(b=(u * s[..., None, :]).to(factor.b), a=vt.to(factor.a)), factor.rank)
