"""What a run depends on, kept in its folder, so that it resumes and exports as it began or says what has changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedlora.config import Experiment
from fedlora.errors import UserError
from fedlora.messages import ClientInfo
from fedlora.runs.folder import MANIFEST, read_manifest


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Examples(_Part):
    """Examples as they are used: how many, and a SHA-256 of all their columns in their order."""

    count: int
    digest: str


class Client(_Part):
    """A client, as `ClientInfo`."""

    id: str
    rank: int
    examples: int
    task: str = ""


class DataFingerprint(_Part):
    """The examples as a run uses them, without any of their content but the labels' names.

    `partition` is a digest of the rows that each client has.
    """

    labels: list[str]
    train: Examples
    test: Examples
    partition: str
    clients: list[Client]

    def client_infos(self) -> list[ClientInfo]:
        """The clients."""
        return [ClientInfo(one.id, one.rank, one.examples, one.task) for one in self.clients]


class Manifest(_Part):
    """What a run depends on.

    `experiment` has every setting, None included. `model` has a digest for each file of a local model, or the commit of one
    on the hub (see `train.fingerprint`). `modules` are the names of what carries adapters or is trained as a whole;
    `environment` is the digest of environment.json.
    """

    id: str
    experiment: dict[str, Any]
    data: DataFingerprint
    model: dict[str, str]
    modules: list[str]
    environment: str

    @classmethod
    def find(cls, folder: Path) -> "Manifest | None":
        """That of the run in this folder; None if it has not begun.

        Raises:
            UserError: it is damaged, or of another version.
        """
        found = read_manifest(folder)
        try:
            return None if found is None else cls.model_validate(found)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(f"{folder / MANIFEST}: written by another version of fedlora: {where}") from error

    def settings(self) -> Experiment:
        """The experiment.

        Raises:
            UserError: this version does not know one of its settings.
        """
        try:
            return Experiment.model_validate(self.experiment)
        except UserError as error:
            raise UserError(f"the run's settings are not those of this version: {error}") from None

    def require_data(self, now: DataFingerprint) -> None:
        """Nothing, if this is the data that the run began with.

        Raises:
            UserError: it is not; says what differs.
        """
        was = self.data
        if change := _of_labels(was.labels, now.labels):
            raise UserError(f"the data are not those of the run: {change}")
        for kind, then, there in (("training", was.train, now.train), ("test", was.test, now.test)):
            if then.count != there.count:
                raise UserError(
                    f"the data are not those of the run: it has {then.count} {kind} examples, there are now {there.count}"
                )
            if then != there:
                raise UserError(f"the data are not those of the run: some of its {then.count} {kind} examples have changed")
        if (was.partition, was.clients) != (now.partition, now.clients):
            raise UserError(
                "the same data and settings now give the clients other examples than in the run; install the versions of "
                "numpy, torch and flwr-datasets that its environment.json names"
            )

    def require_model(self, source: str, now: Mapping[str, str]) -> None:
        """Nothing, if this is the model that the run began with.

        Raises:
            UserError: it is not; names the file that differs.
        """
        for name in sorted(self.model.keys() | now.keys()):
            if self.model.get(name) != now.get(name):
                how = "is missing" if name not in now else "is new" if name not in self.model else "has changed"
                raise UserError(f"model = {source!r} is not that of the run: its {name} {how}")

    def require_modules(self, modules: Sequence[str]) -> None:
        """Nothing, if these are the modules that carry the run's adapters.

        Raises:
            UserError: they are not; names one.
        """
        if differing := sorted(set(self.modules) ^ set(modules)):
            how = "is no longer adapted or trained" if differing[0] in self.modules else "was not adapted or trained before"
            raise UserError(
                f"the model is adapted in other places than in the run: {differing[0]} {how}; install the versions of peft "
                "and transformers that its environment.json names"
            )


def _of_labels(was: Sequence[str], now: Sequence[str]) -> str:
    """How the labels differ; empty if they do not."""
    gone, come = [name for name in was if name not in now], [name for name in now if name not in was]
    if len(gone) == len(come) == 1:
        return f"label {gone[0]!r} of the run is now {come[0]!r}"
    if gone or come:
        parts = [f"{word} {_some(names)}" for word, names in (("without", gone), ("with", come)) if names]
        return f"it has {len(was)} labels, there are now {len(now)}, {' and '.join(parts)}"
    moved = next((i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b), None)
    return "" if moved is None else f"label {was[moved]!r} was number {moved} and is now number {now.index(was[moved])}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
