"""Time and memory of a simulated round, compared with a hand-written PyTorch + PEFT loop and other frameworks.

    python benchmarks/simulator.py TRAIN.jsonl.gz TEST.jsonl.gz [--repeats 3] [--parts W1 W2 accuracy scale]
                                   [--peers flower=PYTHON flower-afresh=PYTHON pfl=PYTHON]
                                   [--write docs/benchmarks/simulator.md]

Work W1: 2,000 rows, 20 clients of 100 (IID), all of them in each of 3 rounds, 1 epoch, batch 8, rank 8 and alpha 16 on
query and value, AdamW with lr 1e-3, 64 tokens at most. Work W2: 1,000 clients of 8 rows, 100 of them in each of 5
rounds, one step each. Batches are in random order, except in the non-federated baseline. Hand-written baseline: one
client after the other, padded to the longest row. Non-federated baseline: the same rows in batches of 128 sorted by
length, with one adapter. Factors and head are averaged. Accuracy: W1 with lr 3e-2 and alpha 1 for 24 rounds, over
seeds. Scale: 100 clients of one row in each of 20 rounds, chosen from 100 and from 10,000. Every measurement runs in
its own process; a repetition measures every side once. Peers are other frameworks, each with the Python of its own
environment (see `peers`); their memory is that of all their processes, shared pages counted once.

Share of peak: the multiply-adds of the model's linear layers for the tokens of a round, without padding, forward and
backward to their inputs (frozen weights need no more), relative to square matrix products of the same precision in the
same time.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers.work import Work as Handed

STARTED = time.perf_counter()
BATCH, RANK, LONGEST, LARGE, SQUARE = 8, 8, 64, 128, 2048


@dataclass(frozen=True)
class Work:
    """How many clients share how many rows, how many of them take part in a round, and for how many rounds."""

    clients: int
    rows: int
    chosen: int
    rounds: int
    lr: float = 1e-3
    alpha: float = 16.0

    @property
    def samples(self) -> int:
        """Trained on in a round."""
        return self.rows // self.clients * self.chosen


WORKS = {
    "W1": Work(20, 2000, 20, 3),
    "W2": Work(1000, 8000, 100, 5),
    "accuracy": Work(20, 2000, 20, 24, lr=3e-2, alpha=1.0),
    "100 clients": Work(100, 100, 100, 20),
    "10,000 clients": Work(10_000, 10_000, 100, 20),
}


def experiment(files: list[str], work: Work, seed: int, clients_per_step: int, precision: str = "fp32") -> Any:
    from fedlora.config.experiment import build

    train, test = files
    return build(
        {
            "data": {"source": train, "test": test, "rows": work.rows, "test_rows": 1000},
            "seed": seed,
            "rounds": work.rounds,
            "clients": {"count": work.clients, "partition": "iid", "held_out": 0.0, "min_size": 1},
            "method": {"name": "fedit", "rank": RANK},
            "lora": {"alpha": work.alpha},
            "sampling": {"fraction": work.chosen / work.clients},
            "train": {
                "lr": work.lr,
                "batch_size": BATCH,
                "max_length": LONGEST,
                "clients_per_step": clients_per_step,
                "precision": precision,
            },
            "evaluate": {"every": work.rounds, "clients": "none", "before": False},
        }
    )


def product(files: list[str], work: Work, seed: int, clients_per_step: int, precision: str = "fp32") -> dict[str, float]:
    """The package. `outside` is the part of a round's time that is not spent in training steps."""
    from fedlora.api import run
    from fedlora.federated_data import FederatedData
    from fedlora.runs.start import resolve_settings
    from fedlora.train import local

    setup = resolve_settings(experiment(files, work, seed, clients_per_step, precision))
    FederatedData.make(setup)
    ready, steps, train_together = time.perf_counter() - STARTED, 0.0, local.train_together

    def timed(*arguments: Any) -> Any:
        nonlocal steps
        started = time.perf_counter()
        done = train_together(*arguments)
        steps += time.perf_counter() - started
        return done

    local.train_together = timed
    with tempfile.TemporaryDirectory() as folder:
        result = run(setup, Path(folder, "run"))
    seconds = [row.seconds.train + row.seconds.merge for row in result.rows]
    return {
        "seconds": statistics.median(seconds),
        "accuracy": result.rows[-1].global_["accuracy"],
        "outside": 1 - steps / sum(seconds),
        "ready": ready,
    }


