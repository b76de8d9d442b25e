"""Names and layouts of a model's tensors in GGUF files, as llama.cpp reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's own converter stores models of one type."""

    name: str
    """The name of the architecture in GGUF."""
    interleaved: bool = False
    """Whether rows of the query and key projections are reordered for llama.cpp's rotary embedding of adjacent pairs."""
    norms_plus_one: bool = False
    """Whether norms are stored as their factor, where the model has this factor minus 1."""


ARCHITECTURES = {
    "gemma2": Architecture("gemma2", norms_plus_one=True),
    "gpt2": Architecture("gpt2"),
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "stablelm": Architecture("stablelm"),
}
"""By the `model_type` of transformers. Their tests compare a file's logits in transformers with the model's."""


def unsupported(config: Any) -> str | None:
    """Reason why models of this configuration are not exported to GGUF; None if they are."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        return f"models of type {kind!r} are not exported to GGUF; supported: {', '.join(ARCHITECTURES)}"
    return None


def tensor_names(config: Any) -> Callable[[str], str | None]:
    """A function that gives the name in GGUF of a module or parameter of transformers, None if it has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    name = ARCHITECTURES[config.model_type].name
    names = get_tensor_name_map(
        next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == name), config.num_hidden_layers
    )
    return lambda key: names.get_name(key, (".weight", ".bias"))


def in_rows_of_gguf(x: Tensor, name: str, config: Any) -> Tensor:
    """A weight [out, in], bias [out] or factor b [out, rank] with its rows in the order of the tensor `name` of GGUF.

    In a head, transformers rotates row i with row i + half; llama.cpp, in interleaved architectures, rows 2 i and 2 i + 1.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    found = next((count for part, count in heads.items() if f".{part}." in f"{name}."), None)
    if found is None or not ARCHITECTURES[config.model_type].interleaved:
        return x
    return x.reshape(found, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)  # [heads, half, 2, ...]
