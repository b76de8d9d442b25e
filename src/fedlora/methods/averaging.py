"""Factor averaging: four published methods and a baseline, which differ in the factors they share and train per round."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, pick, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit
from fedlora.ranges import PositiveInt, checked

_ALL = frozenset("ba")


@dataclass(frozen=True)
@checked
class FactorAveraging(Method[Tensors, Tensors, Mean]):
    """Weighted means of b [out, rank] and of a [rank, in], averaged separately.

    `shared` names the factors that are sent; the others stay on the client, all initialized from the run's common seed.
    `schedule` lists the factors trained in rounds 0, 1, ..., and repeats. Only factors both shared and trained are
    uploaded.

    - shared "ba", schedule "ba" is FedIT (Zhang et al. 2024, arXiv:2305.05644): inexact; the error is the covariance of
      the factors, the difference between the mean of the products and the product of the means.
    - shared "b", schedule "b" is FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): exact, as a is frozen and common.
    - shared "ba", schedule "b", "a" is RoLoRA (Chen et al. 2025, arXiv:2502.01755): exact, as one factor is common in
      each round. b is trained first, since the gradient of a is zero while b = 0. The trained factor follows from the
      index of the server's round, and both factors are downloaded, since a client may have missed rounds.
    - shared "a", schedule "ba" is FedSA-LoRA (Guo et al. 2025, arXiv:2410.01463): b stays personal; there is no global
      model.
    - shared "", schedule "ba": no factors are sent, and every client trains alone.
    """

    rank: PositiveInt = 8
    shared: str = "ba"
    schedule: tuple[str, ...] = ("ba",)

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """The shared factors."""
        return pick(pack(lora_init(spec, self.rank, seed)), self.shared)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Tensors:
        """The factors that are not shared."""
        kept = _ALL - set(self.shared)
        return pick(pack(lora_init(spec, self.rank, seed)), kept) if kept else {}

    def view(self, state: Tensors, download: Tensors, client: ClientInfo) -> Adapter:
        """The adapter of personal and shared factors."""
        return unpack({**state, **download}, LowRank)

    def work(self, state: Tensors, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Tensors, Upload]]:
        """Trains this round's factors; keeps the personal ones, uploads the shared ones."""
        train = set(self.schedule[rnd.index % len(self.schedule)])
        trained = pack((yield from fit(self.view(state, download, client), train)))
        return {**state, **pick(trained, train - set(self.shared))}, Upload(pick(trained, train & set(self.shared)))

    def merge(self, server: Tensors, collected: Mean, rnd: Round) -> Merged[Tensors]:
        """The weighted mean of the uploaded factors; the others stay unchanged."""
        return Merged({**server, **collected.tensors()})

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank] | None:
        """The change of the product; None if a factor of it is personal."""
        common = not (_ALL - set(self.shared)) & set("".join(self.schedule))
        return super().update(known, upload) if common else None
