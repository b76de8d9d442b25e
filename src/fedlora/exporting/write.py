"""Export of trained adapters as PEFT folders and as merged models."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlora.adapter import Adapter
from fedlora.errors import UserError
from fedlora.exporting.forms import Dtype
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel
from fedlora.models.base_weights import add_to_weight, dense_weight, set_weight
from fedlora.models.targets import shared_weights, within
from fedlora.parts.dora import Dora
from fedlora.parts.table import Part

DTYPES: Mapping[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def unfit(adapter: Adapter) -> str | None:
    """Reason why PEFT and transformers cannot represent the adapter; None if they can."""
    if any(not (part.in_head or isinstance(part, Dora)) and part.as_two_factors() is None for part in adapter.values()):
        return "input-dependent mixtures of experts cannot be represented as a PEFT adapter or a merged weight"
    return None


def unfit_for_peft(adapter: Adapter, adapted: AdaptedModel) -> str | None:
    """Reason why PEFT cannot represent the adapter of this model; None if it can."""
    if any(part.in_head and not within(name, adapted.head) for name, part in adapter.items()):
        return "all parameters of the model were trained, which a PEFT adapter cannot represent; export a merged model"
    return unfit(adapter)


def _untie(model: Any, name: str) -> None:
    """Gives a module a weight of its own, so that adding to it does not change the module that it is tied to."""
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().clone())
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def two_factors(part: Part) -> LowRank:
    """The part's matrix as two factors; the part must not be `unfit`, nor DoRA's."""
    found = part.as_two_factors()
    assert found is not None
    return found


def to_peft(
    adapter: Adapter,
    folder: Path,
    dropout: float,
    base: str,
    adapted: AdaptedModel,
    labels: Sequence[str],
    tokenizer: Any,
    peft_type: str | None,
) -> None:
    """Writes a folder for `PeftModel.from_pretrained(base_model, folder)`, for the adapter with its head.

    `adapted` describes the modules and their scaling; `base`, `dropout` and PEFT's task type are recorded. Existing files
    are replaced. PEFT has two factors, so a middle factor is multiplied into b. The adapter must not be `unfit_for_peft`.
    """
    from peft import LoraConfig  # takes a second to import

    scaling = adapted.spec.scaling
    assert scaling.alpha is not None, "the scale must be one that PEFT can compute"
    factors = {
        name: part.without_magnitudes() if isinstance(part, Dora) else two_factors(part)
        for name, part in adapter.items()
        if not part.in_head
    }
    common = Counter(part.rank for part in factors.values()).most_common(1)[0][0]
    tensors = {name: part.w for name, part in adapter.items() if part.in_head}
    magnitudes = {name: part.m for name, part in adapter.items() if isinstance(part, Dora)}
    tensors |= {f"{name}.lora_magnitude_vector": m for name, m in magnitudes.items()}
    for name, part in factors.items():
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if name in adapted.spec.embeddings
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{name}.{a}"] = part.a
        tensors[f"{name}.{b}"] = part.b / adapted.spec.scale(name, part.rank)
    config = LoraConfig(
        task_type=peft_type,
        base_model_name_or_path=base,
        inference_mode=True,
        r=common,
        lora_alpha=scaling.alpha,
        use_rslora=scaling.rslora,
        use_dora=bool(magnitudes),
        lora_dropout=dropout,
        target_modules=sorted(factors),
        rank_pattern={name: part.rank for name, part in factors.items() if part.rank != common},
        alpha_pattern={name: alpha for name, alpha in scaling.alphas.items() if name in factors},
        fan_in_fan_out=adapted.transposed,
        modules_to_save=list(adapted.head) or None,
    )
    save_peft(config, tensors, folder, labels, tokenizer)


def save_peft(config: Any, tensors: Mapping[str, Tensor], folder: Path, labels: Sequence[str], tokenizer: Any) -> None:
    """Writes a PEFT folder with this `LoraConfig` and these tensors, named as in the base model, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous().clone() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))
    file = folder / "adapter_config.json"  # peft stores the targets as a set, and writes them in arbitrary order
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(config.target_modules)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    if labels:
        (folder / "labels.json").write_text(json.dumps(list(labels), indent=1), encoding="utf-8")


def merge(adapter: Adapter, model: Any, dtype: torch.dtype) -> None:
    """Applies the adapter to the parameters of `model`, the original fp32 base. The adapter must not be `unfit`.

    Raises:
        UserError: a weight is beyond the range of `dtype`, in which the model is to be stored.
    """
    parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in adapter.items():
            if part.in_head:
                parameters[name].copy_(part.w)
                continue
            if shared_weights(model, [name]):
                _untie(model, name)
            module = model.get_submodule(name)
            if isinstance(part, Dora):
                set_weight(module, part.changed(dense_weight(module)))
            elif (product := part.product()) is not None:
                add_to_weight(module, product.float())
        for name, parameter in parameters.items():
            dense = parameter.is_floating_point() and parameter.numel()
            if dense and parameter.abs().max() > torch.finfo(dtype).max:
                raise UserError(f"{name} has a weight beyond the range of {dtype}; choose the data type bf16 or fp32")


def to_merged(adapter: Adapter, folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """Writes a folder that transformers loads without PEFT, in `dtype`. Modifies `model`, the original fp32 base.

    The adapter must not be `unfit`.

    Raises:
        UserError: see `merge`.
    """
    merge(adapter, model, dtype)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
