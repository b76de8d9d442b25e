"""Conversion to PEFT's factors, for quantities that papers define on them: these do not depend on alpha / rank."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.adapter import AdapterSpec, lora_init
from fedlora.linalg.lowrank import LowRank


@dataclass(frozen=True)
class Scaled:
    """The server's factors, and each module's scale, which is part of b; see `AdapterSpec.scale`."""

    adapter: Mapping[str, LowRank]
    scales: Mapping[str, float]

    @staticmethod
    def init(spec: AdapterSpec, rank: int, seed: int) -> "Scaled":
        """LoRA's initialization."""
        return Scaled(lora_init(spec, rank, seed), spec.scales(rank))


def unscaled(adapter: Mapping[str, LowRank], scales: Mapping[str, float]) -> dict[str, LowRank]:
    """The adapter with PEFT's `lora_B` as b; gradients flow."""
    return {name: LowRank(b=part.b / scales[name], a=part.a) for name, part in adapter.items()}


def scaled(adapter: Mapping[str, LowRank], scales: Mapping[str, float]) -> dict[str, LowRank]:
    """The inverse of `unscaled`."""
    return {name: LowRank(b=part.b * scales[name], a=part.a) for name, part in adapter.items()}
