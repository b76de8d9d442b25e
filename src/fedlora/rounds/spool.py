"""Accepted uploads of a round, kept until its cohort is complete: in memory up to a limit, then on disk."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedlora.errors import RunStopped
from fedlora.messages import Reply, Upload
from fedlora.rounds.codec import decode, encode

IN_MEMORY = 256_000_000
"""Bytes of uploads that stay in memory."""


class Spool:
    """Replies by client. Those beyond the limit are encoded in files of the folder that only its user can read."""

    def __init__(self, folder: Path | None, limit: int = IN_MEMORY) -> None:
        self._folder = folder
        self._limit = limit
        self._replies: dict[str, Reply] = {}
        self._files: dict[str, Path] = {}
        self._bytes = 0

    def add(self, reply: Reply) -> None:
        """Stores a reply.

        Raises:
            RunStopped: it cannot be written.
        """
        size = sum(x.nbytes for x in reply.upload.flat().values())
        if self._folder is None or self._bytes + size <= self._limit:
            self._bytes += size
            self._replies[reply.client.id] = reply
            return
        path = self._folder / f"{len(self._files)}.upload"
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(encode(reply.upload.flat()))
        except OSError as error:
            raise RunStopped(f"cannot write {path}: {error.strerror or error}; the previous rounds are complete") from error
        self._files[reply.client.id] = path
        self._replies[reply.client.id] = replace(reply, upload=Upload({}))

    def __iter__(self) -> Iterator[Reply]:
        """The replies in the order of the clients' ids, each read when it is its turn."""
        for client, reply in sorted(self._replies.items()):
            path = self._files.get(client)
            yield reply if path is None else replace(reply, upload=Upload.of(decode(path.read_bytes())))

    def clear(self) -> None:
        """Forgets all replies, and removes their files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._replies, self._files, self._bytes = {}, {}, 0
