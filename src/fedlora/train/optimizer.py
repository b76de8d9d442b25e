"""Optimizer of many clients at once: all parameters have a leading client axis, and clients do not affect each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedlora.adapter import pack
from fedlora.messages import Fit


def make_optimizer(
    kind: Literal["adamw", "sgd"],
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    rates: Mapping[str, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """An elementwise optimizer with one parameter group for each factor; its learning rate is `lr` times its rate, if any.

    `parameters` are named as by `pack`.
    """
    factors: dict[str, list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        factors.setdefault(key.rpartition(".")[2], []).append(parameter)
    groups = [{"params": own, "lr": lr * rates.get(factor, 1.0)} for factor, own in factors.items()]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Clips each client's gradient to the norm."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # [clients]
    scale = (norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))


def replace_parameters(
    optimizer: torch.optim.Optimizer, new: Mapping[nn.Parameter, nn.Parameter], clients: Sequence[int]
) -> None:
    """Replaces the parameters by `new` ones, which have only these clients; their optimizer state is retained."""
    index = torch.tensor(clients)
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            group["params"][i] = new[old]
            state = optimizer.state.pop(old, {})
            optimizer.state[new[old]] = {
                key: x[index.to(x.device)] if isinstance(x, Tensor) and x.shape == old.shape else x
                for key, x in state.items()
            }


@dataclass(frozen=True)
class MaskedParameter:
    """A parameter, the mask of its fixed entries, and their values, all [clients, *shape]."""

    parameter: nn.Parameter
    fixed: Tensor
    before: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter, key: str, requests: Sequence[Fit]) -> "MaskedParameter":
        """The parameter `key` with the masks of the clients' requests."""
        fixed = torch.zeros_like(parameter, dtype=torch.bool)
        for own, request in zip(fixed, requests, strict=True):
            if request.mask is not None and key in request.mask:
                shape = pack(request.start)[key].shape
                trainable = request.mask[key].to(fixed.device).expand(shape)
                own[tuple(slice(n) for n in shape)] = ~trainable
        return cls(parameter, fixed, parameter.detach().clone())

    def clear_gradient(self) -> None:
        """Sets the gradient of the fixed entries to zero."""
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(self.fixed, 0)

    def restore(self) -> None:
        """Restores the fixed entries, which weight decay has changed."""
        self.parameter.data.copy_(self.before.where(self.fixed, self.parameter.data))

    def select_clients(self, new: nn.Parameter, clients: Sequence[int]) -> "MaskedParameter":
        """The masked parameter of these clients alone."""
        index = torch.tensor(clients)
        return MaskedParameter(new, *(x[index.to(x.device)] for x in (self.fixed, self.before)))
