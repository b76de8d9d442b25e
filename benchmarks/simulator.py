"""Seconds and memory of a simulated round, against a loop written by hand with PyTorch and PEFT for the same work.

    python benchmarks/simulator.py TRAIN.jsonl.gz TEST.jsonl.gz [--write docs/benchmarks/simulator.md]

Work W1: 2,000 rows, 20 clients of 100 (IID), all of them in each of 3 rounds, 1 epoch, batch 8, rank 8 and alpha 16 on
query and value, AdamW with lr 1e-3, 64 tokens at most. Both sides train in random order with padding to the longest of a
batch, both average the factors and the head. Memory: one round of 2,000 rows with 20 and with 2,000 clients. Every
measurement is a process of its own; ratios are pair by pair, the two sides in turn.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS, CLIENTS, PER_CLIENT, BATCH, LR, RANK, ALPHA, LONGEST = 3, 20, 100, 8, 1e-3, 8, 16, 64


def experiment(
    train: str, test: str, clients: int = CLIENTS, rows: int = CLIENTS * PER_CLIENT, rounds: int = ROUNDS
) -> Any:
    from fedlora.config import build

    return build(
        {
            "data": {"source": train, "test": test, "rows": rows, "test_rows": 1000},
            "rounds": rounds,
            "clients": {"count": clients, "partition": "iid", "held_out": 0.0, "min_size": 1},
            "method": {"name": "fedit", "rank": RANK},
            "lora": {"alpha": ALPHA},
            "train": {"lr": LR, "batch_size": BATCH, "max_length": LONGEST, "batches": "random"},
            "evaluate": {"every": rounds, "clients": "none"},
        }
    )


def product(train: str, test: str, clients: int, rows: int, rounds: int) -> dict[str, float]:
    """The package, one client after the other."""
    from fedlora.experiment import run

    with tempfile.TemporaryDirectory() as folder:
        result = run(experiment(train, test, clients, rows, rounds), Path(folder, "run"))
        states = sum(file.stat().st_size for file in Path(folder, "run").rglob("clients/**/*") if file.is_file())
    seconds = [row["seconds"]["train"] + row["seconds"]["merge"] for row in result.rows]
    return {"seconds": statistics.median(seconds), "accuracy": result.rows[-1]["global"]["accuracy"], "states": states}


def by_hand(train: str, test: str) -> dict[str, float]:
    """What one would write: a PEFT model, its adapter set to the mean before each client, a fresh AdamW for each."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedlora.experiment import Problem
    from fedlora.train.tasks import locate, quiet

    quiet()
    setup = experiment(train, test)
    problem = Problem.make(setup)
    path = locate(setup.model)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(problem.corpus.labels))
    lora = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=["query", "value"])
    model = get_peft_model(base, lora)
    ids = tokenizer(problem.corpus.train["text"][:], truncation=True, max_length=LONGEST)["input_ids"]
    labels = torch.tensor(problem.corpus.train["label"][:])

    def batch(rows: list[int], ids: list[list[int]]) -> dict[str, torch.Tensor]:
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[row]) for row in rows], batch_first=True)
        return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}

    mean = {name: x.clone() for name, x in get_peft_model_state_dict(model).items()}
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        total = {name: torch.zeros_like(x) for name, x in mean.items()}
        for share in problem.division.shares:
            set_peft_model_state_dict(model, mean)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
            model.train()
            order = torch.tensor(share.train)[torch.randperm(len(share.train))]
            for rows in torch.split(order, BATCH):
                loss = torch.nn.functional.cross_entropy(model(**batch(rows.tolist(), ids)).logits, labels[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            for name, x in get_peft_model_state_dict(model).items():
                total[name] += x.detach() / CLIENTS
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


def measure(side: str, files: list[str]) -> dict[str, float]:
    """One side in a process of its own: seconds of a round (median), accuracy, peak memory in MB."""
    output = subprocess.run([sys.executable, __file__, *files, "--side", side], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    return found


def table(files: list[str], repeats: int) -> str:
    pairs = [(measure("product", files), measure("by-hand", files)) for _ in range(repeats)]
    ratio = statistics.median(ours["seconds"] / hand["seconds"] for ours, hand in pairs)
    lines = [
        "| W1 | seconds a round | samples/s | peak memory | test accuracy after 3 rounds |",
        "|---|---|---|---|---|",
    ]
    for name, index in (("loop by hand, PyTorch + PEFT", 1), ("fedlora, one by one", 0)):
        runs = [pair[index] for pair in pairs]
        second, memory, accuracy = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "peak_mb", "accuracy")
        )
        samples = CLIENTS * PER_CLIENT / second
        lines.append(f"| {name} | {second:.1f} | {samples:.0f} | {memory:.0f} MB | {accuracy:.3f} |")
    few, many = measure("memory-20", files), measure("memory-2000", files)
    lines += [
        "",
        f"Seconds, fedlora / by hand: {ratio:.2f} (median of {repeats} pairs).",
        "",
        "| clients sharing 2,000 rows, one round | peak memory |",
        "|---|---|",
        f"| 20 | {few['peak_mb']:.0f} MB |",
        f"| 2,000 | {many['peak_mb']:.0f} MB |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    files = [given.train, given.test]
    if given.side is None:
        text = table(files, given.repeats)
        print(text)
        if given.write:
            given.write.write_text(f"# The simulator against a loop by hand\n\n{text}\n", encoding="utf-8")
        return
    sides = {
        "product": lambda: product(*files, CLIENTS, CLIENTS * PER_CLIENT, ROUNDS),
        "by-hand": lambda: by_hand(*files),
        "memory-20": lambda: product(*files, 20, 2000, 1),
        "memory-2000": lambda: product(*files, 2000, 2000, 1),
    }
    found = sides[given.side]()
    print(json.dumps({**found, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))


if __name__ == "__main__":
    main()
