"""Full fine-tuning: clients train the weights themselves, and the server averages them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit
from fedlora.parts.weight_change import WeightChange
from fedlora.ranges import PositiveInt, checked


@dataclass(frozen=True)
@checked
class FullFineTuning(Method[Tensors, None, Mean]):
    """FedAvg of the adapted modules' own weights, as the change of each weight [out, in] from the pretrained one.

    Low-rank methods are often compared with it. It is exact, and sends out * in floats per module. `lora.targets` selects
    the modules. `rank`, alpha and the dropout of LoRA have no effect. Weight decay acts on the change, and thus pulls
    toward the pretrained weight. Exported to PEFT, the change is stored next to an identity, which is exact but large; a
    merged export is smaller.

    With `scope` "modules", biases and other modules are frozen, except for the head. With "all", the whole model is
    trained: every other parameter (embeddings, norms, biases, other weights) is trained itself, sent and averaged with the
    head, and weight decay pulls it toward 0. Clients are then trained one at a time, with `privacy.unit = "record"` one
    example at a time, and only a merged export is possible, as PEFT cannot represent all parameters. Not supported:
    quantized parameters, and a weight of an adapted module that another module shares.

    Source: McMahan et al. 2017, arXiv:1602.05629.
    """

    rank: PositiveInt = 8
    scope: Literal["modules", "all"] = "modules"
    """What is trained with the head: the weights of the adapted modules, or all parameters of the model."""

    @property
    def trains_whole_model(self) -> bool:
        """Whether the scope is all."""
        return self.scope == "all"

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """No change."""
        return pack({name: WeightChange(torch.zeros(size, dtype=spec.dtype)) for name, size in spec.modules.items()})

    def view(self, state: None, download: Tensors, client: ClientInfo) -> Adapter:
        """The mean change."""
        return unpack(download, WeightChange)

    def work(self, state: None, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[None, Upload]]:
        """Trains the change of each weight, and uploads it."""
        return state, Upload(pack((yield from fit(self.view(state, download, client), {"delta"}))))

    def merge(self, server: Tensors, collected: Mean, rnd: Round) -> Merged[Tensors]:
        """The weighted mean."""
        return Merged(collected.tensors())

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The uploaded change instead of the downloaded one."""
        moved = {key: x - known.download[key] for key, x in upload.values.items()}
        return {name: part.as_two_factors() for name, part in unpack(moved, WeightChange).items()}
