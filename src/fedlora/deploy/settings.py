"""A node's settings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fedlora.errors import UserError
from fedlora.rounds import durable

if TYPE_CHECKING:  # takes seconds to import
    from fedlora.config import Experiment

_NAME = "node.json"


class Settings(BaseModel):
    """What the owner of a node decides, in the file `node.json` of its folder.

    `clients` are the names of its data owners. With `data`, a file, there is one of them, and all examples are its own;
    without, they have their parts of the experiment's division. `overrides` are changes of the experiment, as `--set`:
    they alone name files, columns and paths of this machine (see `local_experiment`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    clients: list[str]
    data: str | None = None
    rank: int | None = None
    overrides: list[str] = []
    experiments: int = 1
    """How many experiments are kept in memory at a time."""

    @classmethod
    def trusting(cls, experiment: "Experiment", clients: Sequence[str], **more: Any) -> "Settings":
        """The settings of a node whose owner has chosen the data and the model of the experiment."""
        data = {key: value for key, value in experiment.data.model_dump().items() if value is not None}
        named = {"model": experiment.model, **{f"data.{key}": value for key, value in data.items()}}
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items()]
        return cls(clients=list(clients), overrides=overrides, **more)

    def write(self, folder: Path) -> None:
        """Makes the folder a node's, for its owner alone."""
        durable.folder(folder)
        folder.chmod(0o700)
        durable.replace(folder / _NAME, self.model_dump_json(indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """What `write` wrote there.

        Raises:
            UserError: there is nothing of it.
        """
        try:
            return cls.model_validate_json((folder / _NAME).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no settings of a node there; fedlora join makes them") from error
