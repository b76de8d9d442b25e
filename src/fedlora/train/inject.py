"""LoRA factors into a transformer and back. Only this file knows module classes and alpha / rank."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from peft.utils.constants import SEQ_CLS_HEAD_NAMES, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, AdapterSpec, Factors, Full
from fedlora.errors import UserError
from fedlora.linalg.combine import stack
from fedlora.linalg.fit import recompress
from fedlora.linalg.lowrank import LowRank, block_diagonal


@dataclass(frozen=True)
class Scaling:
    """The factor between PEFT's `lora_B` and our `b`: b = of(rank) * lora_B, and a = lora_A.

    With a middle factor too it is b that takes the scale: c = lora_C. A c between trained factors then learns as in
    (alpha / rank) lora_B lora_C lora_A, and a c between frozen ones as in b c a, whatever alpha is.
    """

    alpha: float
    rslora: bool = False

    def of(self, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


class LoraLayer(nn.Module):
    """Any module that maps [..., in] to [..., out], plus scale * lora_B lora_A. Without factors it is that module.

    With `c` [rank, rank] between the two it is scale * lora_B c lora_A; with `c` [heads, rank, rank] and `s` [heads] the
    middle is block-diagonal, of blocks s_i c_i.

    Factors may have a leading client axis, b [clients, out, rank] and a [clients, rank, in]: then the first axis of the
    input holds the clients' equally long runs of rows one after the other.
    """

    def __init__(self, base: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.dropout = dropout
        self.scale = 1.0
        self.b: nn.Parameter | None = None
        self.a: nn.Parameter | None = None
        self.c: nn.Parameter | None = None
        self.s: nn.Parameter | None = None
        self.fixed: list[LowRank] = []
        """Frozen factors that act beside the trained ones."""

    def forward(self, x: Float[Tensor, "rows *rest in"]) -> Float[Tensor, "rows *rest out"]:
        """base(x) + scale * lora_B lora_A dropout(x) + the fixed factors' products with x, in the dtype of base(x)."""
        y: Tensor = self.base(x)
        for part in self.fixed:
            y = (y + functional.linear(functional.linear(x.to(part.a.dtype), part.a), part.b)).to(y.dtype)
        if self.a is None or self.b is None:
            return y
        x = functional.dropout(x.to(self.a.dtype), self.dropout, self.training)
        if self.a.ndim == 2:
            update = functional.linear(self._middle(functional.linear(x, self.a)), self.b)
        else:
            grouped = x.reshape(self.a.shape[0], -1, x.shape[-1])  # [clients, rows of one client * rest, in]
            update = (self._middle(grouped @ self.a.mT) @ self.b.mT).reshape(y.shape)
        return (y + update * self.scale).to(y.dtype)

    def _middle(self, x: Tensor) -> Tensor:
        """c x for x [..., rank], x itself without a c."""
        if self.c is None:
            return x
        return x @ (self.c if self.s is None else block_diagonal(self.s[..., None, None] * self.c)).mT


