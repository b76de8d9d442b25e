"""Gains of generated answers from before the first round to after the last one, with bootstrap intervals over examples.

    python benchmarks/text_gains.py RUN... [--samples 2000]

RUN is the directory of a run, or of a sweep, with `evaluate.generate` and `evaluate.before`. The answers of both rounds are
read from `samples/` and paired by prompt. The 95 % interval has the percentiles of the difference of the two scores over
resampled examples; corpus scores such as BLEU are computed anew from the sums of each resample.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from fedlora.tasks.text_metrics import TEXT_METRICS, TextMetric

METRICS = {"rouge": "rougeL", "bleu": "bleu", "gsm8k": "gsm8k_flexible"}


def answers(file: Path) -> dict[str, tuple[str, list[str]]]:
    """Answer and references by prompt."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {row["prompt"]: (row["answer"], row["references"]) for row in rows}


def statistics(metric: TextMetric, found: dict[str, tuple[str, list[str]]]) -> Tensor:
    """Each example's statistics, in the order of the prompts."""
    texts, references = zip(*(found[prompt] for prompt in sorted(found)), strict=True)
    return metric.statistics(texts, references)


def gain(metric: TextMetric, name: str, before: Tensor, after: Tensor, samples: int) -> tuple[float, float, float, float]:
    """The scores before and after, and the bounds of the interval of their difference."""

    def score(statistics: Tensor) -> float:
        return metric.metrics(statistics.sum(0), len(statistics))[name]

    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(before), (len(before),), generator=generator) for _ in range(samples)]
    differences = torch.tensor([score(after[rows]) - score(before[rows]) for rows in draws], dtype=torch.float64)
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return score(before), score(after), low, high


def runs(folder: Path) -> list[Path]:
    """The runs of a sweep, or the run itself, that have answers."""
    return sorted(file.parent for file in [folder / "samples", *folder.glob("runs/*/samples")] if file.is_dir())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=2000)
    given = parser.parse_args()
    print("| run | examples | metric | before | after | 95 % interval of the gain |\n|---|---|---|---|---|---|")
    for run in (run for folder in given.runs for run in runs(folder)):
        rounds = sorted((run / "samples").glob("round-*.jsonl"), key=lambda file: int(file.stem.partition("-")[2]))
        before, after = (answers(file) for file in (rounds[0], rounds[-1]))
        assert before.keys() == after.keys(), f"{run}: the prompts differ"
        for key, name in METRICS.items():
            metric = TEXT_METRICS[key]
            pair = [statistics(metric, found) for found in (before, after)]
            first, last, low, high = gain(metric, name, *pair, given.samples)
            print(
                f"| {run.name} | {len(before)} | {name} | {first:.1f} | {last:.1f} | {low:+.1f} to {high:+.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
