"""Selection of the modules that get LoRA factors, and of those that make up the head."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.cache import cached
from fedlora.errors import UserError

_QUERY_AND_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("qkv",))
"""The default targets of vision transformers, for which PEFT has none; their names depend on transformers' version."""


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear-like module: nn.Linear, GPT-2's Conv1D, quantized linears; None for any other."""
    if isinstance(module, Conv1D):
        in_, out = module.weight.shape  # stored transposed
        return int(out), int(in_)
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "weight")):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    return None


@dataclass(frozen=True)
class Targets:
    """The modules that get factors: (out, in) of each by name, and the ranks and alphas that patterns fix."""

    sizes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]


def find_targets(
    model: nn.Module,
    targets: Sequence[str] | str | None,
    rank_pattern: Mapping[str, int],
    head: Iterable[str],
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
) -> Targets:
    """The linear modules outside the head and the output layer that PEFT would match, in these layers only, if given.

    A list of names can also name embeddings and the output layer of a language model, which belong to no layer; those of an
    encoder-decoder are not supported.

    Raises:
        UserError: a target, a layer or a key of a pattern matches no module, or the architecture has no default; names
            what is available.
    """
    outside = (*head, *(n for n, m in model.named_modules() if m in output_layer(model)))
    sizes = {n: size for n, m in model.named_modules() if (size := linear_size(m)) and not within(n, outside)}
    if not sizes:
        raise UserError(f"models of type {_kind(model)!r} have no linear modules outside their head; LoRA needs some")
    wanted = _default_targets(model, sizes) if targets is None else targets
    listed = targets if isinstance(targets, list) else []
    others = _embeddings_and_output(model)
    sizes |= {n: others[n] for n in _match(others, listed)}
    names = [*sizes] if wanted == "all-linear" else _match(sizes, wanted)
    if lost := [one for one in listed if not _match(sizes, [one])] or ([] if names else [wanted]):
        raise UserError(f"lora.targets: {lost[0]!r} matches no linear module; available: {_ends(sizes)}")
    if layers is not None:
        if not layers:
            raise UserError("lora.layers = []: expected at least one layer; omit it for all layers")
        available = {_layer(name) for name in names if name not in others}
        if unknown := [layer for layer in layers if layer not in available]:
            found = ", ".join(str(layer) for layer in sorted(available - {-1}))
            raise UserError(f"lora.layers: layer {unknown[0]} has no target module; available: {found}")
        names = [name for name in names if name in others or _layer(name) in layers]
    ranks = _of_pattern("rank_pattern", rank_pattern, names)
    return Targets({n: sizes[n] for n in names}, ranks, _of_pattern("alpha_pattern", alpha_pattern or {}, names))


def check_ranks(sizes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], rank: int) -> None:
    """Rejects ranks that exceed a module's size.

    Raises:
        UserError: a fixed rank, or `rank` for a module without one, is above min(out, in).
    """
    for name, size in sizes.items():
        if ranks.get(name, rank) > min(size):
            key = "lora.rank_pattern" if name in ranks else "method.rank"
            raise UserError(
                f"{key} = {ranks.get(name, rank)} is above the size of {name}, {size[0]} x {size[1]}; "
                f"choose at most {min(size)}, or other lora.targets"
            )


def head_modules(model: nn.Module, new: Iterable[str]) -> tuple[str, ...]:
    """The modules of the task head: all outside the base model, and new ones inside it, such as a pooler.

    `new` names the parameters that the checkpoint lacks. The output layer of a language model is part of its base.
    """
    whole: Any = model
    base, new = (whole.base_model, *output_layer(model)), frozenset(new)
    found = [] if model in base else [n for n, m in model.named_children() if m not in base and m.state_dict()]
    for key in sorted(new):
        parents = key.split(".")[:-1]
        for name in (".".join(parents[: i + 1]) for i in range(len(parents))):  # from the outermost module inwards
            own = {f"{name}.{rest}" for rest in model.get_submodule(name).state_dict()}
            if not within(name, found) and own <= new:
                found.append(name)
    return tuple(name for name, _ in model.named_modules() if name in found)


def output_layer(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layer that computes a language model's logits, if the model is one."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return () if found is None else (found,)


def shared_weights(model: nn.Module, modules: Iterable[str]) -> frozenset[str]:
    """Those of the modules whose weight is also that of another module: a tied embedding or output layer."""
    owners = Counter(id(module.weight) for module in model.modules() if "weight" in module._parameters)
    return frozenset(n for n in modules if owners[id(model.get_submodule(n)._parameters.get("weight"))] > 1)


def norm_modules(model: nn.Module, head: Iterable[str]) -> tuple[str, ...]:
    """The normalization modules with parameters outside the head, such as LayerNorm and RMSNorm."""
    norms = (n for n, m in model.named_modules() if type(m).__name__.endswith("Norm") and any(True for _ in m.parameters()))
    return tuple(name for name in norms if not within(name, head))


def _match(names: Iterable[str], targets: Sequence[str] | str) -> list[str]:
    """The names that PEFT would match: by a regular expression for the whole name, or by names and name suffixes."""
    if isinstance(targets, str):
        try:
            return [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise UserError(f"lora.targets = {targets!r} is not a regular expression: {error}") from error
    return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]


def _default_targets(model: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> list[str] | str:
    kind = _kind(model)
    if (targets := _peft_targets().get(kind)) is not None:
        return targets
    for names in _QUERY_AND_VALUE if getattr(model, "main_input_name", None) == "pixel_values" else ():
        if all(_match(sizes, [name]) for name in names):
            return list(names)
    raise UserError(f"PEFT has no default target modules for {kind!r}; set lora.targets, available: {_ends(sizes)}")


def _peft_targets() -> Mapping[str | None, list[str] | str]:
    """PEFT's default targets by the type of the model, from the disk cache: PEFT takes a second to import."""

    def read() -> bytes:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        return json.dumps(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING).encode()

    found: Mapping[str | None, list[str] | str] = json.loads(cached("peft targets", [version("peft")], read))
    return found


def _kind(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _embeddings_and_output(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules that get factors only if a list names them; none of an encoder-decoder.

    Embeddings that scale their output are not supported.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    output = output_layer(model)
    embeddings = {n: (m.embedding_dim, m.num_embeddings) for n, m in model.named_modules() if type(m) is nn.Embedding}
    return embeddings | {n: size for n, m in model.named_modules() if m in output and (size := linear_size(m))}


def _layer(name: str) -> int:
    """PEFT's rule for layers_to_transform: the first number in a module's name; -1 without one."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


Value = TypeVar("Value", int, float)


def _of_pattern(setting: str, pattern: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """PEFT's rule for patterns: the value of the first key, a regular expression, that matches a name or a suffix of it."""

    def matches(key: str, name: str) -> bool:
        try:
            return re.match(rf"(.*\.)?({key})$", name) is not None
        except re.error as error:
            raise UserError(f"lora.{setting}: {key!r} is not a regular expression: {error}") from error

    for key in pattern:
        if not any(matches(key, name) for name in names):
            raise UserError(f"lora.{setting}: {key!r} matches no target module; available: {_ends(names)}")
    return {name: pattern[keys[0]] for name in names if (keys := [key for key in pattern if matches(key, name)])}


def _ends(sizes: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in sizes}))


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is one of the modules or inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
