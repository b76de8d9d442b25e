"""A node's account of the privacy that its data have spent, in all runs, on its own disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fedlora.privacy.events import Truncation
from fedlora.rounds import durable

Epsilon = Callable[[Sequence["Release"], float], float]
"""The epsilon of releases, composed, at a delta."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Release(_Part):
    """`count` Gaussian releases of one client in one run, each on a Poisson sample, perhaps with a `truncation`.

    `settled` is whether the client's training has ended; until then, and after a crash for ever, all `count` are spent.
    """

    run: str
    client: str
    unit: Literal["record", "client"]
    noise_multiplier: Annotated[FiniteFloat, Field(ge=0)]
    rate: Annotated[FiniteFloat, Field(gt=0, le=1)]
    count: Annotated[int, Field(ge=0)]
    settled: bool = False
    truncation: Truncation | None = None


class _Account(_Part):
    version: Literal[1] = 1
    data: str
    releases: list[Release]


@dataclass(frozen=True)
class Budget:
    """The largest epsilon at a delta, of all runs or of one."""

    of: Literal["all runs", "one run"]
    epsilon: float
    delta: float


class BudgetSpent(Exception):
    """A release would exceed a budget; names the budget, without data."""


class LedgerDamaged(Exception):
    """The ledger's file cannot be used; names the file."""


class PrivacyLedger:
    """The account of one data set, in a file that is replaced as a whole, readable by its owner only.

    A release is on the ledger before it is made: after a crash in between it counts as spent. Several processes may use
    the file. Its checksum detects damage, not an earlier version of the file.
    """

    def __init__(self, folder: Path, data: str, epsilon: Epsilon) -> None:
        """`data` is the digest that identifies the data, see `data_digest`."""
        self.path = folder / f"{data}.json"
        self._data, self._epsilon = data, epsilon

    def reserve(self, releases: Sequence[Release], budgets: Sequence[Budget]) -> list[int]:
        """Adds the releases, all or none, before they are made; returns their places, for `settle`.

        Raises:
            BudgetSpent: they would exceed a budget; nothing was added.
            LedgerDamaged: the file is damaged, or of other data.
            RunStopped: it cannot be written.
        """
        with self._locked() as account:
            self._require(account, releases, budgets)
            found = [*account.releases, *releases]
            self._write(found)
            return list(range(len(account.releases), len(found)))

    def check(self, releases: Sequence[Release], budgets: Sequence[Budget]) -> None:
        """Raises as `reserve` would, and adds nothing."""
        with self._locked() as account:
            self._require(account, releases, budgets)

    def settle(self, places: Sequence[int], counts: Sequence[int]) -> None:
        """Replaces the counts of reserved releases by those really made.

        Raises:
            LedgerDamaged: the file is damaged, or was replaced meanwhile.
            RunStopped: it cannot be written; then the reserved counts remain spent.
        """
        with self._locked() as account:
            found = list(account.releases)
            if places and max(places) >= len(found):
                raise LedgerDamaged(f"{self.path}: was replaced by another version during a training")
            for place, count in zip(places, counts, strict=True):
                found[place] = found[place].model_copy(update={"count": count, "settled": True})
            self._write(found)

    def releases(self) -> list[Release]:
        """All releases.

        Raises:
            LedgerDamaged: the file is damaged, or of other data.
        """
        with self._locked() as account:
            return account.releases

    def _require(self, account: _Account, releases: Sequence[Release], budgets: Sequence[Budget]) -> None:
        kinds = {(budget, r.unit, r.run if budget.of == "one run" else None) for budget in budgets for r in releases}
        for budget, unit, run in kinds:  # the guarantees of the two units do not add up
            old, more = (
                [r for r in part if r.unit == unit and run in (None, r.run)] for part in (account.releases, releases)
            )
            if (epsilon := self._epsilon([*old, *more], budget.delta)) > budget.epsilon:
                spent = self._epsilon(old, budget.delta) if old else 0.0
                raise BudgetSpent(
                    f"the budget of {budget.of} is epsilon {budget.epsilon:g} at delta {budget.delta:g}; {spent:.4g} is "
                    f"spent, with this training it would be {epsilon:.4g} ({self.path})"
                )

    @contextmanager
    def _locked(self) -> Iterator[_Account]:
        durable.folder(self.path.parent)
        with FileLock(self.path.with_suffix(".lock"), mode=0o600):
            yield self._read()

    def _read(self) -> _Account:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return _Account(data=self._data, releases=[])
        digest, _, body = content.partition(b"\n")
        try:
            if digest.decode() != hashlib.sha256(body).hexdigest():
                raise ValueError("its checksum does not fit")
            account = _Account.model_validate_json(body)
            if account.data != self._data:
                raise ValueError("it is of other data")
        except (ValueError, ValidationError) as error:
            reason = "it cannot be read" if isinstance(error, ValidationError) else error
            raise LedgerDamaged(
                f"{self.path}: the privacy ledger is damaged: {reason}; restore it from a backup that has all trainings: "
                "without it, what these data have spent is not known"
            ) from None
        return account

    def _write(self, releases: Sequence[Release]) -> None:
        account = _Account(data=self._data, releases=list(releases))
        body = json.dumps(account.model_dump(), indent=1).encode()
        durable.replace(self.path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body, mode=0o600)


def default_folder() -> Path:
    """The folder of the user's accounts, `fedlora/ledger` in `$XDG_DATA_HOME` or `~/.local/share`.

    All nodes of the user share it, so that data are not accounted anew by a node with another folder.
    """
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share", "fedlora", "ledger").expanduser()


def data_digest(account: str | None, file: Path | None, source: str) -> str:
    """The digest that identifies data: of the account's name, else of the file's bytes, else of the source's name or path.

    Nothing that a server sends changes it: a digest of the examples would depend on its task and its labels.
    """
    digest = hashlib.sha256()
    if account is not None:
        digest.update(b"account\0" + account.encode())
    elif file is not None:
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    else:
        folder = Path(source)
        digest.update(b"source\0" + (str(folder.resolve()) if folder.exists() else source).encode())
    return digest.hexdigest()
