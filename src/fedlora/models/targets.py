"""Selection of the modules that get LoRA factors, and of those that make up the head."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

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


def find_targets(
    model: nn.Module, targets: Sequence[str] | str | None, rank_pattern: Mapping[str, int], head: Iterable[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """The linear modules outside the head and the output layer that PEFT would match, with sizes (out, in), and ranks fixed
    by `rank_pattern`.

    Raises:
        UserError: a target or a key of the pattern matches no module, or the architecture has no default; names the
            available modules.
    """
    outside = (*head, *(n for n, m in model.named_modules() if m in output_layer(model)))
    sizes = {n: size for n, m in model.named_modules() if (size := linear_size(m)) and not within(n, outside)}
    if not sizes:
        raise UserError(f"models of type {_kind(model)!r} have no linear modules outside their head; LoRA needs some")
    wanted = _default_targets(model, sizes) if targets is None else targets
    names = list(sizes) if wanted == "all-linear" else _match(sizes, wanted)
    listed = targets if isinstance(targets, list) else []
    if lost := [one for one in listed if not _match(sizes, [one])] or ([] if names else [wanted]):
        raise UserError(f"lora.targets: {lost[0]!r} matches no linear module; available: {_ends(sizes)}")
    for key in rank_pattern:
        if not any(_pattern_rank(name, {key: 1}) for name in names):
            raise UserError(f"lora.rank_pattern: {key!r} matches no target module; available: {_ends(names)}")
    ranks = {n: rank for n in names if (rank := _pattern_rank(n, rank_pattern)) is not None}
    return {name: sizes[name] for name in names}, ranks


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
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kind = _kind(model)
    targets: list[str] | str | None = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if targets is not None:
        return targets
    for names in _QUERY_AND_VALUE if getattr(model, "main_input_name", None) == "pixel_values" else ():
        if all(_match(sizes, [name]) for name in names):
            return list(names)
    raise UserError(f"PEFT has no default target modules for {kind!r}; set lora.targets, available: {_ends(sizes)}")


def _kind(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _pattern_rank(name: str, pattern: Mapping[str, int]) -> int | None:
    """PEFT's rule for rank_pattern: the first key that matches the name or a suffix of it, as a regular expression."""
    for key, rank in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return rank
        except re.error as error:
            raise UserError(f"lora.rank_pattern: {key!r} is not a regular expression: {error}") from error
    return None


def _ends(sizes: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in sizes}))


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is one of the modules or inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
