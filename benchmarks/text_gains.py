"""Gains of generated answers from before the first round to after the last one, with bootstrap intervals over examples.

    python benchmarks/text_gains.py RUN... [--samples 2000]

RUN is the directory of a run, or of a sweep, with `evaluate.generate` and `evaluate.before`. The answers of both rounds are
read from `samples/` and paired by prompt (see `fedlora.report.text_gains`).
"""

import argparse
import tomllib
from pathlib import Path

from fedlora.report.text_gains import before_and_after, gain
from fedlora.tasks.text_metrics import TEXT_METRICS

METRICS = {"rouge": "rougeL", "bleu": "bleu", "gsm8k": "gsm8k_flexible"}


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
        answers = before_and_after(run)
        assert answers, f"{run}: has no answers before and after training"
        configured = tomllib.loads((run / "experiment.toml").read_text(encoding="utf-8"))["evaluate"]["text_metrics"]
        for key, name in ((key, name) for key, name in METRICS.items() if key in configured):
            found = gain(TEXT_METRICS[key], name, answers, given.samples)
            low, high = found.interval.low, found.interval.high
            scores = f"{found.before:.1f} | {found.after:.1f} | {low:+.1f} to {high:+.1f}"
            print(f"| {run.name} | {len(answers)} | {name} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