class Adapted:
    """A frozen model with a place for LoRA factors at each target module. The model is changed in place, once."""

    def __init__(
        self,
        model: nn.Module,
        scaling: Scaling,
        targets: Sequence[str] | str | None = None,
        dropout: float = 0.0,
        rank_pattern: Mapping[str, int] | None = None,
        head: Iterable[str] = (),
    ) -> None:
        """Finds the targets and wraps them; freezes everything. `head` names the modules of the task head.

        Raises:
            UserError: no target matches, or there is no default for the architecture; names what there is.
        """
        self.model = model.requires_grad_(False)
        self.scaling = scaling
        self.head = tuple(head)
        sizes = {n: size for n, m in model.named_modules() if (size := linear_size(m)) and not _within(n, self.head)}
        names = _match(sizes, targets if targets is not None else _default_targets(model, sizes))
        pattern = {n: rank for n in names if (rank := _pattern_rank(n, rank_pattern or {})) is not None}
        self.layers: dict[str, LoraLayer] = {}
        for name in names:
            parent, _, last = name.rpartition(".")
            self.layers[name] = LoraLayer(model.get_submodule(name), dropout)
            setattr(model.get_submodule(parent), last, self.layers[name])
        self._folded: dict[str, LowRank] = {}  # folds of modules whose own weight cannot be changed
        self._pretrained: dict[str, Tensor] = {}  # weights as they were before the first fold
        self._head = {n: p for n, p in model.named_parameters() if _within(n, self.head)}
        self.spec = AdapterSpec(
            modules={name: sizes[name] for name in names},
            head={n: p.detach().cpu().clone() for n, p in self._head.items()},
            rank_pattern=pattern,
            weight=self._weight,
        )

    def load(
        self, adapter: Adapter, train: Iterable[str] = (), beside: Mapping[str, LowRank] | None = None
    ) -> list[nn.Parameter]:
        """Puts the adapter into the model, and frozen factors beside it; returns the parameters named in `train`."""
        train, trained = frozenset(train), []
        for name, layer in self.layers.items():
            layer.b = layer.c = layer.s = layer.a = None
            fixed = [parts[name] for parts in (self._folded, beside or {}) if name in parts]
            layer.fixed = [LowRank(part.b.to(_device(layer.base)), part.a.to(_device(layer.base))) for part in fixed]
        for name, part in adapter.items():
            if isinstance(part, Full):
                parameter = self._head[name]
                parameter.data.copy_(part.w)
                parameter.requires_grad_("w" in train)
                trained += [parameter] if "w" in train else []
            else:
                layer = self.layers[name]
                layer.scale = self.scaling.of(part.rank)
                device = _device(layer.base)
                for factor, x in vars(part).items():
                    value = x / layer.scale if factor == "b" else x
                    parameter = nn.Parameter(value.to(device, copy=True), requires_grad=factor in train)
                    setattr(layer, factor, parameter)
                    trained += [parameter] if factor in train else []
        return trained

    def _weight(self, name: str) -> Tensor:
        """The module's weight before any fold."""
        return self._pretrained[name] if name in self._pretrained else dense_weight(self.layers[name].base)

    @property
    def transposed(self) -> bool:
        """Whether the targets store their weights as [in, out], which PEFT calls fan_in_fan_out."""
        return all(isinstance(layer.base, Conv1D) for layer in self.layers.values())

    def factors(self) -> dict[str, LowRank]:
        """The loaded parts of kind LowRank as they are now, for a penalty: gradients flow through them."""
        return {
            name: LowRank(layer.b * layer.scale, layer.a)
            for name, layer in self.layers.items()
            if layer.a is not None and layer.b is not None and layer.c is None
        }

    def fold(self, change: Mapping[str, LowRank]) -> None:
        """Adds the products to the base for good, in fp32; beside the base where its weight is quantised."""
        for name, part in change.items():
            base = self.layers[name].base
            if isinstance(base, nn.Linear | Conv1D) and base.weight.is_floating_point():
                if name not in self._pretrained:
                    self._pretrained[name] = dense_weight(base)
                add_to_base(base, part.product().float())
            else:
                parts = [self._folded[name]] if name in self._folded else []
                self._folded[name] = recompress(stack([(1.0, one) for one in (*parts, part)]))

    def read(self, start: Adapter, train: Iterable[str]) -> dict[str, Factors]:
        """The adapter as it is now, after `load(start, train)`: trained factors new, the others those of `start`."""
        train = frozenset(train)
        adapter: dict[str, Factors] = {}
        for name, part in start.items():
            if isinstance(part, Full):
                adapter[name] = Full(_copy(self._head[name], part.w)) if "w" in train else part
            else:
                layer = self.layers[name]
                assert layer.a is not None and layer.b is not None, f"{name} was not loaded"
                new = {factor: _copy(getattr(layer, factor), x) for factor, x in vars(part).items() if factor in train}
                if "b" in new:
                    new["b"] *= layer.scale
                adapter[name] = type(part)(**{**vars(part), **new})
        return adapter


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear-like module: nn.Linear, GPT-2's Conv1D, quantised linears; None for any other."""
    if isinstance(module, Conv1D):
        in_, out = module.weight.shape  # stored transposed
        return int(out), int(in_)
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "weight")):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    return None


def dense_weight(base: nn.Module) -> Float[Tensor, "out in"]:
    """A copy of a module's own weight, fp32 on the CPU, whichever way round the module stores it.

    Raises:
        UserError: the weight is quantised.
    """
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UserError("this method reads the pretrained weights and cannot read quantised ones; choose another model")
    return (weight.mT if isinstance(base, Conv1D) else weight).detach().float().cpu().clone()


def add_to_base(base: nn.Module, delta: Float[Tensor, "out in"]) -> None:
    """Adds a change to a module's own weight, in fp32, whichever way round the module stores it."""
    weight = base.weight
    assert isinstance(weight, Tensor) and weight.is_floating_point(), "a quantised weight cannot be changed"
    change = delta.mT if isinstance(base, Conv1D) else delta
    weight.data.copy_((weight.data.float() + change.to(weight.device)).to(weight.dtype))


def head_modules(model: nn.Module, missing: Iterable[str]) -> tuple[str, ...]:
    """The modules that make the task head: those wholly new to the checkpoint, and those whose name PEFT takes for one."""
    new, keys = set(missing), list(model.state_dict())
    found: list[str] = []
    for name, _ in model.named_modules():
        own = [key for key in keys if key.startswith(f"{name}.")]
        if own and not _within(name, found) and (new.issuperset(own) or name.endswith(tuple(SEQ_CLS_HEAD_NAMES))):
            found.append(name)
    return tuple(found)


def _match(sizes: Mapping[str, tuple[int, int]], targets: Sequence[str] | str) -> list[str]:
    """The names that PEFT would match: a full regular expression, or names and ends of names."""
    if targets == "all-linear":
        found = list(sizes)
    elif isinstance(targets, str):
        found = [name for name in sizes if re.fullmatch(targets, name)]
    else:
        found = [name for name in sizes if any(name == t or name.endswith(f".{t}") for t in targets)]
    if not found:
        raise UserError(f"lora.targets = {targets!r} matches no linear module; the model has {_ends(sizes)}")
    return found


def _default_targets(model: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> list[str] | str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    targets: list[str] | str | None = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if targets is None:
        raise UserError(f"PEFT has no default target modules for {kind!r}; set lora.targets, out of {_ends(sizes)}")
    return targets


def _pattern_rank(name: str, pattern: Mapping[str, int]) -> int | None:
    """PEFT's rule for rank_pattern: the first key that matches the name or its end, as a regular expression."""
    return next((rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def _ends(sizes: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in sizes}))


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _copy(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.detach().to(like.device, like.dtype, copy=True)
