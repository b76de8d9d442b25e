"""Loads LoRA factors into a transformer and reads them back. Only this file, `base_weights`, `layers` and `targets` use
module classes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, AdapterSpec, Dense, Factors, Scaling, pack
from fedlora.linalg.lowrank import Experts, LowRank, Product
from fedlora.models.base_weights import BaseWeights
from fedlora.models.layers import FACTORS, ClientLayout, LoraLayer, PerClientLayer
from fedlora.models.packing import Packing
from fedlora.models.requests import check_adapter, check_update
from fedlora.models.structure import structure
from fedlora.models.targets import find_targets, within


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
    ) -> None:
        """Finds and wraps the targets, and freezes all weights. `head` names the modules of the task head and any others
        that are trained without LoRA.

        The base computes in `precision`. Factors and heads keep their dtype; base updates are accumulated in fp32.

        Raises:
            UserError: as `find_targets`.
        """
        self.model = model.requires_grad_(False)
        self.head = tuple(head)
        sizes, ranks = find_targets(model, targets, rank_pattern or {}, self.head)
        self.packing = Packing(model)
        self.client_layout = ClientLayout(packing=self.packing)
        self.layers: dict[str, LoraLayer] = {}
        for name in sizes:
            parent, _, last = name.rpartition(".")
            self.layers[name] = LoraLayer(model.get_submodule(name), dropout, self.client_layout)
            setattr(model.get_submodule(parent), last, self.layers[name])
        self._base = BaseWeights({name: layer.base for name, layer in self.layers.items()}, precision)
        head_parameters = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if within(n, self.head)}
        if precision != torch.float32:
            model.to(precision)
        self._per_client: dict[str, PerClientLayer] = {}
        for name in {n.rpartition(".")[0]: None for n in head_parameters}:
            parent, _, last = name.rpartition(".")
            self._per_client[name] = PerClientLayer(model.get_submodule(name), self.client_layout)
            setattr(model.get_submodule(parent), last, self._per_client[name])
        config = getattr(model, "config", None)
        self.spec = AdapterSpec(
            modules=sizes,
            head=head_parameters,
            rank_pattern=ranks,
            weight=self._base.pretrained,
            features=getattr(config, "hidden_size", 0),
            classes=len(getattr(config, "id2label", None) or ()),
            scaling=scaling,
        )

    def load_clients(
        self,
        adapters: Sequence[Adapter],
        train: Iterable[str] = (),
        frozen_extra: Sequence[Mapping[str, LowRank] | None] = (),
    ) -> list[nn.Parameter]:
        """Loads the clients' adapters, and their frozen extra factors, into the model; returns the parameters in `train`.

        All adapters have the same `structure`. Parameters have a leading client axis; smaller ranks are padded with zeros
        in b and a, which get no gradient and stay zero.

        Raises:
            ValueError: a part does not fit the model, see `check_adapter`.
        """
        for adapter in adapters:
            check_adapter(self.spec, adapter)
        assert len({structure(adapter) for adapter in adapters}) <= 1, (
            "adapters of several structures cannot be loaded together"
        )
        assert len({frozenset(parts or ()) for parts in frozen_extra}) <= 1, (
            "frozen extra factors belong to the same modules for all clients"
        )
        train, trained = frozenset(train), []
        self.client_layout.index = None
        for name, layer in self.layers.items():
            for factor in FACTORS:
                setattr(layer, factor, None)
            device = _device(layer.base)
            layer.frozen_extra = [self._base.separate[name]] if name in self._base.separate else []
            if extra := [parts[name] for parts in frozen_extra if parts and name in parts]:
                layer.frozen_extra.append(LowRank(b=_padded([x.b for x in extra]), a=_padded([x.a for x in extra])))
            layer.frozen_extra = [LowRank(part.b.to(device), part.a.to(device)) for part in layer.frozen_extra]
        for head_layer in self._per_client.values():
            head_layer.per_client = {}
        for name, part in adapters[0].items() if adapters else ():
            if isinstance(part, Dense):
                module, _, key = name.rpartition(".")
                device = _device(self._per_client[module].base)
                stacked = torch.stack([_full(adapter[name]).w for adapter in adapters]).to(device)
                parameter = self._per_client[module].per_client[key] = nn.Parameter(stacked, requires_grad="w" in train)
                trained += [parameter] if "w" in train else []
            else:
                layer = self.layers[name]
                parts, device = [_factored(adapter[name]) for adapter in adapters], _device(layer.base)
                scales = [self.spec.scale(name, part.rank) for part in parts]
                layer.scale = torch.tensor(scales, dtype=part.b.dtype, device=device)[:, None, None]
                for factor in vars(part):
                    each = [vars(one)[factor] for one in parts]
                    if factor == "b":
                        each = [b / scale for b, scale in zip(each, scales, strict=True)]
                    parameter = nn.Parameter(_padded(each).to(device), requires_grad=factor in train)
                    setattr(layer, factor, parameter)
                    trained += [parameter] if factor in train else []
        return trained

    def select_clients(self, clients: Sequence[int]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Removes all loaded clients except these; returns pairs (old parameter, new parameter)."""
        pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        index = torch.tensor(clients)

        def select(x: nn.Parameter) -> nn.Parameter:
            pairs.append((x, nn.Parameter(x.data[index.to(x.device)], x.requires_grad)))
            return pairs[-1][1]

        for layer in self.layers.values():
            for i, part in enumerate(layer.frozen_extra):
                if part.b.ndim == 3:
                    layer.frozen_extra[i] = LowRank(part.b[index.to(part.b.device)], part.a[index.to(part.a.device)])
            if layer.a is not None:
                layer.scale = layer.scale[index.to(layer.scale.device)]
            for factor in FACTORS:
                if (x := getattr(layer, factor)) is not None:
                    setattr(layer, factor, select(x))
        for head_layer in self._per_client.values():
            head_layer.per_client = {key: select(x) for key, x in head_layer.per_client.items()}
        return pairs

    @property
    def transposed(self) -> bool:
        """Whether the targets store their weights as [in, out], which PEFT calls fan_in_fan_out."""
        return all(isinstance(layer.base, Conv1D) for layer in self.layers.values())

    def tensors(self, client: int, template: Adapter) -> dict[str, Tensor]:
        """A loaded client's whole current adapter, packed and differentiable, with the shapes of `template`."""
        found: dict[str, Tensor] = {}
        for key, x in pack(template).items():
            name, _, factor = key.rpartition(".")
            own = self._parameter(name, factor)[client][tuple(slice(size) for size in x.shape)]
            found[key] = own * self.layers[name].scale[client] if factor == "b" else own
        return found

    def add_to_gradient(self, client: int, correction: Mapping[str, Tensor], train: Iterable[str]) -> None:
        """Adds a constant to the gradient of a loaded client's trained factors, named as by `pack`."""
        train = frozenset(train)
        for key, x in correction.items():
            name, _, factor = key.rpartition(".")
            if factor not in train:
                continue
            parameter = self._parameter(name, factor)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            own = gradient[client][tuple(slice(size) for size in x.shape)]
            x = x.to(own)
            own += x * self.layers[name].scale[client] if factor == "b" else x
            parameter.grad = gradient

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges the products into the base permanently, in fp32; for a quantized weight they are added as frozen factors.

        Raises:
            ValueError: a part does not fit the base, see `check_update`.
        """
        check_update(self.spec, change, "base update")
        self._base.merge(change)

    def read(self, client: int, start: Adapter, train: Iterable[str]) -> dict[str, Factors]:
        """A loaded client's current adapter: the trained factors from the model, the others from `start`."""
        return self._read(client, start, train, lambda x: x, lambda b, scale: b * scale)

    def gradient(self, client: int, start: Adapter, train: Iterable[str]) -> dict[str, Factors]:
        """As `read`, with each trained factor replaced by its gradient."""
        return self._read(client, start, train, lambda x: x.grad, lambda b, scale: b / scale)

    def _parameter(self, name: str, factor: str) -> nn.Parameter:
        """The loaded factor of a module, or parameter of the head, with its client axis."""
        if name in self.layers:
            return cast(nn.Parameter, getattr(self.layers[name], factor))
        module, _, parameter = name.rpartition(".")
        return self._per_client[module].per_client[parameter]

    def _read(
        self,
        client: int,
        start: Adapter,
        train: Iterable[str],
        of: Callable[[Tensor], Tensor | None],
        scaled: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Factors]:
        """Applies `of` to each trained parameter, and converts the result from `lora_B` to b: scaled(result, scale)."""

        def own(x: Tensor) -> Tensor:
            found = of(x)
            return (torch.zeros_like(x) if found is None else found)[client]

        train = frozenset(train)
        adapter: dict[str, Factors] = {}
        for name, part in start.items():
            if isinstance(part, Dense):
                module, _, key = name.rpartition(".")
                adapter[name] = (
                    Dense(_copy(own(self._per_client[module].per_client[key]), part.w)) if "w" in train else part
                )
            else:
                layer, new = self.layers[name], dict(vars(part))
                for factor in train & new.keys():
                    x = own(getattr(layer, factor))[tuple(slice(size) for size in new[factor].shape)]
                    new[factor] = _copy(scaled(x, layer.scale[client]) if factor == "b" else x, new[factor])
                adapter[name] = type(part)(**new)
        return adapter


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """The clients' tensors stacked along a new first axis, zero-padded at the end to the largest."""
    largest = [max(sizes) for sizes in zip(*(x.shape for x in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *largest)
    for own, x in zip(stacked, tensors, strict=True):
        own[tuple(slice(size) for size in x.shape)] = x
    return stacked


def _factored(part: Factors) -> Product | Experts:
    assert not isinstance(part, Dense)
    return part


def _full(part: Factors) -> Dense:
    assert isinstance(part, Dense)
    return part


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _copy(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.detach().to(like.device, like.dtype, copy=True)
