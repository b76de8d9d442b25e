"""Export of adapters as GGUF files, which llama.cpp applies to a model."""

from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.exporting.gguf_layout import ARCHITECTURES, in_rows_of_gguf, tensor_names, unsupported
from fedlora.exporting.one_rank import at_one_rank, unfit_for_one_rank
from fedlora.models.adapted import AdaptedModel


def unfit_for_gguf_adapter(adapter: Adapter, adapted: AdaptedModel) -> str | None:
    """Reason why llama.cpp cannot apply the adapter to this model; None if it can."""
    config: Any = adapted.model.config
    if reason := unfit_for_one_rank(adapter, adapted) or unsupported(config):
        return reason
    names = tensor_names(config)
    if unnamed := [name for name in adapter if names(name) is None]:
        return f"llama.cpp has no tensor for {unnamed[0]} in models of type {config.model_type!r}"
    if config.tie_word_embeddings and (tied := [name for name in adapter if names(name) in ("output", "token_embd")]):
        return f"{tied[0]} shares its weight with another module, and GGUF has one tensor for both; export a merged model"
    return None


def to_gguf_adapter(adapter: Adapter, file: Path, adapted: AdaptedModel) -> None:
    """Writes the adapter in fp32 as a LoRA file of llama.cpp. It must not be `unfit_for_gguf_adapter`.

    llama.cpp scales the product of a tensor's factors by alpha / rank, which is 1 here.
    """
    from gguf import GGUFWriter

    config: Any = adapted.model.config
    names, (factors, rank) = tensor_names(config), at_one_rank(adapter)
    writer = GGUFWriter(file, ARCHITECTURES[config.model_type].name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for module, part in factors.items():
        name = names(module)
        assert name is not None
        writer.add_tensor(f"{name}.weight.lora_a", part.a.float().contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", in_rows_of_gguf(part.b, name, config).float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