def handed(files: list[str], work: Work, seed: int) -> "Handed":
    """The work as token ids and rows, for whoever knows nothing of the package."""
    from peers.work import Work as Handed
    from transformers import AutoTokenizer

    from fedlora.federated_data import FederatedData
    from fedlora.models.loading import locate, quiet

    quiet()
    setup = experiment(files, work, seed, 1)
    problem, path = FederatedData.make(setup), locate(setup.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    train, test = (
        tokenizer(part["text"][:], truncation=True, max_length=LONGEST)["input_ids"]
        for part in (problem.labelled_data.train, problem.labelled_data.test)
    )
    return Handed(
        model=str(path),
        classes=len(problem.labelled_data.labels),
        ids=train,
        labels=problem.labelled_data.train["label"][:],
        test_ids=test,
        test_labels=problem.labelled_data.test["label"][:],
        clients=[[int(row) for row in share.train] for share in problem.partition.shares],
        chosen=work.chosen,
        rounds=work.rounds,
        lr=work.lr,
        alpha=work.alpha,
        rank=RANK,
        batch=BATCH,
        seed=seed,
    )


def by_hand(files: list[str], work: Work, seed: int, large: bool = False, precision: str = "float32") -> dict[str, float]:
    """What one would write: a PEFT model, its adapter set to the mean before each client, a fresh AdamW for each.

    With `large` the floor: one adapter, all rows of a round in large batches sorted by length.
    """
    import torch
    from peers import work as plain

    given = handed(files, work, seed)
    model = given.make(getattr(torch, precision))
    mean, seconds = plain.state(model), []
    for _ in range(given.rounds):
        started, cohort = time.perf_counter(), torch.randperm(len(given.clients))[: given.chosen].tolist()
        if large:
            rows = torch.tensor([row for client in cohort for row in given.clients[client]])
            lengths = torch.tensor([len(given.ids[row]) for row in rows.tolist()])
            given.train(model, torch.split(rows[lengths.argsort()], LARGE))
        else:
            total = {name: torch.zeros_like(x) for name, x in mean.items()}
            for client in cohort:
                plain.put(model, mean)
                given.train(model, given.shuffled(client))
                for name, x in plain.state(model).items():
                    total[name] += x / len(cohort)
            plain.put(model, mean := total)
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


PEERS = {
    "flower": "Flower's simulation engine, the model kept",
    "flower-afresh": "Flower's simulation engine, the model loaded by each client",
    "pfl": "pfl-research",
}
"""Other frameworks, by the names of their files in `peers`, each followed by its argument if it takes one."""


def measure(side: str, work: str, files: list[str], seed: int = 0, python: str = "") -> dict[str, float]:
    """One side in a process of its own: seconds of a round (median), accuracy, peak memory in MB.

    A peer needs the Python of its own environment, and gets the work in a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *files, "--side", side, "--work", work, "--seed", str(seed)]
        if side in PEERS:
            handed(files, WORKS[work], seed).write(file := Path(folder, "work.json"))
            name, *arguments = side.split("-")
            command = [python, str(Path(__file__).parent / "peers" / f"with_{name}.py"), str(file), *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    print(work, side, found, file=sys.stderr, flush=True)
    return found


def needed(files: list[str], work: Work) -> float:
    """Floating-point operations of a round in the linear layers of the model's blocks."""
    from torch import nn
    from transformers import AutoModel

    given = handed(files, work, 0)
    linear = [layer for layer in AutoModel.from_pretrained(given.model).modules() if isinstance(layer, nn.Linear)]
    tokens = work.samples * statistics.mean(map(len, given.ids))
    return 2 * 2 * tokens * sum(layer.weight.numel() for layer in linear)


def peak(precision: str) -> float:
    """Floating-point operations a second of square matrix products."""
    import torch

    x, seconds = torch.randn(SQUARE, SQUARE, dtype=getattr(torch, precision)), []
    for _ in range(10):
        started = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - started)
    return 2 * SQUARE**3 / statistics.median(seconds)


