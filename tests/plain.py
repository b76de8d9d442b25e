"""What the algebra says that an adapter computes: a plain transformer whose weights are changed densely."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, pack
from fedlora.linalg.lowrank import LowRank
from fedlora.parts.dense import Dense
from fedlora.parts.dora import Dora
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.table import Factors
from fedlora.parts.three_factor import ThreeFactor
from fedlora.parts.tied import Tied
from fedlora.parts.weight_change import WeightChange


def dense(part: Factors) -> Tensor:
    """The matrix that the part adds, from its definition."""
    if isinstance(part, Heads):
        rank = part.c.shape[-1]
        columns, rows = part.b.split(rank, 1), part.a.split(rank)
        return torch.stack([part.s[i] * columns[i] @ part.c[i] @ rows[i] for i in range(len(part.s))]).sum(0)
    if isinstance(part, Tied):
        gram = part.a.mT @ part.a - part.offset.mT @ part.offset
        return part.frame @ gram if part.frame.shape[0] > part.frame.shape[1] else gram @ part.frame
    if isinstance(part, WeightChange):
        return part.delta
    if isinstance(part, ThreeFactor):
        return part.b @ part.c @ part.a
    assert isinstance(part, LowRank)
    return part.b @ part.a


def changed(part: Dora, weight: Tensor) -> Tensor:
    """diag(m / n) (weight + b a), with n the norms of the rows of the sum, without a gradient."""
    total = weight + part.b @ part.a
    return (part.m / torch.linalg.norm(total, dim=1).detach())[:, None] * total


def pass_by_pass(part: Experts, x: Tensor, dropped: Tensor) -> Tensor:
    """As published: for each of the `experts` chosen slots a pass through every expert, of which one counts."""
    pairs = [(part.b, part.a), *zip(part.others_b, part.others_a, strict=True)]
    expert_of = torch.tensor([0] * len(pairs) + list(range(1, len(pairs))))
    weights, slots = (x @ part.g.mT).softmax(-1).topk(len(pairs), -1)
    weights = weights / weights.sum(-1, keepdim=True)
    passes = [
        (weights[..., k] * (expert_of[slots[..., k]] == e))[..., None] * (dropped @ a.mT @ b.mT)
        for k in range(len(pairs))
        for e, (b, a) in enumerate(pairs)
    ]
    return torch.stack(passes).sum(0)


class PlainModel:
    """A copy of a classifier without places for factors: each call gives it other weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = copy.deepcopy(model).eval()
        self.added: dict[str, Tensor] = {}
        """The sum of the changes of each module's weight [out, in]."""

    def add(self, change: Mapping[str, LowRank]) -> None:
        """Adds the products to the weights for good."""
        for name, part in change.items():
            self.added[name] = self.added.get(name, 0) + dense(part).to(self.model.dtype)

    def logits(
        self, inputs: Mapping[str, Tensor], adapter: Adapter, frozen_extra: Mapping[str, LowRank] | None = None
    ) -> Tensor:
        """Of the weights plus all that was added, plus the products of the adapter and of what acts beside it; of the
        adapter's head. A mixture of experts is added to what its module gives. Differentiable."""
        products = [(n, dense(part)) for n, part in adapter.items() if not isinstance(part, Dense | Experts | Dora)]
        products += [(name, dense(part)) for name, part in (frozen_extra or {}).items()]
        weights: dict[str, Tensor] = {name: part.w for name, part in adapter.items() if isinstance(part, Dense)}
        for name, update in [*self.added.items(), *products]:
            module, key = self.model.get_submodule(name), f"{name}.weight"
            weights[key] = weights.get(key, module.weight) + (update.mT if isinstance(module, Conv1D) else update)
        for name, part in adapter.items():
            if isinstance(part, Dora):
                module = self.model.get_submodule(name)
                assert not isinstance(module, Conv1D) and f"{name}.weight" not in weights
                weights[f"{name}.weight"] = changed(part, module.weight)
        hooks = [
            self.model.get_submodule(name).register_forward_hook(_plus(part))
            for name, part in adapter.items()
            if isinstance(part, Experts)
        ]
        try:
            found: Tensor = torch.func.functional_call(self.model, weights, kwargs=dict(inputs)).logits
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def loss(
        self,
        batch: tuple[Mapping[str, Tensor], Tensor],
        adapter: Adapter,
        frozen_extra: Mapping[str, LowRank] | None = None,
    ) -> Tensor:
        """The mean cross-entropy."""
        inputs, targets = batch
        return functional.cross_entropy(self.logits(inputs, adapter, frozen_extra), targets)

    def gradient(
        self, batch: tuple[Mapping[str, Tensor], Tensor], start: Adapter, train: frozenset[str]
    ) -> dict[str, Tensor]:
        """Of the mean loss by the factors named in `train`, as `pack` names them."""
        leaves = {n: {k: x.clone().requires_grad_(k in train) for k, x in vars(part).items()} for n, part in start.items()}
        live = {name: type(part)(**leaves[name]) for name, part in start.items()}
        wanted = {key: x for key, x in pack(live).items() if x.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(self.loss(batch, live), list(wanted.values())), strict=True))

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last layer at the first token, without any adapter."""
        with torch.no_grad():
            weights = {f"{n}.weight": self.model.get_submodule(n).weight + x for n, x in self.added.items()}
            outputs = torch.func.functional_call(self.model, weights, kwargs={**inputs, "output_hidden_states": True})
            return outputs.hidden_states[-1][:, 0]


def _plus(part: Experts) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + pass_by_pass(part, inputs[0], inputs[0])

    return hook
