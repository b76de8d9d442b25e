"""Loads LoRA factors into a transformer and reads them back. Only this file, `base_weights`, `layers`, `quantized` and
`targets` use module classes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import mul, truediv
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, AdapterSpec, Init, Scaling, pack
from fedlora.linalg.lowrank import LowRank
from fedlora.models.base_weights import BaseWeights
from fedlora.models.checkpointing import Checkpointing
from fedlora.models.in_place import InPlace, in_place, other_parameters
from fedlora.models.layers import ClientLayout, LoraLayer, PerClientLayer
from fedlora.models.packing import Packing
from fedlora.models.requests import check_adapter, check_update
from fedlora.models.structure import structure
from fedlora.models.targets import find_targets, shared_weights, within
from fedlora.parts.table import Factors, as_trained, mapped, stacked


class AdaptedModel:
    """A frozen model whose target modules are wrapped in LoRA layers. The model is changed in place, once."""

    def __init__(
        self,
        model: nn.Module,
        scaling: Scaling,
        targets: Sequence[str] | str | None = None,
        dropout: float = 0.0,
        rank_pattern: Mapping[str, int] | None = None,
        head: Iterable[str] = (),
        precision: torch.dtype = torch.float32,
        classes: int = 0,
        whole: bool = False,
        alpha_pattern: Mapping[str, float] | None = None,
        layers: Sequence[int] | None = None,
        init: Init = "uniform",
        dora: bool = False,
    ) -> None:
        """Finds and wraps the targets, and freezes all weights. `head` names the modules of the task head and any others
        that are trained without LoRA, `classes` is the number of the task's labels. `whole`: all other parameters are
        trained as well, like those of the head, but only one client can be loaded. `dora`: the norms of the weights' rows
        are computed, which DoRA's parts need.

        The base computes in `precision`. Factors and heads keep their dtype; base updates are accumulated in fp32.

        Raises:
            UserError: as `find_targets` and `other_parameters`.
        """
        self.model = model.requires_grad_(False)
        self.head = tuple(head)
        found = find_targets(model, targets, rank_pattern or {}, self.head, alpha_pattern, layers)
        sizes = found.sizes
        self.whole = whole
        others = other_parameters(model, sizes, self.head) if whole else {}
        self.packing = Packing(model)
        self.checkpointing = Checkpointing(model)
        self.client_layout = ClientLayout(packing=self.packing)
        self.layers: dict[str, LoraLayer] = {}
        named = dict(model.named_parameters())
        shared = shared_weights(model, sizes)
        for name in sizes:
            parent, _, last = name.rpartition(".")
            self.layers[name] = LoraLayer(model.get_submodule(name), dropout, self.client_layout)
            setattr(model.get_submodule(parent), last, self.layers[name])
        self._base = BaseWeights({name: layer.base for name, layer in self.layers.items()}, precision, shared)
        head_parameters = {n: p.detach().cpu().clone() for n, p in named.items() if n in others or within(n, self.head)}
        if precision != torch.float32:
            model.to(precision)
        self.base_change: Mapping[str, LowRank] = {}
        """A constant change of the base, beside its weights; adapters are added to the changed base."""
        self._per_client: dict[str, PerClientLayer | InPlace] = {}
        for name in {n.rpartition(".")[0]: None for n in head_parameters if n not in others}:
            parent, _, last = name.rpartition(".")
            layer = PerClientLayer(model.get_submodule(name), self.client_layout)
            setattr(model.get_submodule(parent), last, layer)
            self._per_client[name] = layer
        self._per_client |= in_place(model, others, self.client_layout)
        config = getattr(model, "config", None)
        self.spec = AdapterSpec(
            modules=sizes,
            head=head_parameters,
            rank_pattern=found.ranks,
            weight=self._base.pretrained,
            features=_width(config) or _width(getattr(config, "vision_config", None)),
            classes=classes,
            scaling=replace(scaling, alphas=found.alphas),
            init=init,
            embeddings=frozenset(name for name, layer in self.layers.items() if isinstance(layer.base, nn.Embedding)),
            magnitudes={name: self._base.pretrained(name).norm(dim=1) for name in sizes} if dora else {},
        )

    def load_clients(
        self,
        adapters: Sequence[Adapter],
        train: Iterable[str] = (),
        frozen_extra: Sequence[Mapping[str, LowRank] | None] = (),
    ) -> list[nn.Parameter]:
        """Loads the clients' adapters, and their frozen extra factors, into the model; returns the parameters in `train`.

        All adapters have the same `structure`. Parameters have a leading client axis; smaller factors are padded with
        zeros, which get no gradient and stay zero.

        Raises:
            ValueError: a part does not fit the model, see `check_adapter`.
        """
        for adapter in adapters:
            check_adapter(self.spec, adapter)
        assert len(adapters) <= 1 or not self.whole, "clients that train the whole model cannot be loaded together"
        assert len({structure(adapter) for adapter in adapters}) <= 1, (
            "adapters of several structures cannot be loaded together"
        )
        assert len({frozenset(parts or ()) for parts in frozen_extra}) <= 1, (
            "frozen extra factors belong to the same modules for all clients"
        )
        train, trained = frozenset(train), []
        self.client_layout.index = None
        for name, layer in self.layers.items():
            device = _device(layer.base)
            layer.part = None
            layer.frozen_extra = [self._base.separate[name]] if name in self._base.separate else []
            if extra := [parts[name] for parts in frozen_extra if parts and name in parts]:
                layer.frozen_extra.append(stacked(extra))
            layer.frozen_extra = [mapped(one, partial(Tensor.to, device=device)) for one in layer.frozen_extra]
        for head_layer in self._per_client.values():
            head_layer.per_client = {}
        for name in adapters[0] if adapters else ():
            parts = [adapter[name] for adapter in adapters]
            scales = [1.0 if part.in_head else self.spec.scale(name, part.rank) for part in parts]
            part = stacked([as_trained(part, scale) for part, scale in zip(parts, scales, strict=True)])
            device = _device(self._layer(name).base)
            loaded = {f: nn.Parameter(x.to(device), requires_grad=f in train) for f, x in vars(part).items()}
            self._set(name, type(part)(**loaded))
            if name in self.layers:
                dtype = next(iter(loaded.values())).dtype
                self.layers[name].scale = torch.tensor(scales, dtype=dtype, device=device)[:, None, None]
                if (row_norms := self.spec.magnitudes.get(name)) is not None:
                    self.layers[name].row_norms = row_norms.to(device)
            trained += [x for factor, x in loaded.items() if factor in train]
        return trained

    def select_clients(self, clients: Sequence[int]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Removes all loaded clients except these; returns pairs (old parameter, new parameter)."""
        pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        index = torch.tensor(clients)

        def entries(x: Tensor) -> Tensor:
            return x[index.to(x.device)]

        def select(x: Tensor) -> nn.Parameter:
            pairs.append((cast(nn.Parameter, x), nn.Parameter(entries(x.data), x.requires_grad)))
            return pairs[-1][1]

        for layer in self.layers.values():
            layer.frozen_extra = [mapped(one, entries) if one.batch else one for one in layer.frozen_extra]
            if layer.part is not None:
                layer.scale, layer.part = entries(layer.scale), mapped(layer.part, select)
        for head_layer in self._per_client.values():
            head_layer.per_client = {key: mapped(part, select) for key, part in head_layer.per_client.items()}
        return pairs

    @property
    def dtype(self) -> torch.dtype:
        """The data type in which the base computes."""
        return next(x.dtype for x in self.model.parameters() if x.is_floating_point())

    @property
    def in_place(self) -> list[InPlace]:
        """The modules whose parameters are replaced in each pass."""
        return [layer for layer in self._per_client.values() if isinstance(layer, InPlace)]

    @property
    def transposed(self) -> bool:
        """Whether the targets store their weights as [in, out], which PEFT calls fan_in_fan_out."""
        bases = (layer.base for layer in self.layers.values() if not isinstance(layer.base, nn.Embedding))
        return all(isinstance(base, Conv1D) or getattr(base, "transposed", False) for base in bases)

    def matrices(self) -> list[Tensor]:
        """The loaded parameters [clients, out, in] that are applied through `ExampleGradients.times`."""
        heads = [layer.matrix for layer in self._per_client.values() if isinstance(layer, PerClientLayer)]
        return [x for x in (*(layer.matrix for layer in self.layers.values()), *heads) if x is not None]

    def tensors(self, client: int, template: Adapter) -> dict[str, Tensor]:
        """A loaded client's whole current adapter, packed and differentiable, with the shapes of `template`."""
        found: dict[str, Tensor] = {}
        for key, x in pack(template).items():
            name, _, factor = key.rpartition(".")
            own = vars(self._get(name))[factor][client][tuple(slice(size) for size in x.shape)]
            found[key] = own * self._unit(name, factor, client)
        return found

    def add_to_gradient(self, client: int, correction: Mapping[str, Tensor], train: Iterable[str]) -> None:
        """Adds a constant to the gradient of a loaded client's trained factors, named as by `pack`."""
        train = frozenset(train)
        for key, x in correction.items():
            name, _, factor = key.rpartition(".")
            if factor not in train:
                continue
            parameter = vars(self._get(name))[factor]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            own = gradient[client][tuple(slice(size) for size in x.shape)]
            own += x.to(own) * self._unit(name, factor, client)
            parameter.grad = gradient

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges the products into the base permanently, in fp32; for a quantized weight they are added as frozen factors.

        Raises:
            ValueError: a part does not fit the base, see `check_update`.
        """
        assert not self.spec.magnitudes, "with DoRA, the norms of the base's weights are constant"
        check_update(self.spec, change, "base update")
        self._base.merge(change)

    def keep_beside_base(self, change: Mapping[str, LowRank]) -> None:
        """Adds the products to the base as frozen factors, before any base update; the weights remain as they are.

        Raises:
            ValueError: as for `merge_into_base`.
        """
        assert not self.spec.magnitudes, "with DoRA, the norms of the base's weights are constant"
        check_update(self.spec, change, "change of the base")
        self.base_change = change
        self._base.separate.update(change)

    def read(self, client: int, start: Adapter, train: Iterable[str]) -> dict[str, Factors]:
        """A loaded client's current adapter: the trained factors from the model, the others from `start`."""
        return self._read(client, start, train, lambda x: x, mul)

    def gradient(self, client: int, start: Adapter, train: Iterable[str]) -> dict[str, Factors]:
        """As `read`, with each trained factor replaced by its gradient."""
        return self._read(client, start, train, lambda x: torch.zeros_like(x) if x.grad is None else x.grad, truediv)

    def _layer(self, name: str) -> LoraLayer | PerClientLayer | InPlace:
        """The layer of a module, or of a parameter of the head."""
        return self.layers[name] if name in self.layers else self._per_client[name.rpartition(".")[0]]

    def _get(self, name: str) -> Factors:
        """The loaded part of a module, or of a parameter of the head, with its client axis."""
        if name in self.layers:
            return cast(Factors, self.layers[name].part)
        module, _, parameter = name.rpartition(".")
        return self._per_client[module].per_client[parameter]

    def _set(self, name: str, part: Any) -> None:
        """Loads a part with its client axis."""
        if name in self.layers:
            self.layers[name].part = part
        else:
            module, _, parameter = name.rpartition(".")
            self._per_client[module].per_client[parameter] = part

    def _unit(self, name: str, factor: str, client: int) -> float | Tensor:
        """The number by which a loaded client's factor is multiplied to give that of its adapter."""
        return self._get(name).unit(factor, self.layers[name].scale[client] if name in self.layers else 1.0)

    def _read(
        self,
        client: int,
        start: Adapter,
        train: Iterable[str],
        of: Callable[[Tensor], Tensor],
        convert: Callable[[Tensor, float | Tensor], Tensor],
    ) -> dict[str, Factors]:
        """Replaces each trained factor by `of` its parameter, converted with its unit."""
        train = frozenset(train)
        adapter: dict[str, Factors] = {}
        for name, part in start.items():
            loaded, new = vars(self._get(name)), dict(vars(part))
            for factor in train & new.keys():
                x = of(loaded[factor])[client][tuple(slice(size) for size in new[factor].shape)]
                new[factor] = _copy(convert(x, self._unit(name, factor, client)), new[factor])
            adapter[name] = type(part)(**new)
        return adapter


def _width(config: Any) -> int:
    """The width of the last layer's features; 0 if unknown."""
    return int(getattr(config, "hidden_size", 0) or (getattr(config, "hidden_sizes", None) or [0])[-1])


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _copy(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.detach().to(like.device, like.dtype, copy=True)
