"""Result of a finished run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedlora.errors import UserError

_BY_CLIENT = ("rejected", "each")
"""Entries of a row whose keys are client ids."""

_ACCURACIES = {"global.accuracy": "test accuracy", "clients.accuracy.mean": "held-out accuracy"}


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run: its folder, its method's name, the rows of its round log, and its adapters.

    `adapters` has the PEFT folder of the global adapter under the empty name, or that of each client under the client's id.
    `left_out` is the reason for missing adapters, if any.
    """

    folder: Path
    method: str
    rows: Sequence[Mapping[str, Any]]
    adapters: Mapping[str, Path]
    left_out: str = ""

    def to_pandas(self) -> Any:
        """Returns a `pandas.DataFrame` with one row per round and columns such as `train_loss` or `clients.accuracy.mean`.

        Lists of clients, and mappings of clients to values, are one cell each.

        Raises:
            UserError: pandas is not installed.
        """
        return _package("pandas").DataFrame([dict(_flat(row)) for row in self.rows])

    def plot(self) -> Any:
        """Returns new `matplotlib` axes with the training loss by round, and the accuracies on a second scale.

        Raises:
            UserError: matplotlib or pandas is not installed.
        """
        rounds = self.to_pandas().set_index("round")
        axes = _package("matplotlib.pyplot").subplots()[1]
        accuracy = axes.twinx()
        for color, (name, label) in enumerate({"train_loss": "training loss", **_ACCURACIES}.items()):
            if name in rounds:
                values = rounds[name].dropna().astype(float)  # missing in rounds without an evaluation
                drawn_on = axes if name == "train_loss" else accuracy
                drawn_on.plot(values.index, values, "o-", label=label, color=f"C{color}")
        axes.set(xlabel="round", ylabel="training loss", title=self.method)
        axes.xaxis.get_major_locator().set_params(integer=True)
        accuracy.set(ylabel="accuracy", ylim=(0, 1))
        axes.legend(handles=[*axes.lines, *accuracy.lines])
        return axes

    def __repr__(self) -> str:
        last = [(label, value) for row in self.rows for name, value in _flat(row) if (label := _ACCURACIES.get(name))]
        accuracies = [f"{label} {value:.3f}" for label, value in dict(last).items() if value is not None]
        rounds = f"{len(self.rows)} round{'' if len(self.rows) == 1 else 's'}"
        return f"Result({', '.join([self.method, rounds, *accuracies, repr(str(self.folder))])})"


def _flat(row: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a row by their dotted names."""
    for key, value in row.items():
        if isinstance(value, Mapping) and key not in _BY_CLIENT:
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _package(name: str) -> Any:
    """Imports a module that is needed only here."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{package} is not installed; install it with: pip install {package}") from None
