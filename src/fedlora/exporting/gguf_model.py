"""Export of whole models as GGUF files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedlora.errors import UserError
from fedlora.exporting.gguf_layout import ARCHITECTURES, in_rows_of_gguf, tensor_names, unsupported
from fedlora.exporting.gguf_readback import check_read_back
from fedlora.exporting.gguf_tokenizer import add_tokenizer
from fedlora.models.gguf import is_gguf
from fedlora.models.loading import locate

_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}
_ALWAYS_FP32 = ("position_embd.weight",)
"""Besides vectors."""
_OF_THE_FILE = ("general.architecture", "general.file_type", "general.quantization_version")


def to_gguf_model(model: Any, file: Path, tokenizer: Any, dtype: torch.dtype, source: str) -> None:
    """Writes the model with its tokenizer as one GGUF file, with matrices in `dtype` and vectors in fp32.

    If `source`, from which the model was loaded, is a GGUF file, its metadata are copied. Otherwise they describe the
    configuration and the tokenizer.

    Raises:
        UserError: the architecture, a parameter, a setting or the tokenizer has no form in GGUF.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    config = model.config
    if reason := unsupported(config):
        raise UserError(reason)
    kind = _TYPES.get(dtype, "F32")
    writer = GGUFWriter(file, ARCHITECTURES[config.model_type].name)
    if is_gguf(source):
        _copy_metadata(writer, Path(locate(source)))
    else:
        writer.add_name(Path(source).name)
        _add_settings(writer, config)
        add_tokenizer(writer, tokenizer, len(model.get_input_embeddings().weight))
    writer.add_file_type(LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    for key, x in _tensors(model):
        own = GGMLQuantizationType["F32" if x.ndim == 1 or key in _ALWAYS_FP32 else kind]
        writer.add_tensor(key, quantize(x.float().contiguous().numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_read_back(file, config, tokenizer)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters with their names and in their layouts in GGUF; a shared one once.

    Raises:
        UserError: a parameter has no name in GGUF.
    """
    names, kind = tensor_names(model.config), ARCHITECTURES[model.config.model_type]
    for name, parameter in model.named_parameters():
        if (key := names(name)) is None:
            raise UserError(f"{name} has no place in a GGUF file; export a merged model in the format of transformers")
        if not parameter.is_floating_point():
            raise UserError(f"{name} is quantized, and is not exported to GGUF; export an adapter")
        x, (module, _, last) = parameter.detach().cpu(), name.rpartition(".")
        if last == "weight" and isinstance(model.get_submodule(module), Conv1D):
            x = x.mT
        if kind.norms_plus_one and key.endswith("norm.weight"):
            x = x.float() + 1
        yield key, in_rows_of_gguf(x, key, model.config)


def _add_settings(writer: Any, config: Any) -> None:
    """Adds the configuration, as far as llama.cpp reads it.

    Raises:
        UserError: llama.cpp scales the attention differently.
    """
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) not in (None, getattr(config, "head_dim", None)):
        raise UserError(
            f"llama.cpp scales the attention by head_dim = {config.head_dim}, and query_pre_attn_scalar = {scalar} in the "
            "model's config.json; export a merged model"
        )
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(
        getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    )
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if (groups := getattr(config, "num_key_value_heads", None)) is not None:
        writer.add_head_count_kv(groups)
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon)
    if (rope := _rope(config)) is not None:
        head_width = getattr(config, "head_dim", None) or width // heads
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_width * rope.get("partial_rotary_factor", 1.0)))
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    if sliding := getattr(config, "sliding_window", None):
        writer.add_sliding_window(sliding)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    if (parallel := getattr(config, "use_parallel_residual", None)) is not None:
        writer.add_parallel_residual(parallel)


def _rope(config: Any) -> dict[str, Any] | None:
    """The settings of the rotary position embedding, which transformers 4 has beside each other; None without one."""
    if (found := getattr(config, "rope_parameters", None)) is not None:
        return dict(found)
    theta = getattr(config, "rope_theta", None)
    if theta is None:
        return None
    return {"rope_theta": theta, "partial_rotary_factor": getattr(config, "partial_rotary_factor", 1.0)}


def _copy_metadata(writer: Any, base: Path) -> None:
    """Adds the metadata of a GGUF file, except those about the file itself."""
    from gguf import GGUFReader, GGUFValueType

    for key, entry in GGUFReader(base).fields.items():
        if key.startswith(("GGUF.", "quantize.")) or key in _OF_THE_FILE:
            continue
        kind = entry.types[0]
        sub = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, entry.contents(), kind, sub_type=sub)
