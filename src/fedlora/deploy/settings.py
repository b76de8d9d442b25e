"""Settings of a node."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fedlora.config.policy import Policy
from fedlora.errors import UserError
from fedlora.rounds import durable

if TYPE_CHECKING:  # takes seconds to import
    from fedlora.config.experiment import Experiment

_NAME = "node.json"
ACCEPTED = "accepted.txt"
"""File in the folder of a run with what the node's owner has accepted."""


class Settings(BaseModel):
    """Settings chosen by a node's owner, in the file `node.json` of the node's folder.

    `clients` are the names of its data owners, `policy` is what they allow; without one, they are asked before the first
    round of a run unless `accept` is true. With `data`, a file, there is exactly one client, which has all its
    examples; otherwise clients have their splits of the experiment's partition. `overrides` change the experiment like
    `--set`; only these can set files, columns and paths of this machine (see `local_experiment`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    clients: list[str]
    data: str | None = None
    rank: int | None = None
    overrides: list[str] = []
    policy: Policy | None = None
    accept: bool = False
    experiments: int = 1
    """Maximum number of experiments kept in memory."""

    @classmethod
    def trusting(cls, experiment: "Experiment", clients: Sequence[str], **more: Any) -> "Settings":
        """Settings of a node whose owner has also chosen the experiment, its data and its model."""
        data = {key: value for key, value in experiment.data.model_dump().items() if value is not None}
        named = {"model": experiment.model, **{f"data.{key}": value for key, value in data.items()}}
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items()]
        return cls(clients=list(clients), overrides=overrides, **{"accept": True, **more})

    def write(self, folder: Path) -> None:
        """Writes the settings to the folder, accessible to its owner only."""
        durable.folder(folder)
        folder.chmod(0o700)
        durable.replace(folder / _NAME, self.model_dump_json(indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """Reads the settings written by `write`.

        Raises:
            UserError: the folder has no valid settings.
        """
        try:
            return cls.model_validate_json((folder / _NAME).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: has no valid node settings; create them with fedlora join") from error


def any_accepted(folder: Path) -> bool:
    """Whether the owner of the node in this folder has accepted a run when asked."""
    return any(folder.glob(f"runs/*/{ACCEPTED}"))
