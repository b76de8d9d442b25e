"""LA-LoRA: the local steps alternate between b and a, and gradients are smoothed."""

from dataclasses import dataclass

from fedlora.adapter import AdapterSpec, Tensors, lora_init, pack
from fedlora.messages import ClientInfo, Fit, Mean, Merged, Round, Trained, Upload
from fedlora.method import Local, Method
from fedlora.ranges import PositiveFloat, PositiveInt, checked


@dataclass(frozen=True)
@checked
class LALoRA(Method[Tensors, None, Mean]):
    """Each client's odd steps train b [out, rank], and its even steps a [rank, in]; the server averages both, as FedIT.

    A trained head is trained in every step. b comes first, since the gradient of a is zero while b = 0. If training is
    private, each step adds noise to one factor only, but a round adds it to both. The filter is linear and applies after
    the noise, so that it costs no privacy; it assumes that neighbouring features are related.

    Source: Liu et al. 2026, arXiv:2602.19926. The released code trains a first, has another filter, and clips gradients of
    batches with a clip that depends on the data, which is no differential privacy; here `privacy.unit` is.
    """

    rank: PositiveInt = 8
    filter: bool = True
    """Whether the gradients of b along out, and of a along in, are smoothed by (1, 4, 6, 4, 1) / 16 before each step."""
    b_rate: PositiveFloat = 2.0
    """The learning rate of b, as a multiple of `train.lr`; the released code's is 2."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """The initial factors."""
        return pack(lora_init(spec, self.rank, seed))

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Upload]]:
        """Trains b and a in turns."""
        trained: Trained = yield Fit(
            self.view(state, download, client),
            frozenset("ba"),
            rates={"b": self.b_rate},
            alternate=("b", "a"),
            gradient_filter="binomial5" if self.filter else None,
        )
        return state, Upload(pack(trained.adapter))

    def merge(self, server: Tensors, collected: Mean, rnd: Round) -> Merged[Tensors]:
        """The weighted means of b and of a."""
        return Merged(collected.tensors())
