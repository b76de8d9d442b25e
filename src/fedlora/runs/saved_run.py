"""A run directory, read without its lock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedlora.config.experiment import Experiment
from fedlora.errors import UserError
from fedlora.rounds.codec import decode_note
from fedlora.rounds.early_stopping import stops, until_best
from fedlora.rounds.row import RoundRow
from fedlora.runs.client_folder import client_folder
from fedlora.runs.damage import damaged, missing
from fedlora.runs.folder import ADAPTER, CHECKPOINT, ROWS
from fedlora.runs.manifest import Manifest
from fedlora.runs.manifest_file import MANIFEST
from fedlora.runs.row_log import RowLog


@dataclass(frozen=True)
class SavedRun:
    """The inputs of a run, and the rows of its complete rounds."""

    path: Path
    manifest: Manifest
    rows: Sequence[RoundRow]

    @classmethod
    def read(cls, path: Path) -> "SavedRun":
        """Reads a run directory; another process may be continuing the run. The rows are checked against their checksum.

        Raises:
            UserError: not the directory of a run that has begun, damaged, or its rows are of another version.
        """
        manifest = Manifest.find(path)
        if manifest is None:
            if (path / "experiment.toml").is_file():
                raise UserError(f"{path}: the run has not begun: it has no {MANIFEST} yet")
            raise UserError(f"{path}: not a run directory: it has no {MANIFEST}")
        checkpoint = path / CHECKPOINT
        try:
            note = decode_note(str(checkpoint))
        except FileNotFoundError:
            raise missing(checkpoint) from None
        except (ValueError, OSError) as error:
            raise damaged(str(error)) from error
        if note["run"] != manifest.id:
            raise damaged(f"{checkpoint} belongs to another run than {path / MANIFEST}")
        return cls(path, manifest, RowLog.read(path / ROWS, *note["rows"]).rows())

    @cached_property
    def experiment(self) -> Experiment:
        """The run's settings.

        Raises:
            UserError: one of them is unknown in this version.
        """
        return self.manifest.settings()

    @property
    def done(self) -> int:
        """The number of complete rounds."""
        return self.rows[-1].round if self.rows else 0

    @property
    def rounds(self) -> int:
        """The number of rounds that the run has when it is finished, unless it stops early."""
        return self.experiment.rounds

    @property
    def finished(self) -> bool:
        """Whether all rounds are complete, or the run has stopped early."""
        return self.done == self.rounds or stops(self.rows, self.experiment.evaluate.stop_after)

    @property
    def final(self) -> RoundRow:
        """The row of the round whose adapter is the run's result; see `until_best`."""
        return until_best(self.rows)[-1]

    def adapters(self) -> Mapping[str, Path]:
        """PEFT folders of the finished run, as in `Result.adapters`."""
        out = self.path / ADAPTER
        clients = {one.id: out / client_folder(one.id) for one in self.manifest.data.clients}
        folders = {"": out, **clients}
        return {name: folder for name, folder in folders.items() if (folder / "adapter_config.json").exists()}
