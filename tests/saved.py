"""Run directories that no training wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.experiment import build
from fedlora.rounds.row import ClientRow, RoundRow, Seconds
from fedlora.rounds.score_summary import Summary
from fedlora.runs.folder import RunFolder
from fedlora.runs.manifest import Client, DataFingerprint, Examples, Manifest

from rows import round_row


def summary(each: Mapping[str, float]) -> Summary:
    """Of clients with equally many examples."""
    values = sorted(each.values())
    mean = sum(values) / len(values)
    return Summary(mean, values[0], (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5, dict(each))


def scored(number: int, accuracy: float, each: Mapping[str, float], **given: Any) -> RoundRow:
    """A row with these accuracies, losses of 1 - accuracy, and 3 steps and 100 bytes of each client."""
    values = {
        "attempts": 1,
        "per_client": {client: ClientRow(100, 200, 1.0, 0.5, 3) for client in each},
        "bytes_up": 100 * len(each),
        "bytes_down": 200 * len(each),
        "train_loss": 0.5,
        "aggregation_error": 0.25,
        "global_": {"accuracy": accuracy, "loss": 1 - accuracy, "examples": 9},
        "clients": {"accuracy": summary(each), "loss": summary({client: 1 - x for client, x in each.items()})},
        "seconds": Seconds(train=2.0),
    }
    return round_row(number, **{**values, **given})


def write_run(
    path: Path,
    rows: Sequence[RoundRow],
    *overrides: str,
    partition: str = "p",
    train: str = "t",
    test: str = "s",
    model: str = "m",
    examples: Sequence[int] = (10, 10, 10, 10),
) -> Path:
    """Writes a run of as many rounds as rows unless an override sets `rounds`; the path."""
    experiment = build({"rounds": len(rows)}, overrides)
    data = DataFingerprint(
        labels=["a", "b"],
        train=Examples(count=40, digest=train),
        test=Examples(count=9, digest=test),
        partition=partition,
        clients=[Client(id=f"c{i}", rank=4, examples=count) for i, count in enumerate(examples)],
    )
    manifest = Manifest(
        id=path.name,
        experiment=experiment.model_dump(mode="json"),
        data=data,
        model={"config.json": model},
        modules=["q"],
        environment="e",
    )
    folder = RunFolder.create(path)
    folder.begin(manifest.model_dump(), None)
    for row in rows:
        folder.commit(row.round, None, row)
    folder.release()
    return path
