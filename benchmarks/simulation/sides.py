"""The sides of `benchmarks/simulator.py`: the package, a hand-written loop, and a non-federated baseline."""

import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from simulation.works import Work, experiment, handed

STARTED = time.perf_counter()


def product(
    files: Sequence[str], work: Work, seed: int, clients_per_step: int, precision: str = "fp32", device: str = "cpu"
) -> dict[str, float]:
    """The package. `outside` is the part of a round's time that is not spent in training steps."""
    from fedlora.api import run
    from fedlora.federated_data import FederatedData
    from fedlora.runs.start import resolve_settings
    from fedlora.train import local

    setup = resolve_settings(experiment(files, work, seed, clients_per_step, precision, device))
    FederatedData.make(setup)
    ready, steps, train_together = time.perf_counter() - STARTED, 0.0, local.train_together

    def timed(*arguments: Any) -> Any:
        nonlocal steps
        started = time.perf_counter()
        done = train_together(*arguments)
        steps += time.perf_counter() - started
        return done

    local.train_together = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = run(setup, Path(folder, "run"), progress=False)
    finally:
        local.train_together = train_together
    seconds, last = [row.seconds.train + row.seconds.merge for row in result.rows], result.rows[-1].global_
    return {
        "seconds": statistics.median(seconds),
        "accuracy": last["accuracy"] if "accuracy" in last else last["token_accuracy"],
        "outside": 1 - steps / sum(seconds),
        "ready": ready,
    }


def by_hand(
    files: Sequence[str], work: Work, seed: int, large: bool = False, precision: str = "float32", device: str = "cpu"
) -> dict[str, float]:
    """What one would write: a PEFT model, its adapter set to the mean before each client, a fresh AdamW for each.

    With `large` the floor: one adapter, all rows of a round in large batches sorted by length, the logits of learned
    tokens only.
    """
    import torch
    from peers import work as plain

    given = handed(files, work, seed, device)
    model = given.make(getattr(torch, precision))
    mean, seconds = plain.state(model), []
    for _ in range(given.rounds):
        started, cohort = time.perf_counter(), torch.randperm(len(given.clients))[: given.chosen].tolist()
        if large:
            rows = torch.tensor([row for client in cohort for row in given.clients[client]])
            lengths = torch.tensor([len(given.ids[row]) for row in rows.tolist()])
            given.train(model, torch.split(rows[lengths.argsort()], work.large), lean=True)
        else:
            total = {name: torch.zeros_like(x) for name, x in mean.items()}
            for client in cohort:
                plain.put(model, mean)
                given.train(model, given.shuffled(client))
                for name, x in plain.state(model).items():
                    total[name] += x / len(cohort)
            plain.put(model, mean := total)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "accuracy": given.accuracy(model)}


HAND, BATCHED = "hand-written baseline, PyTorch + PEFT", "fedlora, 16 clients in a step, bf16"
SIDES: dict[str, Any] = {
    HAND: by_hand,
    "fedlora, one client at a time": lambda *given: product(*given, 1),
    "fedlora, 16 clients in a step": lambda *given: product(*given, 16),
    BATCHED: lambda *given: product(*given, 16, "bf16"),
    "non-federated, large sorted batches": lambda *given: by_hand(*given, large=True),
    "non-federated, large sorted batches, bf16": lambda *given: by_hand(*given, large=True, precision="bfloat16"),
}


def measured(sides: Iterable[str]) -> list[str]:
    """Without those in bf16 where the processor lacks the instructions: emulated, they take a hundred times as long."""
    from fedlora.train.hardware import fast_in_bf16

    return [side for side in sides if not side.endswith("bf16") or fast_in_bf16("cpu")]
