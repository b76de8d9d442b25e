"""Fingerprints that identify the files of a model."""

import hashlib
from pathlib import Path

from transformers.utils import cached_file

from fedlora.errors import UserError
from fedlora.models.file_digest import sha256
from fedlora.models.gguf import is_gguf
from fedlora.models.loading import locate

_READ = (".safetensors", ".json", ".txt", ".model")
"""Extensions of the files that determine weights, configuration and tokenizer."""

_WHOLE = 2**30


def fingerprint(source: str) -> dict[str, str]:
    """The SHA-256 of each file of a local model by file name, or {"commit": commit} for a model on the hub.

    For a file larger than 1 GiB, only its size and its first MiB, with the tensors' names, shapes and offsets, are hashed.

    Raises:
        UserError: the model does not exist.
    """
    path = locate(source)
    if is_gguf(path):
        files = [Path(path)]
    elif Path(path).is_dir():
        files = [file for file in sorted(Path(path).iterdir()) if file.suffix in _READ and file.is_file()]
    else:
        return {"commit": _commit(path)}
    try:
        return {file.name: _digest(file) for file in files}
    except OSError as error:
        raise UserError(f"model = {source!r}: {error.filename} cannot be read: {error.strerror}") from error


def _digest(path: Path) -> str:
    if (size := path.stat().st_size) <= _WHOLE:
        return sha256(path)
    with path.open("rb") as file:
        return hashlib.sha256(file.read(2**20) + str(size).encode()).hexdigest()


def _commit(name: str) -> str:
    try:
        found = cached_file(name, "config.json")  # its folder is named after the commit
    except (OSError, ValueError) as error:
        raise UserError(f"model = {name!r} cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error
    return Path(str(found)).parent.name
