"""Seconds and memory of a simulated round, against loops written by hand with PyTorch and PEFT for the same work.

    python benchmarks/simulator.py TRAIN.jsonl.gz TEST.jsonl.gz [--repeats 3] [--write docs/benchmarks/simulator.md]

Work W1: 2,000 rows, 20 clients of 100 (IID), all of them in each of 3 rounds, 1 epoch, batch 8, rank 8 and alpha 16 on
query and value, AdamW with lr 1e-3, 64 tokens at most. Work W2: 1,000 clients of 8 rows, 100 of them in each of 5 rounds,
one step each. By hand: client after client, batches in random order, padded to their longest. Floor: the same rows in
batches of 128 sorted by length, one adapter, nothing federated. Factors and head are averaged. Memory: one
round of 2,000 rows with 20 and with 2,000 clients. Every measurement is a process of its own; the sides take turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH, LR, RANK, ALPHA, LONGEST, LARGE = 8, 1e-3, 8, 16, 64, 128


@dataclass(frozen=True)
class Work:
    """How many clients share how many rows, how many of them take part in a round, and for how many rounds."""

    clients: int
    rows: int
    chosen: int
    rounds: int

    @property
    def samples(self) -> int:
        """Trained on in a round."""
        return self.rows // self.clients * self.chosen


W1, W2 = Work(20, 2000, 20, 3), Work(1000, 8000, 100, 5)


def experiment(files: list[str], work: Work, together: int, precision: str = "fp32") -> Any:
    from fedlora.config import build

    train, test = files
    return build(
        {
            "data": {"source": train, "test": test, "rows": work.rows, "test_rows": 1000},
            "rounds": work.rounds,
            "clients": {"count": work.clients, "partition": "iid", "held_out": 0.0, "min_size": 1},
            "method": {"name": "fedit", "rank": RANK},
            "lora": {"alpha": ALPHA},
            "sampling": {"fraction": work.chosen / work.clients},
            "train": {
                "lr": LR,
                "batch_size": BATCH,
                "max_length": LONGEST,
                "together": together,
                "precision": precision,
            },
            "evaluate": {"every": work.rounds, "clients": "none"},
        }
    )


def product(files: list[str], work: Work, together: int, precision: str = "fp32") -> dict[str, float]:
    """The package."""
    from fedlora.experiment import run

    with tempfile.TemporaryDirectory() as folder:
        result = run(experiment(files, work, together, precision), Path(folder, "run"))
    seconds = [row["seconds"]["train"] + row["seconds"]["merge"] for row in result.rows]
    return {"seconds": statistics.median(seconds), "accuracy": result.rows[-1]["global"]["accuracy"]}


def by_hand(files: list[str], work: Work, large: bool = False, precision: str = "float32") -> dict[str, float]:
    """What one would write: a PEFT model, its adapter set to the mean before each client, a fresh AdamW for each.

    With `large` the floor: one adapter, all rows of a round in large batches sorted by length.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedlora.experiment import Problem
    from fedlora.train.tasks import locate, quiet

    quiet()
    setup = experiment(files, work, 1)
    problem = Problem.make(setup)
    path = locate(setup.model)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(problem.corpus.labels), dtype=getattr(torch, precision)
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=["query", "value"])
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    ids = tokenizer(problem.corpus.train["text"][:], truncation=True, max_length=LONGEST)["input_ids"]
    labels = torch.tensor(problem.corpus.train["label"][:])

    def batch(rows: list[int], ids: list[list[int]]) -> dict[str, torch.Tensor]:
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[row]) for row in rows], batch_first=True)
        return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}

    def cohort() -> list[torch.Tensor]:
        """The rows of each client, or of all of them together."""
        some = torch.randperm(work.clients)[: work.chosen].tolist()
        shares = [torch.tensor(problem.division.shares[i].train) for i in some]
        return [torch.cat(shares)] if large else shares

    def batches(rows: torch.Tensor) -> list[torch.Tensor]:
        if not large:
            return list(torch.split(rows[torch.randperm(len(rows))], BATCH))
        lengths = torch.tensor([len(ids[row]) for row in rows.tolist()])
        return list(torch.split(rows[lengths.argsort()], LARGE))

    mean = {name: x.clone() for name, x in get_peft_model_state_dict(model).items()}
    seconds = []
    for _ in range(work.rounds):
        started, shares = time.perf_counter(), cohort()
        total = {name: torch.zeros_like(x) for name, x in mean.items()}
        for share in shares:
            set_peft_model_state_dict(model, mean)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
            model.train()
            for rows in batches(share):
                loss = torch.nn.functional.cross_entropy(model(**batch(rows.tolist(), ids)).logits, labels[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            for name, x in get_peft_model_state_dict(model).items():
                total[name] += x.detach() / len(shares)
        mean = total
        seconds.append(time.perf_counter() - started)
    set_peft_model_state_dict(model, mean)
    model.eval()
    test_ids = tokenizer(problem.corpus.test["text"][:], truncation=True, max_length=LONGEST)["input_ids"]
    test_labels = torch.tensor(problem.corpus.test["label"][:])
    right = 0
    with torch.inference_mode():
        for rows in torch.split(torch.arange(len(test_ids)), 64):
            right += int((model(**batch(rows.tolist(), test_ids)).logits.argmax(-1) == test_labels[rows]).sum())
    return {"seconds": statistics.median(seconds), "accuracy": right / len(test_ids)}


SIDES: dict[str, Any] = {
    "loop by hand, PyTorch + PEFT": lambda files, work: by_hand(files, work),
    "fedlora, one client at a time": lambda files, work: product(files, work, 1),
    "fedlora, 16 clients in a step": lambda files, work: product(files, work, 16),
    "fedlora, 16 clients in a step, bf16": lambda files, work: product(files, work, 16, "bf16"),
    "floor": lambda files, work: by_hand(files, work, large=True),
    "floor, all in bf16": lambda files, work: by_hand(files, work, large=True, precision="bfloat16"),
}
WORKS = {"W1": W1, "W2": W2, "20 clients": Work(20, 2000, 20, 1), "2,000 clients": Work(2000, 2000, 2000, 1)}


def measure(side: str, work: str, files: list[str]) -> dict[str, float]:
    """One side in a process of its own: seconds of a round (median), accuracy, peak memory in MB."""
    command = [sys.executable, __file__, *files, "--side", side, "--work", work]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    print(work, side, found, file=sys.stderr, flush=True)
    return found


def table(files: list[str], repeats: int, works: list[str]) -> str:
    """Medians; the ratio is that of each turn to the loop by hand of the same turn."""
    hand, *_ = SIDES
    lines: list[str] = []
    for work in works:
        turns = [{side: measure(side, work, files) for side in SIDES} for _ in range(repeats)]
        lines += [
            f"| {work} | seconds a round | samples/s | times the loop by hand | peak memory | test accuracy |",
            "|---|---|---|---|---|---|",
        ]
        for side in SIDES:
            second, memory, accuracy = (
                statistics.median(turn[side][key] for turn in turns) for key in ("seconds", "peak_mb", "accuracy")
            )
            ratio = statistics.median(turn[hand]["seconds"] / turn[side]["seconds"] for turn in turns)
            samples = WORKS[work].samples / second
            lines.append(f"| {side} | {second:.1f} | {samples:.0f} | {ratio:.2f} | {memory:.0f} MB | {accuracy:.3f} |")
        lines.append("")
    lines += ["| 2,000 rows, one round, 16 clients in a step | peak memory |", "|---|---|"]
    for work in ("20 clients", "2,000 clients"):
        found = measure("fedlora, 16 clients in a step", work, files)
        lines.append(f"| {work} | {found['peak_mb']:.0f} MB |")
    return "\n".join([f"Made by `benchmarks/simulator.py`, {repeats} turns, fp32, {processor()}.", "", *lines])


def processor() -> str:
    """What the numbers depend on most."""
    import torch

    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--works", nargs="+", choices=["W1", "W2"], default=["W1", "W2"])
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    files = [given.train, given.test]
    if given.side is None:
        text = table(files, given.repeats, given.works)
        print(text)
        if given.write:
            given.write.write_text(f"# The simulator against loops by hand\n\n{text}\n", encoding="utf-8")
        return
    found = SIDES[given.side](files, WORKS[given.work])
    print(json.dumps({**found, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))


if __name__ == "__main__":
    main()
