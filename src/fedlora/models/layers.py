"""Layers with per-client factors and heads: each client's rows are processed with that client's parameters."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.linalg.lowrank import LowRank
from fedlora.models.base_weights import weight_of
from fedlora.models.example_gradients import ExampleGradients
from fedlora.models.packing import Packing
from fedlora.parts.dense import Dense
from fedlora.parts.table import Part, mapped, matrix_of


@dataclass
class ClientLayout:
    """The loaded clients that have rows in the input (`index` None: all), and the layout of these rows.

    With `examples`, each row is a client of its own, whose gradient is kept apart.
    """

    index: Tensor | None = None
    packing: Packing | None = None
    examples: ExampleGradients | None = None

    def select(self, x: Tensor) -> Tensor:
        """The entries of [clients, *shape] for these clients."""
        if self.examples is not None:
            return self.examples.select(x)
        return x if self.index is None else x[self.index]

    @contextmanager
    def each_example(self, places: Int[Tensor, " rows"], copied: Collection[int] = ()) -> Iterator[ExampleGradients]:
        """Context of a pass whose rows are examples of the clients at these places; yields its gradients."""
        self.index, self.examples = places, ExampleGradients(places, copied)
        try:
            yield self.examples
        finally:
            self.index = self.examples = None

    def clients(self, x: Tensor) -> int:
        """The number of clients that have rows in the input, given a parameter [clients, *shape]."""
        return len(x if self.index is None else self.index)

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
    """A module that maps [..., in] to [..., out], plus the update of a part. Without a part it equals that module.

    The input of an embedding is token ids [...], to which dropout does not apply.

    The factors of `part`, as PEFT trains them, have a leading client axis, and so has `scale`; the first axis of the input
    has the rows of one client after the other, the same number for each. The part computes in the dtype of the input.
    """

    def __init__(self, base: nn.Module, dropout: float = 0.0, client_layout: ClientLayout | None = None) -> None:
        super().__init__()
        self.base = base
        self.dropout = dropout
        self.client_layout = client_layout or ClientLayout()
        self.part: Part | None = None
        self.scale: Float[Tensor, "clients 1 1"] = torch.ones(1, 1, 1)
        self.frozen_extra: list[LowRank] = []
        """Frozen extra factors, applied in addition to the trained ones; with a client axis or common to all."""
        self.row_norms: Float[Tensor, " out"] | None = None
        """The norms of the rows of the base's weight, for parts that need them."""

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the base: some models read their layers' weights to find the dtype."""
        return _base_attribute(self, name)

    def forward(self, x: Float[Tensor, "rows *rest in"] | Int[Tensor, "rows *rest"]) -> Float[Tensor, "rows *rest out"]:
        """base(x) + the update of dropout(x) + the frozen extra factors' products with x, in the dtype of base(x)."""
        y: Tensor = self.base(x)
        unchanged = y
        for extra in self.frozen_extra:
            y = self._plus_extra(y, x, extra)
        if self.part is None:
            return y
        part, scale, examples = self.part, self.scale, self.client_layout.examples
        if examples is not None and (matrix := self.matrix) is not None:
            update = examples.times(self._rows(x, self.client_layout.clients(matrix)), matrix)
            return y + self.client_layout.from_client_axis(update.to(y.dtype), y)
        if self.client_layout.index is not None:
            part, scale = mapped(part, self.client_layout.select), self.client_layout.select(scale)
        drops = self.training and self.dropout > 0 and x.is_floating_point()
        dropped = functional.dropout(x, self.dropout) if drops else x
        undropped = self._rows(x, len(scale)) if part.reads_input else None
        rows = self._rows(dropped, len(scale))
        base = _Base(self, dropped, None if drops else unchanged, len(scale))
        update = part.apply(rows if undropped is None else undropped, rows, scale, base)
        return y + self.client_layout.from_client_axis(update.to(y.dtype), y)

    @property
    def matrix(self) -> Tensor | None:
        """The parameter [clients, out, in] with which the layer multiplies its input, if its part is that alone."""
        return matrix_of(self.part)

    def _plus_extra(self, y: Tensor, x: Tensor, extra: LowRank) -> Tensor:
        """y + the product of x with factors that have a client axis, or are common to all clients."""
        if not extra.batch:
            return (y + extra.times(x)).to(y.dtype)
        own = mapped(extra, self.client_layout.select)
        update = own.times(self._rows(x, own.batch[0]))
        return y + self.client_layout.from_client_axis(update.to(y.dtype), y)

    def _rows(self, x: Tensor, clients: int) -> Tensor:
        """The input as [clients, rows of one client * rest, in], or token ids without the last axis."""
        if x.is_floating_point():
            return self.client_layout.to_client_axis(x, clients).flatten(1, -2)
        return self.client_layout.to_client_axis(x[..., None], clients).flatten(1)


@dataclass(frozen=True)
class _Base:
    """The base of a layer in one pass, without its bias: the input after dropout, and the output for it, if known."""

    layer: LoraLayer
    dropped: Tensor
    output: Tensor | None
    clients: int

    def product(self) -> Tensor:
        """[clients, rows of one client * rest, out]."""
        y: Tensor = self.layer.base(self.dropped) if self.output is None else self.output
        bias = getattr(self.layer.base, "bias", None)
        return self.layer._rows(y if bias is None else y - bias.to(y.dtype), self.clients)

    def weight(self) -> Tensor:
        """[out, in]."""
        return weight_of(self.layer.base)

    def row_norms(self) -> Tensor:
        """[out]."""
        assert self.layer.row_norms is not None, "the model was loaded without the norms of its weights"
        return self.layer.row_norms


class PerClientLayer(nn.Module):
    """A module, such as a linear one of the task head, with per-client parameters [clients, *shape] in `per_client`.

    Without them it equals that module.
    """

    def __init__(self, base: nn.Module, client_layout: ClientLayout) -> None:
        super().__init__()
        self.base = base
        self.client_layout = client_layout
        self.per_client: dict[str, Dense] = {}

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
        layout, own = self.client_layout, {key: part.w for key, part in self.per_client.items()}
        first, dtype = next(iter(own.values())), x.dtype
        runs = layout.to_client_axis(x.to(first.dtype), layout.clients(first))
        if (matrix := self.matrix) is not None:
            rows, examples = runs.flatten(1, -2), layout.examples
            grouped = rows @ layout.select(matrix).mT if examples is None else examples.times(rows, matrix)
            bias: Any = layout.select(own["bias"])[:, None] if "bias" in own else self.base.bias
            return layout.from_client_axis(grouped if bias is None else grouped + bias, x)
        call, own = torch.func.functional_call, {key: layout.select(w) for key, w in own.items()}
        each = [call(self.base, {key: w[i] for key, w in own.items()}, run) for i, run in enumerate(runs)]
        return layout.from_client_axis(torch.stack(each), x).to(dtype)

    @property
    def matrix(self) -> Tensor | None:
        """The weights [clients, out, in] of a linear module."""
        return self.per_client["weight"].w if type(self.base) is nn.Linear and "weight" in self.per_client else None


def _base_attribute(layer: nn.Module, name: str) -> Any:
    """An attribute of a layer, or else of its base, as in PEFT's layers."""
    try:
        return nn.Module.__getattr__(layer, name)
    except AttributeError:
        if name == "base":  # not yet set
            raise
        return getattr(layer.base, name)