def speed(work: str, files: list[str], repeats: int, pythons: Mapping[str, str]) -> list[str]:
    """Medians over repetitions; relative speed and share of peak are computed within each repetition."""
    sides, turns, peaks = [*measured(SIDES), *pythons], [], []
    for _ in range(repeats):
        peaks.append({precision: peak(precision) for precision in ("float32", "bfloat16")})
        turns.append({side: measure(side, work, files, python=pythons.get(side, "")) for side in sides})
    flops, titles = (
        needed(files, WORKS[work]),
        ("seconds per round", "samples/s", "speed relative to baseline", "share of peak"),
    )
    lines = [
        f"| {work} | {' | '.join(titles)} | time outside steps | peak memory | test accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in sides:
        second, memory, accuracy = (
            statistics.median(turn[side][key] for turn in turns) for key in ("seconds", "peak_mb", "accuracy")
        )
        ratio = statistics.median(turn[HAND]["seconds"] / turn[side]["seconds"] for turn in turns)
        precision = "bfloat16" if side.endswith("bf16") else "float32"
        share = statistics.median(flops / t[side]["seconds"] / top[precision] for t, top in zip(turns, peaks, strict=True))
        outside = [turn[side]["outside"] for turn in turns if "outside" in turn[side]]
        cells = [
            PEERS.get(side, side),
            f"{second:.1f}",
            f"{WORKS[work].samples / second:.0f}",
            f"{ratio:.2f}",
            f"{share:.0%}",
            f"{statistics.median(outside):.1%}" if outside else "",
            f"{memory:.0f} MB",
            f"{accuracy:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def accuracy(files: list[str], seeds: Sequence[int]) -> list[str]:
    """Test accuracy for each seed."""
    work = WORKS["accuracy"]
    head = f"| test accuracy after {work.rounds} rounds | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |"
    lines = [head, "|---" * (len(seeds) + 2) + "|"]
    for side in measured((HAND, "fedlora, 16 clients in a step", BATCHED)):
        found = [measure(side, "accuracy", files, seed)["accuracy"] for seed in seeds]
        each = " | ".join(f"{one:.3f}" for one in (*found, statistics.mean(found)))
        lines.append(f"| {side} | {each} |")
    return [*lines, ""]


def scale(files: list[str]) -> list[str]:
    lines = ["| 100 clients per round, chosen from | seconds per round | start-up, imports included | peak memory |"]
    lines += ["|---|---|---|---|"]
    for work in ("100 clients", "10,000 clients"):
        found = measure(measured(("fedlora, 16 clients in a step", BATCHED))[-1], work, files)
        lines.append(f"| {work} | {found['seconds']:.2f} | {found['ready']:.1f} s | {found['peak_mb']:.0f} MB |")
    return [*lines, ""]


def processor() -> str:
    """Threads and instruction set, on which the numbers depend most."""
    import torch

    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="+", choices=["W1", "W2", "accuracy", "scale"], default=["W1", "W2", "accuracy", "scale"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the part accuracy")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME=PYTHON", help=f"available: {', '.join(PEERS)}")
    parser.add_argument("--write", type=Path, help="write the tables to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    files = [given.train, given.test]
    if given.side is not None:
        found = SIDES[given.side](files, WORKS[given.work], given.seed)
        print(json.dumps({**found, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))
        return
    pythons = dict(peer.split("=", 1) for peer in given.peers)
    parts = {
        "W1": lambda: speed("W1", files, given.repeats, pythons),
        "W2": lambda: speed("W2", files, given.repeats, pythons),
        "accuracy": lambda: accuracy(files, given.seeds),
        "scale": lambda: scale(files),
    }
    lines = [line for part in given.parts for line in parts[part]()]
    text = "\n".join(
        [
            f"Made by `benchmarks/simulator.py`, {given.repeats} repetition{'s' * (given.repeats != 1)}, {processor()}.",
            "",
            *lines,
        ]
    )
    print(text)
    if given.write:
        given.write.write_text(f"# The simulator compared with hand-written loops\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
