"""Export of adapters for servers of many adapters, such as vLLM and LoRAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Adapter
from fedlora.exporting.one_rank import at_one_rank
from fedlora.exporting.write import save_peft
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel
from fedlora.models.targets import linear_size


def to_serving(
    adapter: Adapter,
    folder: Path,
    dropout: float,
    base: str,
    adapted: AdaptedModel,
    labels: Sequence[str],
    tokenizer: Any,
    peft_type: str | None,
) -> None:
    """Writes a PEFT folder as `to_peft`, with lora_alpha = r for all modules, and without patterns.

    vLLM takes one scale from the configuration and ignores patterns; LoRAX ignores all modules of a name if one of them has
    no factors. So all modules of the targets' names have factors, of zeros where the adapter has none. The adapter must not
    be `unfit_for_one_rank`.
    """
    from peft import LoraConfig  # takes a second to import

    factors, rank = at_one_rank(adapter)
    names = {_last(name) for name in factors}
    tensors: dict[str, Tensor] = {}
    for name, module in adapted.model.named_modules():
        if _last(name) in names and (size := adapted.spec.modules.get(name) or linear_size(module)):
            part = factors.get(name) or _zero(*size, rank)
            tensors |= {f"{name}.lora_A.weight": part.a, f"{name}.lora_B.weight": part.b}
    config = LoraConfig(
        task_type=peft_type,
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=dropout,
        target_modules=sorted(names),
        fan_in_fan_out=adapted.transposed,
    )
    save_peft(config, tensors, folder, labels, tokenizer)


def _zero(out: int, in_: int, rank: int) -> LowRank:
    return LowRank(b=torch.zeros(out, rank), a=torch.zeros(rank, in_))


def _last(name: str) -> str:
    return name.rpartition(".")[2]
