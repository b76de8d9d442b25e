"""Models in GGUF files, which transformers dequantizes to fp32 when it loads them."""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np


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
def parsed_once(source: str) -> Iterator[None]:
    """While transformers loads a GGUF file, hides its progress bar, and lets it parse the file only once.

    It parses all metadata, with the vocabulary, anew for the configuration, the weights and the tokenizer, and derives the
    names of the tensors anew for each module of the model, which together takes most of the time. Other models are loaded
    as always.
    """
    if not is_gguf(source) or missing():
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    with ExitStack() as undo:
        for module, name, value in (
            (loader, "tqdm", partial(loader.tqdm, disable=True)),  # which transformers' own settings do not disable
            (gguf, "GGUFReader", lru_cache(maxsize=1)(_reader(gguf.GGUFReader))),
            (gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)),
        ):
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def _reader(reader: Any) -> Any:
    """The class of a reader that slices an array, which takes half the time of slicing numpy's memory map."""

    class Reader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, mapped: Any) -> None:
            self._array = mapped.view(np.ndarray)

    return Reader
