"""What a node has done in a run, counted on its disk, within the limits of its policy."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fedlora.config.policy import Policy
from fedlora.deploy.reasons import NodeFailure, Reason
from fedlora.rounds import durable

_NAME = "usage.json"
_MB = 1_000_000


class _Counts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    trainings: dict[str, int] = {}
    bytes: int = 0


@dataclass(frozen=True)
class Usage:
    """The trainings of each client in a run and the bytes of tensors, in a file in the run's folder if they are limited.

    Its methods raise a NodeFailure beyond a limit, whose text `notify` receives.
    """

    folder: Path
    policy: Policy
    notify: Callable[[str], None]

    def receive(self, size: int, for_training: bool) -> None:
        """Counts received bytes, before they are used."""
        limits = self.policy.traffic
        if for_training:
            self._require("round_mb_down", size, limits.round_mb_down)
        self._count(size)

    def send(self, size: int, for_training: bool) -> None:
        """Counts bytes, before they are sent."""
        if for_training:
            self.require_upload(size)
        self._count(size)

    def require_upload(self, size: int) -> None:
        """Checks the bytes of an upload before they are counted."""
        self._require("round_mb_up", size, self.policy.traffic.round_mb_up)

    def train(self, clients: Sequence[str]) -> None:
        """Counts one training of each client, before it begins."""
        if self.policy.rounds is None:
            return
        counts = self._read()
        trainings = {**counts.trainings, **{client: counts.trainings.get(client, 0) + 1 for client in clients}}
        if max(trainings.values(), default=0) > self.policy.rounds:
            self.notify(f"{Reason.ROUNDS.value}: a client has trained policy.rounds = {self.policy.rounds} times")
            raise NodeFailure(Reason.ROUNDS)
        self._write(counts.model_copy(update={"trainings": trainings}))

    def _count(self, size: int) -> None:
        if self.policy.traffic.run_mb is None:
            return
        counts = self._read()
        total = counts.bytes + size
        self._require("run_mb", total, self.policy.traffic.run_mb)
        self._write(counts.model_copy(update={"bytes": total}))

    def _require(self, key: str, size: int, limit: float | None) -> None:
        if limit is not None and size > limit * _MB:
            self.notify(f"{Reason.TRAFFIC.value}: {size / _MB:.3f} MB, policy.traffic.{key} = {limit:g}")
            raise NodeFailure(Reason.TRAFFIC)

    def _read(self) -> _Counts:
        path = self.folder / _NAME
        return _Counts.model_validate_json(path.read_bytes()) if path.exists() else _Counts()

    def _write(self, counts: _Counts) -> None:
        durable.replace(self.folder / _NAME, json.dumps(counts.model_dump()).encode(), mode=0o600)
