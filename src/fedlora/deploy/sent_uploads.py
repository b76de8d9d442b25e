"""The last upload of each client with its noise, kept so that a repeated request is answered with the same bytes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Tensors
from fedlora.messages import ClientInfo, Round
from fedlora.rounds import durable
from fedlora.rounds.codec import encode, encode_state
from fedlora.runs.client_folder import client_folder
from fedlora.runs.damage import read_state


@dataclass(frozen=True)
class SentUpload:
    """An upload, and the client's state after the round if it has one."""

    tensors: Tensors
    state: Any


@dataclass(frozen=True)
class SentUploads:
    """Files CLIENT.safetensors in a folder.

    A repeated request has the same round and download; its attempt may differ. The server learns nothing from an upload
    that it has already seen, so it costs no privacy. Trained again, it would have other noise.
    """

    folder: Path

    def find(self, client: ClientInfo, rnd: Round, download: Tensors) -> SentUpload | None:
        """The upload for this request, if it was the client's last one.

        Raises:
            UserError: the file is damaged.
        """
        path = self._path(client)
        if not path.exists():
            return None
        state, notes = read_state(path)
        return SentUpload(**state) if notes["request"] == _digest(client, rnd, download) else None

    def save(self, client: ClientInfo, rnd: Round, download: Tensors, sent: SentUpload) -> None:
        """Replaces the client's last upload.

        Raises:
            RunStopped: the disk is full.
        """
        durable.folder(self.folder)
        content: Mapping[str, Any] = {"tensors": sent.tensors, "state": sent.state}
        durable.replace(self._path(client), encode_state(content, request=_digest(client, rnd, download)), mode=0o600)

    def _path(self, client: ClientInfo) -> Path:
        return self.folder / f"{client_folder(client.id)}.safetensors"


def _digest(client: ClientInfo, rnd: Round, download: Tensors) -> str:
    known = rnd.acknowledged.get(client.id)
    return hashlib.sha256(f"{rnd.index} {rnd.seed} {known} ".encode() + encode(download)).hexdigest()
