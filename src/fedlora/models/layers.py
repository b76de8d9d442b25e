"""Layers with per-client factors and heads: each client's rows are processed with that client's parameters."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedlora.linalg.lowrank import Experts, LowRank, block_diagonal
from fedlora.models.packing import Packing

FACTORS = ("b", "a", "c", "s", "g", "others_b", "others_a")
"""All factors that a `LoraLayer` can have."""


@dataclass
class ClientLayout:
    """The loaded clients that have rows in the input (`index` None: all), and the layout of these rows."""

    index: Tensor | None = None
    packing: Packing | None = None

    def select(self, x: Tensor) -> Tensor:
        """The entries of [clients, *shape] for these clients."""
        return x if self.index is None else x[self.index]

    def to_client_axis(self, x: Tensor, clients: int) -> Tensor:
        """Each client's rows of [rows, *rest, width], as [clients, rows of one client, *rest, width]."""
        if self.packing is not None and self.packing.inside is not None:
            return self.packing.inside.to_client_axis(
                x if x.ndim > 2 else x[None]
            )  # some blocks flatten rows and positions
        return x.reshape(clients, -1, *x.shape[1:])

    def from_client_axis(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `to_client_axis`, also for flattened input, in the shape of `like` except for its last axis."""
        if self.packing is not None and self.packing.inside is not None:
            return self.packing.inside.from_client_axis(x).view(*like.shape[:-1], -1)
        return x.reshape(*like.shape[:-1], -1)


class LoraLayer(nn.Module):
    """A module that maps [..., in] to [..., out], plus scale * lora_B lora_A. Without factors it equals that module.

    Factors have a leading client axis, b [clients, out, rank] and a [clients, rank, in]; the first axis of the input
    has the rows of one client after the other, the same number for each. Factors are applied in the dtype of the base.

    With `c` [clients, rank, rank] the update is scale * lora_B c lora_A; with `c` [clients, heads, rank, rank] and `s`
    [clients, heads] the middle is block-diagonal with blocks s_i c_i. With `g` [clients, slots, in], `others_b` and
    `others_a` the update is that of `Experts`; dropout applies to the input of the experts, not to that of `g`.
    `others_b` is not scaled.
    """

    def __init__(self, base: nn.Module, dropout: float = 0.0, client_layout: ClientLayout | None = None) -> None:
        super().__init__()
        self.base = base
        self.dropout = dropout
        self.client_layout = client_layout or ClientLayout()
        self.scale: Float[Tensor, "clients 1 1"] = torch.ones(1, 1, 1)
        self.b: nn.Parameter | None = None
        self.a: nn.Parameter | None = None
        self.c: nn.Parameter | None = None
        self.s: nn.Parameter | None = None
        self.g: nn.Parameter | None = None
        self.others_b: nn.Parameter | None = None
        self.others_a: nn.Parameter | None = None
        self.frozen_extra: list[LowRank] = []
        """Frozen extra factors, applied in addition to the trained ones; with a client axis or common to all."""

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the base: some models read their layers' weights to find the dtype."""
        return _base_attribute(self, name)

    def forward(self, x: Float[Tensor, "rows *rest in"]) -> Float[Tensor, "rows *rest out"]:
        """base(x) + the update of dropout(x) + the frozen extra factors' products with x, in the dtype of base(x)."""
        y: Tensor = self.base(x)
        select = self.client_layout.select
        for part in self.frozen_extra:
            y = self._plus_product(y, x, *((part.a, part.b) if part.a.ndim == 2 else (select(part.a), select(part.b))))
        if self.a is None or self.b is None:
            return y
        dropped = functional.dropout(x, self.dropout, self.training)
        if self.g is not None and self.others_b is not None and self.others_a is not None:
            factors = (
                select(self.b) * select(self.scale),
                select(self.a),
                select(self.g),
                select(self.others_b),
                select(self.others_a),
            )
            return self._plus_experts(y, x, dropped, Experts(*(factor.to(x.dtype) for factor in factors)))
        return self._plus_product(y, dropped, select(self.a), select(self.b), select(self.scale), self._middle())

    def _middle(self) -> Tensor | None:
        """The middle factor [clients, rank, rank] of the clients in the input."""
        if self.c is None:
            return None
        c = self.client_layout.select(self.c)
        return c if self.s is None else block_diagonal(self.client_layout.select(self.s)[..., None, None] * c)

    def _plus_experts(self, y: Tensor, x: Tensor, dropped: Tensor, experts: Experts) -> Tensor:
        """y + sum_e w_e(x) b_e a_e dropped, with each client's own experts, in one product for all experts."""
        rows = self.client_layout.to_client_axis(x, len(experts.g)).flatten(1, -2)
        weights = experts.weights(rows)  # [clients, rows of one client * rest, experts]
        pair = experts.concat_factors()
        return self._plus_product(y, dropped, pair.a, pair.b, weights.repeat_interleave(experts.rank, -1))

    def _plus_product(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None, middle: Tensor | None = None
    ) -> Tensor:
        """y + b (scale * middle a x); if the factors have a client axis, each client's rows are multiplied with its own.

        `scale` broadcasts to [clients, rows of one client * rest, rank].
        """
        a, b = a.to(x.dtype), b.to(x.dtype)
        if a.ndim == 2:
            return (y + functional.linear(functional.linear(x, a), b)).to(y.dtype)
        inner = (
            self.client_layout.to_client_axis(x, len(a)).flatten(1, -2) @ a.mT
        )  # [clients, rows of one client * rest, rank]
        inner = inner if middle is None else inner @ middle.to(x.dtype).mT
        inner = inner if scale is None else inner * scale.to(x.dtype)
        return y + self.client_layout.from_client_axis(inner.to(y.dtype) @ b.mT.to(y.dtype), y)


class PerClientLayer(nn.Module):
    """A module, such as a linear one of the task head, with per-client parameters [clients, *shape] in `per_client`.

    Without them it equals that module.
    """

    def __init__(self, base: nn.Module, client_layout: ClientLayout) -> None:
        super().__init__()
        self.base = base
        self.client_layout = client_layout
        self.per_client: dict[str, nn.Parameter] = {}

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the base."""
        return _base_attribute(self, name)

    def forward(self, x: Float[Tensor, "rows *rest in"]) -> Float[Tensor, "rows *rest out"]:
        """Applies the module to each client's rows with the client's parameters, in the dtype of these.

        A linear module returns that dtype, in which the loss is computed; others return the input's dtype.
        """
        if not self.per_client:
            y: Tensor = self.base(x)
            return y
        own = {key: self.client_layout.select(w) for key, w in self.per_client.items()}
        first, dtype = next(iter(own.values())), x.dtype
        runs = self.client_layout.to_client_axis(x.to(first.dtype), len(first))
        if type(self.base) is nn.Linear and "weight" in own:
            grouped = runs.flatten(1, -2) @ own["weight"].mT
            bias = own["bias"][:, None] if "bias" in own else self.base.bias
            return self.client_layout.from_client_axis(grouped if bias is None else grouped + bias, x)
        call = torch.func.functional_call
        each = [call(self.base, {key: w[i] for key, w in own.items()}, run) for i, run in enumerate(runs)]
        return self.client_layout.from_client_axis(torch.stack(each), x).to(dtype)


def _base_attribute(layer: nn.Module, name: str) -> Any:
    """An attribute of a layer, or else of its base, as in PEFT's layers."""
    try:
        return nn.Module.__getattr__(layer, name)
    except AttributeError:
        if name == "base":  # not yet set
            raise
        return getattr(layer.base, name)
