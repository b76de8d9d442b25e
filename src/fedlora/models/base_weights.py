"""Weights of the adapted modules' base, and the base updates merged into them."""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.errors import UserError
from fedlora.linalg.combine import stack
from fedlora.linalg.fit import recompress
from fedlora.linalg.lowrank import LowRank


class BaseWeights:
    """Weights of these modules by name, for a base that will compute in `precision`. Base updates accumulate in fp32.

    `shared` names the modules whose weight is also that of another module, such as tied embeddings.
    """

    def __init__(self, modules: Mapping[str, nn.Module], precision: torch.dtype, shared: Collection[str] = ()) -> None:
        self._modules, self._shared = modules, shared
        self._pretrained: dict[str, Tensor] = {}  # weights before the first base update
        self._fp32: dict[str, Tensor] = {}  # weights, base updates included, of a base in lower precision
        if precision != torch.float32:
            self._fp32 = {name: dense_weight(base) for name, base in modules.items() if _is_dense(base)}
        self.separate: dict[str, LowRank] = {}
        """Base updates of modules whose weight cannot be changed, and a constant change of any module."""

    def pretrained(self, name: str) -> Float[Tensor, "out in"]:
        """The module's weight before any base update.

        Raises:
            UserError: the weight is quantized.
        """
        if name in self._pretrained:
            return self._pretrained[name]
        return self._fp32[name].clone() if name in self._fp32 else dense_weight(self._modules[name])

    def merge(self, change: Mapping[str, LowRank]) -> None:
        """Merges the products into the weights permanently, in fp32; quantized and shared weights get separate factors."""
        for name, part in change.items():
            base = self._modules[name]
            if _is_dense(base) and name not in self._shared:
                self._pretrained.setdefault(name, self.pretrained(name))
                if name in self._fp32:
                    self._fp32[name] += part.product().float().cpu()
                    set_weight(base, self._fp32[name])
                else:
                    add_to_weight(base, part.product().float())
            else:
                parts = [self.separate[name]] if name in self.separate else []
                self.separate[name] = recompress(stack([(1.0, one) for one in (*parts, part)]))


def weight_of(base: nn.Module) -> Float[Tensor, "out in"]:
    """A module's weight as [out, in], whether or not the module stores it transposed; dequantized, if it can be.

    Raises:
        UserError: the checkpoint is stored quantized.
    """
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UserError(
            "this method reads the pretrained weights, as does lora.dora, which is not supported for a checkpoint that is "
            "stored quantized; choose another model"
        )
    return (weight.mT if _transposed(base) else weight).detach()


def dense_weight(base: nn.Module) -> Float[Tensor, "out in"]:
    """A copy of a module's weight as [out, in], fp32 on the CPU.

    Raises:
        UserError: as `weight_of`.
    """
    return weight_of(base).float().cpu().clone()


def add_to_weight(base: nn.Module, delta: Float[Tensor, "out in"]) -> None:
    """Adds a change to a module's weight, in fp32, whether or not the module stores it transposed."""
    weight = base.weight
    assert isinstance(weight, Tensor) and weight.is_floating_point(), "a quantized weight cannot be changed"
    change = delta.mT if _transposed(base) else delta
    weight.data.copy_((weight.data.float() + change.to(weight.device)).to(weight.dtype))


def set_weight(base: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Sets a module's weight, rounded to its precision, whether or not the module stores it transposed."""
    assert isinstance(base.weight, Tensor)
    base.weight.data.copy_(weight.mT if _transposed(base) else weight)


def _is_dense(base: nn.Module) -> bool:
    """Whether the module's weight can be read and changed."""
    return isinstance(base, nn.Linear | Conv1D | nn.Embedding) and base.weight.is_floating_point()


def _transposed(base: nn.Module) -> bool:
    """Whether the module stores its weight as [in, out]."""
    return isinstance(base, Conv1D | nn.Embedding)
