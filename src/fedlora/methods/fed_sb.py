"""Fed-SB: clients train a small matrix between two shared frozen factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, pick, unpack
from fedlora.linalg.fit import svd, truncate
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.subspace import frame, orthonormal
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit
from fedlora.parts.three_factor import ThreeFactor
from fedlora.randomness import generator
from fedlora.ranges import PositiveInt, checked


@dataclass(frozen=True)
@checked
class FedSB(Method[Tensors, Tensors, Mean]):
    """The mean c [rank, rank] between b with orthonormal columns and a with orthonormal rows, which never change.

    The mean is exact, and the upload is rank^2 floats per module. All updates lie in the space spanned by b and a, so
    the choice of b and a limits what can be learned. The rank is limited to min(out, in).

    In the paper b, diag(c) and a are the singular value decomposition of -lr sign(g), where g is the gradient of the
    full model summed over the pooled training data, without noise. In a federation no participant has that
    data, hence the choices of `init`:

    "weight": the leading singular vectors of the pretrained weight, and c = 0, so that training starts from the pretrained
    model. This is not the paper's choice; it is close to LoRA-XS (arXiv:2405.17604), which has the singular values in b and
    a tiny random c. It uses no data.

    "gradient": similar to the paper. In round 0 the clients train b for one epoch, from zero, on a common orthonormal
    random a; in round 1, a for one epoch, from zero, on an orthonormal basis of the mean b. Then b, diag(c) and a are
    the singular value decomposition of the second training's result, from which round 2 starts. With one step of plain
    gradient descent the two uploads would be -lr g a^T and -lr b^T g, and the result a randomized singular value
    decomposition of -lr g, exact if the rank of g is at most `rank`. The difference to the paper is the step: an epoch
    with the run's optimizer, instead of the sign of one sum. The uploads of these two rounds have rank * out and rank *
    in floats; their mean suffices, so that secure aggregation remains possible.

    "random": random b and a from the run's common seed, and c = 0.

    With "random", the download is only c, too. Otherwise the server also sends b and a, as singular vectors differ in
    sign between machines, and sends them in every round, as it does not track which clients have them.

    The paper weighs clients equally (`method.weights` "uniform").

    Source: Singhal et al. 2025, arXiv:2502.15436, and its released code.
    """

    rank: PositiveInt = 8
    init: Literal["weight", "gradient", "random"] = "weight"
    """Where b and a come from: singular vectors of the pretrained weight (weight), two initial rounds of training
    (gradient), or random (random)."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """The download of the first round.

        Raises:
            ValueError: `init` is "weight" and the spec cannot read the pretrained weights.
        """
        if self.init == "weight":
            return pack({name: _principal(spec, name, self._rank(spec, name)) for name in spec.modules})
        frames = _frames(spec, {name: self._rank(spec, name) for name in spec.modules}, seed)
        if self.init == "random":
            return pick(pack({name: _untrained(part) for name, part in frames.items()}), "c")
        return pack({name: LowRank(b=torch.zeros_like(part.b), a=part.a) for name, part in frames.items()})

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Tensors:
        """Random b and a, if `init` is "random"."""
        if self.init != "random":
            return {}
        return pack(_frames(spec, {name: self._rank(spec, name) for name in spec.modules}, seed))

    def view(self, state: Tensors, download: Tensors, client: ClientInfo) -> Adapter:
        """The three factors, or two in the first rounds of "gradient"."""
        return _adapter({**state, **download})

    def work(self, state: Tensors, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Tensors, Upload]]:
        """Trains c and uploads it; in the first rounds of "gradient", b and then a."""
        train = {0: "b", 1: "a"}.get(rnd.index, "c") if self.init == "gradient" else "c"
        trained = yield from fit(self.view(state, download, client), train, epochs=None if train == "c" else 1)
        return state, Upload(pick(pack(trained), train))

    def merge(self, server: Tensors, collected: Mean, rnd: Round) -> Merged[Tensors]:
        """The mean c; in the first rounds of "gradient", the factors for the next round."""
        mean = {**server, **collected.tensors()}
        if self.init == "gradient" and rnd.index == 0:
            return Merged(pack({name: _second(part) for name, part in unpack(mean, LowRank).items()}))
        if self.init == "gradient" and rnd.index == 1:
            return Merged(pack({name: decomposed(part) for name, part in unpack(mean, LowRank).items()}))
        return Merged(mean)

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank] | None:
        """The change of one factor between the others, which are common; None where the round's result is only a basis."""
        if self.init == "gradient" and known.round.index == 0:
            return None
        before = {**known.initial, **known.download}
        moved = {key: x - before[key] for key, x in upload.values.items()}
        parts = _adapter({**before, **moved}).items()
        return {name: part.as_two_factors() for name, part in parts if isinstance(part, LowRank | ThreeFactor)}

    def _rank(self, spec: AdapterSpec, name: str) -> int:
        return min(spec.rank(name, self.rank), *spec.modules[name])


def decomposed(factor: LowRank) -> ThreeFactor:
    """The same matrix with orthonormal columns in b, its singular values on the diagonal of c, orthonormal rows in a."""
    u, s, vt = svd([(1.0, factor)])
    return ThreeFactor(b=u.to(factor.b), c=torch.diag_embed(s).to(factor.b), a=vt.to(factor.a))


def _adapter(tensors: Tensors) -> Adapter:
    return unpack(tensors, ThreeFactor) if any(key.endswith(".c") for key in tensors) else unpack(tensors, LowRank)


def _principal(spec: AdapterSpec, name: str, rank: int) -> ThreeFactor:
    if spec.weight is None:
        raise ValueError(
            "Fed-SB with init = 'weight' starts from the pretrained weights, and this spec has no `weight` to read them "
            "with; choose 'random' or 'gradient'"
        )
    part = truncate(spec.weight(name), rank)
    return _untrained(LowRank(b=orthonormal(part.b).to(spec.dtype), a=orthonormal(part.a.mT).mT.to(spec.dtype)))


def _untrained(part: LowRank) -> ThreeFactor:
    return ThreeFactor(b=part.b, c=part.b.new_zeros(part.rank, part.rank), a=part.a)


def _frames(spec: AdapterSpec, ranks: Mapping[str, int], seed: int) -> dict[str, LowRank]:
    """Random orthonormal columns and rows, with a separate seed for each module."""
    found: dict[str, LowRank] = {}
    for name, (out, in_) in spec.modules.items():
        rng = generator(seed, "fed_sb", name)
        b, a = frame(out, ranks[name], rng), frame(in_, ranks[name], rng).mT
        found[name] = LowRank(b=b.to(spec.dtype), a=a.contiguous().to(spec.dtype))
    return found


def _second(part: LowRank) -> LowRank:
    """The start of the second of the two trainings."""
    return LowRank(b=orthonormal(part.b), a=torch.zeros_like(part.a))
