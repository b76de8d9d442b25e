"""Linear modules whose frozen weight is stored in 4 or 8 bits, as bitsandbytes quantizes it."""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedlora.errors import UserError
from fedlora.models.base_weights import dense_weight, set_weight
from fedlora.models.targets import output_layer, within

Quantization = Literal["nf4", "int8"]


class QuantizedLinear(nn.Module):
    """A linear module that computes with its dequantized weight, in the dtype of the input.

    Only the quantized weight is stored for the backward pass, which dequantizes it again. A row's output depends on that
    row alone.
    """

    def __init__(self, module: nn.Module, kind: Quantization) -> None:
        """Quantizes a module's weight: nn.Linear, or GPT-2's Conv1D."""
        super().__init__()
        weight = dense_weight(module)
        self.out_features, self.in_features = weight.shape
        self.transposed = isinstance(module, Conv1D)
        """Whether the module stored its weight as [in, out]."""
        stored, self._statistics = _QUANTIZE[kind](weight)
        self._dequantize = _DEQUANTIZE[kind]
        self.quantized = nn.Parameter(stored, requires_grad=False)
        self.bias: Any = module.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantized weight in fp32."""
        return self._dequantize(self.quantized, self._statistics).float()

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weight and of its statistics."""
        return self.quantized.nbytes + _bytes(self._statistics)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """x w^T + the bias."""
        y: Tensor = _TimesDequantized.apply(x, self.quantized, self._dense)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _dense(self, quantized: Tensor, dtype: torch.dtype) -> Tensor:
        return self._dequantize(quantized, self._statistics).to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Moves the module; unlike a buffer, the statistics keep their precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self._statistics.to(self.quantized.device)
        self._statistics = self._statistics if moved is None else moved
        return self


class _TimesDequantized(torch.autograd.Function):
    """x w^T, which stores the quantized weight instead of w for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, dense: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
        """[*rows, in] to [*rows, out]."""
        ctx.save_for_backward(quantized)
        ctx.dense = dense
        return functional.linear(x, dense(quantized, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        (quantized,) = ctx.saved_tensors
        return gradient @ ctx.dense(quantized, gradient.dtype), None, None


def quantize(model: nn.Module, kind: Quantization, head: Iterable[str]) -> str:
    """Replaces the model's linear modules by quantized ones; returns a note on their memory.

    Raises:
        UserError: see `quantizable`.
    """
    names, before, after = quantizable(model, kind, head), 0, 0
    for name in names:
        parent, _, last = name.rpartition(".")
        module = QuantizedLinear(model.get_submodule(name), kind)
        setattr(model.get_submodule(parent), last, module)
        before += 4 * module.in_features * module.out_features
        after += module.nbytes
    return (
        f"quantize = {kind!r}: the weights of {len(names)} linear modules take {after / 1e6:.3f} MB instead of "
        f"{before / 1e6:.3f} MB in fp32; the others, {_other_bytes(model) / 1e6:.3f} MB, are not quantized"
    )


def round_weights(model: nn.Module, kind: Quantization, head: Iterable[str]) -> None:
    """Rounds the weights that `quantize` would quantize to their quantized values, in place.

    Raises:
        UserError: see `quantizable`.
    """
    for name in quantizable(model, kind, head):
        module = model.get_submodule(name)
        set_weight(module, QuantizedLinear(module, kind).weight)


def quantizable(model: nn.Module, kind: Quantization, head: Iterable[str]) -> list[str]:
    """The linear modules outside the head and the output layer, except those that transformers keeps in fp32.

    Raises:
        UserError: bitsandbytes is not installed, the model is quantized already, or has no such modules.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantize = {kind!r}: the package 'bitsandbytes' is not installed; pip install 'fedlora[quantize]' installs it"
        )
    config: Any = model.config
    if _stored_form(config) not in (None, "gguf"):  # GGUF files are dequantized when they are loaded
        raise UserError(f"quantize = {kind!r}: the model is already quantized; remove the setting")
    outside = _not_quantized(model, head)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    linear = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and not within(n, outside)]
    if not (names := [name for name in linear if not kept & set(name.split("."))]):
        raise UserError(f"quantize = {kind!r}: models of type {config.model_type!r} have no linear modules to quantize")
    return names


def _stored_form(config: Any) -> str | None:
    """The quantization method of the checkpoint, if any."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)


def loading_settings(model: nn.Module, kind: Quantization, head: Iterable[str]) -> dict[str, Any]:
    """The settings with which transformers quantizes the same modules of a model that it loads."""
    how = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
    skipped = [*_not_quantized(model, head), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    found = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped}
    return {**found, **how.get(kind, {"load_in_8bit": True})}


def _not_quantized(model: nn.Module, head: Iterable[str]) -> list[str]:
    output = output_layer(model)
    return [*head, *(name for name, module in model.named_modules() if module in output)]


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Any]:
    """Blocks of 64 weights with double quantization of their largest magnitudes, as in QLoRA (arXiv:2305.14314)."""
    from bitsandbytes.functional import quantize_4bit

    stored, statistics = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return stored, statistics


def _dequantize_nf4(stored: Tensor, statistics: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(stored.data, statistics)
    return dense


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled by their largest magnitude, as in LLM.int8() (arXiv:2208.07339)."""
    from bitsandbytes.functional import int8_vectorwise_quant

    stored, largest, _ = int8_vectorwise_quant(weight.half())
    return stored, largest


def _dequantize_int8(stored: Tensor, largest: Tensor) -> Tensor:
    return stored * (largest[:, None] / 127)


_QUANTIZE: dict[Quantization, Callable[[Tensor], tuple[Tensor, Any]]] = {"nf4": _quantize_nf4, "int8": _quantize_int8}
_DEQUANTIZE: dict[Quantization, Callable[[Tensor, Any], Tensor]] = {"nf4": _dequantize_nf4, "int8": _dequantize_int8}


def _bytes(statistics: Any) -> int:
    """Of the statistics, and of those by which these are quantized."""
    if isinstance(statistics, Tensor):
        return statistics.nbytes
    return int(statistics.absmax.nbytes + (statistics.state2.absmax.nbytes if statistics.state2 is not None else 0))


def _other_bytes(model: nn.Module) -> int:
    return sum(x.nbytes for name, x in model.named_parameters() if not name.endswith(".quantized"))
