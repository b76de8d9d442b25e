"""The measurements and tables of `benchmarks/simulator.py`: every measurement runs in a process of its own."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from simulation.sides import BATCHED, HAND, SIDES, measured
from simulation.works import WORKS, Work, experiment, handed

FOLDER, SQUARE = Path(__file__).parents[1], 2048
PEERS = {
    "flower": "Flower's simulation engine, the model kept",
    "flower-afresh": "Flower's simulation engine, the model loaded by each client",
    "pfl": "pfl-research",
    "trl": "TRL, an SFTTrainer for each client",
}
"""Other frameworks, by the names of their files in `peers`, each followed by its argument if it takes one."""


def measure(side: str, work: str, files: Sequence[str], seed: int = 0, python: str = "") -> dict[str, float]:
    """One side in a process of its own: seconds of a round (median), accuracy, peak memory in MB.

    A peer needs the Python of its own environment, and gets the work in a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(FOLDER / "simulator.py"),
            *files,
            "--side",
            side,
            "--work",
            work,
            "--seed",
            str(seed),
        ]
        if side in PEERS:
            handed(files, WORKS[work], seed).write(file := Path(folder, "work.json"))
            name, *arguments = side.split("-")
            command = [python, str(FOLDER / "peers" / f"with_{name}.py"), str(file), *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    print(work, side, found, file=sys.stderr, flush=True)
    return found


def needed(files: Sequence[str], work: Work) -> float:
    """Floating-point operations of a round in the linear layers of the model's blocks."""
    from torch import nn

    from fedlora.tasks.table import task_of

    given, setup = handed(files, work, 0), experiment(files, work, 0)
    model, _ = task_of(dict(setup.task)).outline(setup.model, [str(i) for i in range(given.classes)])
    linear = [layer for layer in model.base_model.modules() if isinstance(layer, nn.Linear)]
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


def speed(work: str, files: Sequence[str], repeats: int, pythons: Mapping[str, str]) -> list[str]:
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
            f"{WORKS[work].samples / second:.{0 if second < WORKS[work].samples / 10 else 1}f}",
            f"{ratio:.2f}",
            f"{share:.0%}",
            f"{statistics.median(outside):.1%}" if outside else "",
            f"{memory:.0f} MB",
            f"{accuracy:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def accuracy(files: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Test accuracy for each seed."""
    work = WORKS["accuracy"]
    head = f"| test accuracy after {work.rounds} rounds | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |"
    lines = [head, "|---" * (len(seeds) + 2) + "|"]
    for side in measured((HAND, "fedlora, 16 clients in a step", BATCHED)):
        found = [measure(side, "accuracy", files, seed)["accuracy"] for seed in seeds]
        each = " | ".join(f"{one:.3f}" for one in (*found, statistics.mean(found)))
        lines.append(f"| {side} | {each} |")
    return [*lines, ""]


def scale(files: Sequence[str]) -> list[str]:
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
