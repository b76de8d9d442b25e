"""Disk cache, shared by all runs, for results that depend only on their key."""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

_DIGEST = 32  # bytes of SHA-256


def cached(kind: str, key: Iterable[str], make: Callable[[], bytes]) -> bytes:
    """Content for this key: read from the cache folder if present and intact, else computed by `make` and stored.

    The folder is `$FEDLORA_CACHE`, else `fedlora` in `$XDG_CACHE_HOME` or `~/.cache`; only its owner may read it. Nothing
    is stored if the variable is empty, or if the folder is not writable.
    """
    folder = _folder()
    if folder is None:
        return make()
    digest = hashlib.sha256()
    for part in key:
        digest.update(f"{len(part)}:{part}".encode())
    path = folder / f"{kind}-{digest.hexdigest()}"
    with suppress(OSError):
        content = path.read_bytes()
        if content[:_DIGEST] == _checksum(path, content[_DIGEST:]):
            return content[_DIGEST:]
    content = make()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, delete=False) as file, ExitStack() as undo:
            undo.callback(os.unlink, file.name)
            file.write(_checksum(path, content) + content)
            file.flush()
            os.replace(file.name, path)
            undo.pop_all()
    return content


def _checksum(path: Path, content: bytes) -> bytes:
    """SHA-256 of a file's name and content: the content of another key, under this name, is not intact."""
    digest = hashlib.sha256(path.name.encode())
    digest.update(content)
    return digest.digest()


def _folder() -> Path | None:
    own = os.environ.get("FEDLORA_CACHE")
    if own is not None:
        return Path(own).expanduser() if own else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fedlora").expanduser()
