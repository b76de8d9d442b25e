"""Moves LoRA factors into a transformer and back. Only this file, `layers` and `targets` know classes of modules."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, AdapterSpec, Dense, Factors, Scaling, pack
from fedlora.errors import UserError
from fedlora.linalg.combine import stack
from fedlora.linalg.fit import recompress
from fedlora.linalg.lowrank import Experts, Heads, LowRank, Product
from fedlora.models.layers import FACTORS, ClientLayout, LoraLayer, PerClientLayer
from fedlora.models.packing import Packing
from fedlora.models.requests import check_adapter, check_update
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

        The base computes in `precision`. Factors and heads keep their own; base updates are accumulated in fp32.

        Raises:
            UserError: as `find_targets`.
        """
        self.model = model.requires_grad_(False)
        self.head = tuple(head)
        sizes, ranks = find_targets(model, targets, rank_pattern or {}, self.head)
        self.packing = Packing(model)
        self.present = ClientLayout(packing=self.packing)
        self.layers: dict[str, LoraLayer] = {}
        for name in sizes:
            parent, _, last = name.rpartition(".")
            self.layers[name] = LoraLayer(model.get_submodule(name), dropout, self.present)
            setattr(model.get_submodule(parent), last, self.layers[name])
        self._merged_apart: dict[str, LowRank] = {}  # base updates of modules whose weight cannot be changed
        self._pretrained: dict[str, Tensor] = {}  # weights before the first base update
        self._exact: dict[str, Tensor] = {}  # fp32 weights, base updates included, of a base in lower precision
        head_parameters = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if within(n, self.head)}
        if precision != torch.float32:
            self._exact = {n: dense_weight(layer.base) for n, layer in self.layers.items() if _is_dense(layer.base)}
            model.to(precision)
        self._own: dict[str, PerClientLayer] = {}
        for name in {n.rpartition(".")[0]: None for n in head_parameters}:
            parent, _, last = name.rpartition(".")
            self._own[name] = PerClientLayer(model.get_submodule(name), self.present)
            setattr(model.get_submodule(parent), last, self._own[name])
        config = getattr(model, "config", None)
        self.spec = AdapterSpec(
            modules=sizes,
            head=head_parameters,
            rank_pattern=ranks,
            weight=self._weight,
            features=getattr(config, "hidden_size", 0),
            classes=getattr(config, "num_labels", 0),
            scaling=scaling,
        )

    def load(
        self,
        adapters: Sequence[Adapter],
        train: Iterable[str] = (),
        frozen_extra: Sequence[Mapping[str, LowRank] | None] = (),
    ) -> list[nn.Parameter]:
        """Loads the clients' adapters, and their frozen extra factors, into the model; returns the parameters in `train`.

        All adapters have the same `form`. Parameters have a leading client axis; smaller ranks are padded with zeros in b
        and a, which get no gradient and stay zero.

        Raises:
            ValueError: a part does not fit the model, see `check_adapter`.
        """
        for adapter in adapters:
            check_adapter(self.spec, adapter)
        assert len({form(adapter) for adapter in adapters}) <= 1, "adapters of several forms cannot be loaded together"
        assert len({frozenset(parts or ()) for parts in frozen_extra}) <= 1, (
            "factors beside go to the same modules of all clients"
        )
        train, trained = frozenset(train), []
        self.present.index = None
        for name, layer in self.layers.items():
            for factor in FACTORS:
                setattr(layer, factor, None)
            device = _device(layer.base)
            layer.fixed = [self._merged_apart[name]] if name in self._merged_apart else []
            if own := [parts[name] for parts in frozen_extra if parts and name in parts]:
                layer.fixed.append(LowRank(b=_padded([x.b for x in own]), a=_padded([x.a for x in own])))
            layer.fixed = [LowRank(part.b.to(device), part.a.to(device)) for part in layer.fixed]
        for own_layer in self._own.values():
            own_layer.own = {}
        for name, part in adapters[0].items() if adapters else ():
            if isinstance(part, Dense):
                module, _, key = name.rpartition(".")
                device = _device(self._own[module].base)
                stacked = torch.stack([_full(adapter[name]).w for adapter in adapters]).to(device)
                parameter = self._own[module].own[key] = nn.Parameter(stacked, requires_grad="w" in train)
                trained += [parameter] if "w" in train else []
            else:
                layer = self.layers[name]
                parts, device = [_factored(adapter[name]) for adapter in adapters], _device(layer.base)
                scales = [self.spec.scale(name, part.rank) for part in parts]
                layer.scale = torch.tensor(scales, dtype=part.b.dtype, device=device)[:, None, None]
                for factor in vars(part):
                    each = [vars(own)[factor] for own in parts]
                    if factor == "b":
                        each = [b / scale for b, scale in zip(each, scales, strict=True)]
                    parameter = nn.Parameter(_padded(each).to(device), requires_grad=factor in train)
                    setattr(layer, factor, parameter)
                    trained += [parameter] if factor in train else []
        return trained

    def keep(self, clients: Sequence[int]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Drops all loaded clients but these; returns pairs (old parameter, new parameter)."""
        pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        index = torch.tensor(clients)

        def cut(x: nn.Parameter) -> nn.Parameter:
            pairs.append((x, nn.Parameter(x.data[index.to(x.device)], x.requires_grad)))
            return pairs[-1][1]

        for layer in self.layers.values():
            for i, part in enumerate(layer.fixed):
                if part.b.ndim == 3:
                    layer.fixed[i] = LowRank(part.b[index.to(part.b.device)], part.a[index.to(part.a.device)])
            if layer.a is not None:
                layer.scale = layer.scale[index.to(layer.scale.device)]
            for factor in FACTORS:
                if (own := getattr(layer, factor)) is not None:
                    setattr(layer, factor, cut(own))
        for own_layer in self._own.values():
            own_layer.own = {key: cut(x) for key, x in own_layer.own.items()}
        return pairs

    def _weight(self, name: str) -> Tensor:
        """The module's weight before any base update."""
        if name in self._pretrained:
            return self._pretrained[name]
        return self._exact[name].clone() if name in self._exact else dense_weight(self.layers[name].base)

    @property
    def transposed(self) -> bool:
        """Whether the targets store their weights as [in, out], which PEFT calls fan_in_fan_out."""
        return all(isinstance(layer.base, Conv1D) for layer in self.layers.values())

    def tensors(self, client: int, like: Adapter) -> dict[str, Tensor]:
        """A loaded client's whole current adapter, packed and differentiable. `like` has its shapes."""
        found: dict[str, Tensor] = {}
        for key, x in pack(like).items():
            name, _, factor = key.rpartition(".")
            module, _, parameter = name.rpartition(".")
            own = getattr(self.layers[name], factor) if name in self.layers else self._own[module].own[parameter]
            cut = own[client][tuple(slice(size) for size in x.shape)]
            found[key] = cut * self.layers[name].scale[client] if factor == "b" else cut
        return found

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges the products into the base permanently, in fp32; a quantized weight gets them as separate factors.

        Raises:
            ValueError: a part does not fit the base, see `check_update`.
        """
        check_update(self.spec, change, "change of the base")
        for name, part in change.items():
            base = self.layers[name].base
            if _is_dense(base):
                self._pretrained.setdefault(name, self._weight(name))
                if name in self._exact:
                    self._exact[name] += part.product().float().cpu()
                    set_base(base, self._exact[name])
                else:
                    add_to_base(base, part.product().float())
            else:
                parts = [self._merged_apart[name]] if name in self._merged_apart else []
                self._merged_apart[name] = recompress(stack([(1.0, one) for one in (*parts, part)]))

    def read(self, client: int, start: Adapter, train: Iterable[str]) -> dict[str, Factors]:
        """A loaded client's current adapter: the trained factors from the model, the others from `start`."""
        return self._read(client, start, train, lambda x: x, lambda b, scale: b * scale)

    def gradient(self, client: int, start: Adapter, train: Iterable[str]) -> dict[str, Factors]:
        """As `read`, with each trained factor replaced by its gradient."""
        return self._read(client, start, train, lambda x: x.grad, lambda b, scale: b / scale)

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
                adapter[name] = Dense(_copy(own(self._own[module].own[key]), part.w)) if "w" in train else part
            else:
                layer, new = self.layers[name], dict(vars(part))
                for factor in train & new.keys():
                    x = own(getattr(layer, factor))[tuple(slice(size) for size in new[factor].shape)]
                    new[factor] = _copy(scaled(x, layer.scale[client]) if factor == "b" else x, new[factor])
                adapter[name] = type(part)(**new)
        return adapter


def form(adapter: Adapter) -> frozenset[tuple[str, type, int]]:
    """Structure that adapters loaded together must share: names, kinds, number of experts, rank of a head. Ranks and
    numbers of heads may differ."""
    return frozenset((name, type(part), _blocks(part)) for name, part in adapter.items())


def _blocks(part: Factors) -> int:
    """Size of the block structure, which zero-padding at the end would misalign; 0 for parts without one."""
    return len(part.g) if isinstance(part, Experts) else part.c.shape[-1] if isinstance(part, Heads) else 0


def dense_weight(base: nn.Module) -> Float[Tensor, "out in"]:
    """A copy of a module's weight as [out, in], fp32 on the CPU, whether or not the module stores it transposed.

    Raises:
        UserError: the weight is quantized.
    """
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UserError("this method reads the pretrained weights and cannot read quantised ones; choose another model")
    return (weight.mT if isinstance(base, Conv1D) else weight).detach().float().cpu().clone()


def add_to_base(base: nn.Module, delta: Float[Tensor, "out in"]) -> None:
    """Adds a change to a module's weight, in fp32, whether or not the module stores it transposed."""
    weight = base.weight
    assert isinstance(weight, Tensor) and weight.is_floating_point(), "a quantised weight cannot be changed"
    change = delta.mT if isinstance(base, Conv1D) else delta
    weight.data.copy_((weight.data.float() + change.to(weight.device)).to(weight.dtype))


def set_base(base: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Sets a module's weight, rounded to its precision, whether or not the module stores it transposed."""
    assert isinstance(base.weight, Tensor)
    base.weight.data.copy_(weight.mT if isinstance(base, Conv1D) else weight)


def _is_dense(base: nn.Module) -> bool:
    """Whether the module's weight can be read and changed."""
    return isinstance(base, nn.Linear | Conv1D) and base.weight.is_floating_point()


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
