"""Models in GGUF files, which transformers dequantizes to fp32 when it loads them."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


def gguf_arguments(path: str) -> tuple[str, dict[str, Any]]:
    """The first argument of `from_pretrained` for this path, and further ones: a GGUF file is named within its folder."""
    file = Path(path)
    return (str(file.parent), {"gguf_file": file.name}) if is_gguf(path) else (path, {})


def is_gguf(path: str) -> bool:
    """Whether a model's source or location is a GGUF file."""
    return path.endswith(".gguf")


def unusable(path: Path) -> str | None:
    """The reason why a GGUF file cannot be loaded; None if it can, as far as its first bytes and the packages tell."""
    if not path.is_file():
        return "no such file"
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return "not a GGUF file; download it again"
    return missing()


def missing() -> str | None:
    """The reason why GGUF files can be neither read nor written; None if they can."""
    if importlib.util.find_spec("gguf") is None:
        return "the package 'gguf' is not installed; pip install 'fedlora[gguf]' installs it"
    return None


def mark_as_dense(model: Any) -> None:
    """Removes the mark of a quantized model, as its weights are dense; transformers would refuse to save it."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # transformers 4 has no such mark
        quantizer.remove_quantization_config(model)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hides the progress bar that transformers shows for GGUF files only, which its own settings do not disable."""
    from transformers import modeling_gguf_pytorch_utils

    module: Any = modeling_gguf_pytorch_utils
    shown = module.tqdm
    module.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        module.tqdm = shown
