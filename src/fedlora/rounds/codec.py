"""Encoding of tensors and states as bytes, in the safetensors format."""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.rounds import checksum

_HEADER_BYTES = 4096
_HEADER_BYTES_PER_TENSOR = 1024  # its name, shape, dtype and offsets


def encode(tensors: Tensors) -> bytes:
    """Encodes the tensors with their names, shapes, dtypes and order in one byte string, a payload."""
    ranks = {name: rank for rank, name in enumerate(sorted(tensors))}
    order = " ".join(
        str(ranks[name]) for name in tensors
    )  # the order, which safetensors does not preserve, and on which the rounding of sums depends
    named = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}  # views may share memory
    return save(named, metadata={"order": order})


def encoded_size(tensors: Tensors) -> int:
    """Length of `encode(tensors)`, which does not depend on the tensors' values."""
    return _encoded_size(tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))


@lru_cache(maxsize=256)  # most clients of a round send the same names and shapes
def _encoded_size(layout: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> int:
    return len(encode({name: torch.empty(shape, dtype=dtype) for name, dtype, shape in layout}))


def decode(payload: bytes, max_tensors: int = 2**16) -> dict[str, Tensor]:
    """Inverse of `encode`, for at most `max_tensors` tensors: more are rejected before any is created.

    Raises:
        ValueError: not a valid payload, or too many tensors.
    """
    size = int.from_bytes(payload[:8], "little")
    if size > _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * max_tensors:
        raise ValueError(f"not a payload of tensors: a header of {size} bytes is too large for {max_tensors} tensors")
    try:
        header = json.loads(payload[8 : 8 + size])
        if (count := len(header.keys() - {"__metadata__"})) > max_tensors:
            raise ValueError(f"{count} tensors, expected at most {max_tensors}")
        tensors = load(payload)
        names = sorted(tensors)
        ordered = [names[int(rank)] for rank in header["__metadata__"]["order"].split()]
    except (SafetensorError, KeyError, RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a payload of tensors: {error}") from error
    if sorted(ordered) != names:
        raise ValueError("not a payload of tensors: its order does not match its names")
    return {
        name: tensors[name].clone() for name in ordered
    }  # same alignment as new tensors, on which the rounding of products depends


def encode_state(state: Any, **notes: Any) -> bytes:
    """Encodes a method's state, and a JSON-serializable note, with a checksum of both.

    A state consists of tensors, numbers, strings, None, sequences, mappings with string keys, frozen dataclasses of these.

    Raises:
        TypeError: the state contains any other type.
    """
    structure, tensors = outline(state)
    plan = json.dumps({**checksum.EMPTY, "state": structure, "notes": notes})
    named = {str(i): tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(tensors)}
    return checksum.sealed(save(named, metadata={"plan": plan}))


def outline(state: Any) -> tuple[Any, list[Tensor]]:
    """JSON-serializable structure of a state, and its tensors in a fixed order.

    Raises:
        TypeError: the state contains an unsupported type; see `encode_state`.
    """
    tensors: list[Tensor] = []
    return _plan(state, tensors), tensors


def decode_state(path: str) -> tuple[Any, dict[str, Any]]:
    """Reads the state and the note from a file written with `encode_state`.

    Raises:
        ValueError: the file is damaged, not written with `encode_state`, or from another version of a method.
    """
    content = Path(path).read_bytes()
    if not checksum.intact(content):
        raise ValueError(f"{path}: its checksum is missing or wrong")
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        plan, tensors = json.loads(header["__metadata__"]["plan"]), load(content)
        return _build(plan["state"], lambda name: tensors[name].clone()), plan["notes"]  # aligned, as in `decode`
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not a state that this version can read: {error}") from error


def decode_note(path: str) -> dict[str, Any]:
    """Reads only the note from a file written with `encode_state`, without verifying the file's checksum.

    Raises:
        ValueError: not written with `encode_state`.
    """
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        notes: dict[str, Any] = json.loads(json.loads(header)["__metadata__"]["plan"])["notes"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its header is damaged") from error
    return notes


def _plan(state: Any, tensors: list[Tensor]) -> Any:
    """Structure of a state as JSON; appends its tensors to `tensors`."""
    match state:
        case None | bool() | int() | float() | str():
            return {"value": state}
        case Tensor():
            tensors.append(state)
            return {"tensor": str(len(tensors) - 1)}
        case tuple() | list() if type(state) in (tuple, list):
            return {type(state).__name__: [_plan(item, tensors) for item in state]}
        case Mapping():
            if not all(isinstance(key, str) for key in state):
                raise TypeError("a state's mappings have string keys")
            return {"mapping": {key: _plan(item, tensors) for key, item in state.items()}}
    if is_dataclass(state) and not isinstance(state, type):
        name = f"{type(state).__module__}:{type(state).__qualname__}"
        return {"class": name, "fields": {f.name: _plan(getattr(state, f.name), tensors) for f in fields(state)}}
    raise TypeError(f"a state cannot hold a {type(state).__name__}")


def _build(plan: Any, tensor: Any) -> Any:
    match plan:
        case {"value": value}:
            return value
        case {"tensor": name}:
            return tensor(name)
        case {"tuple": items}:
            return tuple(_build(item, tensor) for item in items)
        case {"list": items}:
            return [_build(item, tensor) for item in items]
        case {"mapping": items}:
            return {key: _build(item, tensor) for key, item in items.items()}
        case {"class": name, "fields": items}:
            return _dataclass(name)(**{key: _build(item, tensor) for key, item in items.items()})
    raise KeyError(f"unknown part {plan!r}")


def _dataclass(name: str) -> Any:
    """Dataclass of that name, from this package or an already imported module."""
    module, _, qualname = name.partition(":")
    if module.startswith("fedlora."):
        with suppress(ModuleNotFoundError):
            import_module(module)
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise KeyError(f"{name} is not a dataclass")
    return found
