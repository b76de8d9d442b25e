"""What the tests of runs over a wire share: a tiny problem, and when two runs are the same."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora.rounds.row import RoundRow
from fedlora.runs.folder import RunFolder

from rows import untimed
from tiny import tiny_bert, tiny_rows

CLIENTS = ("000", "001", "002", "003")


def furnish(home: Path) -> Path:
    """Puts the model and the rows of `problem` there."""
    tiny_bert(home / "bert")
    tiny_rows(home / "rows.jsonl", 80)
    return home


def problem(home: Path, method: str = "fedit", **more: Any) -> dict[str, Any]:
    """The table of an experiment of four clients on the model and the rows in `home`."""
    return {
        "model": str(home / "bert"),
        "data": {"source": str(home / "rows.jsonl")},
        "rounds": 3,
        "clients": {"count": 4, "partition": "iid"},
        "method": {"name": method, "rank": 2},
        "train": {"batch_size": 8, "max_length": 16, "lr": 1e-2, "device": "cpu", "clients_per_step": 1},
        "deploy": {"poll": 0.01, "deadline": 5.0},
        **more,
    }


def assert_same_runs(one: Path, other: Path) -> None:
    """The rows but for the times, what the server knows and the base updates are the same, bit for bit."""
    assert rows_of(one) == rows_of(other)
    left, right = known(one), known(other)
    assert left.keys() == right.keys()
    differing = [name for name in left if not _equal(left[name], right[name])]
    assert differing == []


def rows_of(path: Path) -> list[RoundRow]:
    """The rows of the round log without the times; the first is that of the model before training."""
    folder = RunFolder(path)
    try:
        folder.restore()
        return [untimed(row) for row in folder.rows()]
    finally:
        folder.release()


def known(path: Path) -> dict[str, Any]:
    """The server's state after the last round, and the base updates, under names that do not depend on the order."""
    folder = RunFolder(path)
    try:
        done, progress = folder.restore()
        base_updates = {f"base update {i}": folder.base_update(i) for i in progress.base_updates.rounds}
        return dict(_leaves({"done": done, "server": progress.server, **base_updates}))
    finally:
        folder.release()


def _leaves(state: Any, at: str = "") -> list[tuple[str, Any]]:
    if isinstance(state, Mapping):
        return [leaf for key, value in state.items() for leaf in _leaves(value, f"{at}/{key}")]
    if isinstance(state, list | tuple):
        return [leaf for i, value in enumerate(state) for leaf in _leaves(value, f"{at}/{i}")]
    if is_dataclass(state):
        return [leaf for f in fields(state) for leaf in _leaves(getattr(state, f.name), f"{at}/{f.name}")]
    return [(at, state)]


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)
