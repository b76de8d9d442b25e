"""Result of a run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedlora.errors import UserError
from fedlora.printable import number
from fedlora.rounds.early_stopping import until_best
from fedlora.rounds.row import RoundRow, key
from fedlora.runs.saved_run import SavedRun

_NESTED = ("largest_upload", "global_", "clients", "seconds", "notes")
"""Entries of a row with one column for each number in them."""


@dataclass(frozen=True, repr=False)
class Result:
    """A run: its folder, its method's name, the rows of its round log, and its adapters.

    `adapters` has the PEFT folder of the global adapter under the empty name, or that of each client under the client's id.
    `left_out` is the reason for missing adapters, if any.
    """

    folder: Path
    method: str
    rows: Sequence[RoundRow]
    adapters: Mapping[str, Path]
    left_out: str = ""

    @classmethod
    def read(cls, path: str | Path) -> "Result":
        """The result of an earlier run, which may be unfinished; reads its directory without loading a model.

        Raises:
            UserError: not the directory of a run that has begun, damaged, or from another version.
        """
        saved = SavedRun.read(Path(path))
        return cls(saved.path, saved.experiment.method.name, saved.rows, saved.adapters())

    @property
    def main_metric(self) -> str:
        """The task's main metric, such as accuracy; `score` if nothing was evaluated."""
        return next((name for row in self.rows if (name := row.main_metric)), "score")

    @property
    def best_round(self) -> int | None:
        """The round of the adapters; None without `evaluate.stop_after`, for then they are those after the last round."""
        return self.rows[-1].best_round if self.rows else None

    def to_pandas(self) -> Any:
        """Returns a `pandas.DataFrame` with one row per round and columns such as `train_loss` or `clients.accuracy.mean`.

        The columns are in the order of docs/rounds.md, whatever a round has; absent values are missing. Lists of clients,
        and mappings of clients to values, are one cell each.

        Raises:
            UserError: pandas is not installed.
        """
        frame = package("pandas").DataFrame([dict(_columns(row)) for row in self.rows])
        order = [key(one.name) for one in fields(RoundRow)]
        place = {name: order.index(first) for name in frame if (first := name.partition(".")[0]) in order}
        return frame[sorted(frame, key=lambda name: place.get(name, len(order)))]

    def clients(self) -> Any:
        """Returns a `pandas.DataFrame` with one row per round and client, and columns such as `loss` or `bytes_up`.

        Raises:
            UserError: pandas is not installed.
        """
        return package("pandas").DataFrame(
            [
                {"round": row.round, "client": client, **vars(one)}
                for row in self.rows
                for client, one in row.per_client.items()
            ]
        )

    def plot(self) -> Any:
        """Returns new `matplotlib` axes with the training loss by round, and the main metric on a second scale.

        Raises:
            UserError: matplotlib or pandas is not installed.
        """
        rounds = self.to_pandas().set_index("round")
        axes = package("matplotlib.pyplot").subplots()[1]
        metric = axes.twinx()
        for color, (name, label) in enumerate({"train_loss": "training loss", **self._scores()}.items()):
            if name in rounds:
                values = rounds[name].dropna().astype(float)  # missing in rounds without an evaluation
                drawn_on = axes if name == "train_loss" else metric
                drawn_on.plot(values.index, values, "o-", label=label, color=f"C{color}")
        axes.set(xlabel="round", ylabel="training loss", title=self.method)
        axes.xaxis.get_major_locator().set_params(integer=True)
        metric.set(ylabel=self.main_metric)
        if all(0 <= value <= 1 for line in metric.lines for value in line.get_ydata()):
            metric.set(ylim=(0, 1))
        axes.legend(handles=[*axes.lines, *metric.lines])
        return axes

    def __repr__(self) -> str:
        labels = self._scores()
        last = {labels[name]: value for row in until_best(self.rows) for name, value in _columns(row) if name in labels}
        scores = [f"{label} {number(value, 3)}" for label, value in last.items()]
        count = self.rows[-1].round if self.rows else 0
        rounds = f"{count} round{'' if count == 1 else 's'}"
        rounds += "" if self.best_round is None else f", best {self.best_round}"
        return f"Result({', '.join([self.method, rounds, *scores, repr(str(self.folder))])})"

    def _scores(self) -> Mapping[str, str]:
        """The columns of the main metric, and what they are called."""
        name = self.main_metric
        return {f"global.{name}": f"test {name}", f"clients.{name}.mean": f"held-out {name}"}


def _columns(row: RoundRow) -> Iterator[tuple[str, Any]]:
    """Names and values of a row's columns."""
    for name, value in vars(row).items():
        if name in _NESTED:
            yield from _nested(value, "" if name == "notes" else f"{key(name)}.")
        else:
            yield name, value


def _nested(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    for name, item in (vars(value) if is_dataclass(value) else value or {}).items():
        if is_dataclass(item):
            yield from _nested(item, f"{at}{name}.")
        else:
            yield f"{at}{name}", item


def package(name: str) -> Any:
    """Imports a module that is needed only here."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{package} is not installed; install it with: pip install {package}") from None
