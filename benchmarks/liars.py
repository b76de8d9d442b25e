"""Accuracy with one liar among the clients, with and without the comparison of uploads with their cohort.

    python benchmarks/liars.py OUT.json [--rows 2000] [--clients 10] [--rounds 20] [--seeds 3] [--set KEY=VALUE]

For each seed: an honest run without and with `sampling.check_cohort`, and with it a run for each lie of client "000".
Prints test accuracy and loss, and the rejected and the clipped shares of client-rounds, and writes them to OUT.json.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.config.experiment import Experiment, build
from fedlora.federated_data import FederatedData
from fedlora.lifecycle import begin, rounds
from fedlora.messages import Reply, Round, Upload
from fedlora.rounds.progress import NullProgress
from fedlora.rounds.simulate import SimulationBackend
from fedlora.runs.folder import RunFolder
from fedlora.session import Session

LIAR = "000"
LIES: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
    "x10": lambda name, before, x: before + 10 * (x - before),
    "x1000": lambda name, before, x: before + 1000 * (x - before),
    "x-3": lambda name, before, x: before - 3 * (x - before),
    "(cB, A/c)": lambda name, before, x: 1000 * x if name.endswith(".b") else x / 1000 if name.endswith(".a") else x,
    "one huge entry": lambda name, before, x: x.flatten().index_fill(0, torch.tensor([1]), 1e6).view(x.shape),
}


@dataclass(frozen=True)
class Lying(SimulationBackend):
    """Client `LIAR` changes its upload before it sends it, or claims the most examples that are allowed."""

    lie: str = ""

    def train_clients(self, rnd: Round, sent: Any, pending: Any) -> Iterator[Any]:
        """The replies, one of them a lie."""
        for reply in super().train_clients(rnd, sent, pending):
            lies = isinstance(reply, Reply) and reply.client.id == LIAR and self.lie
            yield self._changed(reply, sent[reply.client]) if lies else reply

    def _changed(self, reply: Reply, before: Any) -> Reply:
        values = {k: LIES[self.lie](k, before.get(k, torch.zeros_like(x)), x) for k, x in reply.upload.values.items()}
        return replace(reply, upload=Upload(values, reply.upload.choices))


def run(experiment: Experiment, lie: str, folder: Path) -> dict[str, float]:
    """Final test scores, and the shares of client-rounds that were rejected and clipped."""
    torch.manual_seed(0)
    data = FederatedData.make(experiment)
    session = Session.make(experiment, data)
    runs = RunFolder.create(folder)
    honest = session.simulation(runs)
    backend = Lying(**{**vars(honest), "lie": lie})
    rounds(session, runs, NullProgress(), backend, begin(session, runs))
    rows = [row for row in runs.rows() if row.round > 0]
    chosen = sum(len(row.chosen) for row in rows)
    runs.release()
    last = rows[-1].global_
    return {
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "rejected": sum(len(row.rejected) for row in rows) / chosen,
        "clipped": sum(len(row.clipped or {}) for row in rows) / chosen,
    }


def main() -> None:
    """Runs all cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("rows", 2000), ("clients", 10), ("rounds", 20), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--lies", default=";".join(LIES), help="separated by semicolons")
    given = parser.parse_args()
    table = {
        "data": {"rows": given.rows},
        "clients": {"count": given.clients},
        "train": {"lr": 3e-3, "max_length": 64, "precision": "auto"},
        "evaluate": {"clients": "none", "every": given.rounds},
        "rounds": given.rounds,
    }
    found: list[dict[str, Any]] = []
    cases = [("", False), ("", True), *((lie, True) for lie in given.lies.split(";") if lie)]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for lie, checked in cases:
                changes = [f"seed={seed}", f"sampling.check_cohort={str(checked).lower()}", *given.overrides]
                result = run(build(table, changes), lie, Path(folder) / f"{len(found)}")
                found.append({"seed": seed, "lie": lie or "honest", "checked": checked, **result})
                print(found[-1], flush=True)
                given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
