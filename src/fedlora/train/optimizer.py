"""Optimizer of many clients at once: all parameters have a leading client axis, and clients do not affect each other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapter import pack
from fedlora.config.sections import Train
from fedlora.messages import Fit


def make_optimizer(
    settings: Train, parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """An elementwise optimizer for `optimizer_step`. A factor's learning rate is `train.lr` times its rate, if any.

    `parameters` are named as by `pack`. As in transformers' Trainer, biases and weights of normalization layers do not
    decay: these are the vectors among the parameters that are trained without factors.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        factor = key.rpartition(".")[2]
        decays = factor != "w" or parameter.ndim > 2  # [clients, *shape]
        groups.setdefault((factor, settings.weight_decay if decays else 0.0), []).append(parameter)
    of_groups: list[dict[str, Any]] = [
        {"params": own, "initial_lr": settings.lr * rates.get(factor, 1.0), "weight_decay": weight_decay}
        for (factor, weight_decay), own in groups.items()
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(of_groups, momentum=settings.momentum, nesterov=settings.nesterov)
    return torch.optim.AdamW(of_groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def optimizer_step(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Makes a step with each client's learning rate multiplied by its rate [clients].

    A group has one learning rate, here that of the largest rate. The step of a client with a smaller rate is scaled down
    afterwards, which is the same, since steps and weight decay are proportional to the learning rate.
    """
    largest = max(rates)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * largest
    parameters = [p for group in optimizer.param_groups for p in group["params"]] if min(rates) < largest else []
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    for p, start in zip(parameters, before, strict=True):
        scale = torch.tensor([rate / largest for rate in rates]).to(p)
        p.data.copy_(start.lerp(p.data, scale.view(-1, *[1] * (p.ndim - 1))))


def scale_gradients(parameters: Iterable[nn.Parameter], client: int, factor: Tensor) -> None:
    """Multiplies the gradient of the client at this place by the factor."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad[client].mul_(factor)


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
