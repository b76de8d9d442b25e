"""Atomic file writes, which are safe on power failure."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import RunStopped


def replace(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replaces the file by write, fsync and atomic rename: a crash leaves either the old or the new file.

    `mode` has the permissions of the new file, before the process's umask.

    Raises:
        RunStopped: the disk is full or the folder cannot be written; the old file is unchanged.
    """
    scratch = path.with_name(path.name + ".partial")
    try:
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise _stopped(path, error) from error


def folder(path: Path) -> None:
    """Creates the folder if necessary.

    Raises:
        RunStopped: it cannot be created.
    """
    try:
        if not path.is_dir():
            folder(path.parent)
            path.mkdir(exist_ok=True)
            _sync_folder(path.parent)
    except OSError as error:
        raise _stopped(path, error) from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Provides a temporary sibling folder, which replaces `folder` on success and is removed on failure.

    Temporary folders of killed processes are removed first. The content is not synced, so it must be reproducible.

    Raises:
        OSError: it cannot be written, or `folder` is not empty at the end.
    """
    folder = folder.resolve()  # keeps symbolic links
    partial = folder.with_name(f".{folder.name}.fedlora-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def append(path: Path, content: bytes) -> None:
    """Appends `content` to the file and syncs it; after a crash the file may end with a part of it.

    Raises:
        RunStopped: the disk is full or the file cannot be written.
    """
    try:
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _stopped(path, error) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stopped(path: Path, error: OSError) -> RunStopped:
    """Error for a failure to write `path`."""
    return RunStopped(f"cannot write {path}: {error.strerror or error}; the last complete round is intact")
