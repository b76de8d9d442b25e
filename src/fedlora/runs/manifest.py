"""Manifest of a run's inputs, by which resuming and exporting detect changes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedlora.config.experiment import Experiment
from fedlora.errors import UserError
from fedlora.messages import ClientInfo
from fedlora.printable import listed
from fedlora.runs.manifest_file import MANIFEST, read_manifest


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Examples(_Part):
    """Examples as used: their number, and a SHA-256 of all their columns in order."""

    count: int
    digest: str


class Client(_Part):
    """Serializable `ClientInfo`."""

    id: str
    rank: int
    examples: int
    task: str = ""


class DataFingerprint(_Part):
    """Fingerprint of the examples as used by a run; the only content that it contains are the labels' names.

    `partition` is a digest of the rows of each client.
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
    """Inputs of a run.

    `experiment` has every setting, including those that are None. `model` has a digest of each file of a local model, or
    the commit of a hub model (see `models.fingerprint`). `modules` names adapted modules and fully trained parameters;
    `environment` is the digest of environment.json. `trained` has a client's number of training examples with targets if
    others have none.
    """

    id: str
    experiment: dict[str, Any]
    data: DataFingerprint
    model: dict[str, str]
    modules: list[str]
    environment: str
    trained: dict[str, int] = {}

    def clients(self) -> list[ClientInfo]:
        """The clients, with the numbers of examples on which they trained."""
        infos = self.data.client_infos()
        return [replace(one, examples=self.trained.get(one.id, one.examples)) for one in infos]

    @classmethod
    def find(cls, folder: Path) -> "Manifest | None":
        """Reads the manifest of the run in this folder; None if the run has not begun.

        Raises:
            UserError: it is damaged, or from another version.
        """
        found = read_manifest(folder)
        try:
            return None if found is None else cls.model_validate(found)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(f"{folder / MANIFEST}: written by another version of fedlora: {where}") from error

    def settings(self) -> Experiment:
        """Experiment of the run.

        Raises:
            UserError: one of its settings is unknown in this version.
        """
        try:
            return Experiment.model_validate(self.experiment)
        except UserError as error:
            raise UserError(f"the run's settings are not supported by this version: {error}") from None

    def require_data(self, now: DataFingerprint) -> None:
        """Checks that the data are those with which the run began.

        Raises:
            UserError: they differ; names the difference.
        """
        was = self.data
        _require_labels(was.labels, now.labels)
        _require_examples("training", was.train, now.train)
        _require_examples("test", was.test, now.test)
        if (was.partition, was.clients) != (now.partition, now.clients):
            raise UserError(
                "the same data and settings now give a different partition than in the run; install the versions of "
                "numpy, torch and flwr-datasets in its environment.json"
            )

    def require_test_set(self, now: DataFingerprint) -> None:
        """Checks that labels and test set are those with which the run began.

        Raises:
            UserError: they differ; names the difference.
        """
        _require_labels(self.data.labels, now.labels)
        _require_examples("test", self.data.test, now.test)

    def require_model(self, source: str, now: Mapping[str, str]) -> None:
        """Checks that the model is the one with which the run began.

        Raises:
            UserError: it differs; names the file.
        """
        for name in sorted(self.model.keys() | now.keys()):
            if self.model.get(name) != now.get(name):
                how = "is missing" if name not in now else "is new" if name not in self.model else "has changed"
                raise UserError(f"model = {source!r} differs from that of the run: its {name} {how}")

    def require_modules(self, modules: Sequence[str]) -> None:
        """Checks that the adapted modules are those of the run.

        Raises:
            UserError: they differ; names one.
        """
        if differing := sorted(set(self.modules) ^ set(modules)):
            how = "is no longer adapted or trained" if differing[0] in self.modules else "was not adapted or trained before"
            raise UserError(
                f"the model is adapted in different modules than in the run: {differing[0]} {how}; install the versions of "
                "peft and transformers in its environment.json"
            )


def _require_labels(was: Sequence[str], now: Sequence[str]) -> None:
    if change := _of_labels(was, now):
        raise UserError(f"the data differ from those of the run: {change}")


def _require_examples(kind: str, was: Examples, now: Examples) -> None:
    if was.count != now.count:
        raise UserError(f"the data differ from those of the run: it has {was.count} {kind} examples, found {now.count}")
    if was != now:
        raise UserError(f"the data differ from those of the run: some of its {was.count} {kind} examples have changed")


def _of_labels(was: Sequence[str], now: Sequence[str]) -> str:
    """Describes how the labels differ; empty if they are equal."""
    missing, new = [name for name in was if name not in now], [name for name in now if name not in was]
    if len(missing) == len(new) == 1:
        return f"label {missing[0]!r} of the run is now {new[0]!r}"
    if missing or new:
        parts = [
            f"{word} {listed(list(map(repr, names)), 3)}" for word, names in (("without", missing), ("with", new)) if names
        ]
        return f"it has {len(was)} labels, found {len(now)}, {' and '.join(parts)}"
    moved = next((i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b), None)
    return "" if moved is None else f"label {was[moved]!r} was number {moved} and is now number {now.index(was[moved])}"
