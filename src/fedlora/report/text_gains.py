"""Gains of a run's generated answers in its text metrics, with 95 % bootstrap intervals over the examples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedlora.report.intervals import Interval
from fedlora.runs.folder import SAMPLES
from fedlora.tasks.text_metrics import TextMetric


@dataclass(frozen=True)
class Answers:
    """The generated answers to a prompt before and after training, and its references."""

    prompt: str
    references: Sequence[str]
    before: str
    after: str


@dataclass(frozen=True)
class Gain:
    """A metric before and after training, and the interval of the difference."""

    before: float
    after: float
    interval: Interval


def before_and_after(run: Path) -> list[Answers]:
    """The answers of the first and of the last evaluation in a run's directory, ordered by prompt.

    Empty if there are fewer than two evaluations with answers, see `evaluate.generate` and `evaluate.before`.

    Raises:
        ValueError: the two have other prompts.
    """
    files = sorted((run / SAMPLES).glob("round-*.jsonl"), key=lambda file: int(file.stem.partition("-")[2]))
    if len(files) < 2:
        return []
    before, after = (_rows(file) for file in (files[0], files[-1]))
    if before.keys() != after.keys():
        raise ValueError(f"{files[0]} and {files[-1]} have different prompts")
    return [
        Answers(prompt, row["references"], row["answer"], after[prompt]["answer"]) for prompt, row in sorted(before.items())
    ]


def gain(metric: TextMetric, name: str, answers: Sequence[Answers], resamples: int = 2000) -> Gain:
    """The gain in the metric of this name, one of those of `metric`.

    The interval has the percentiles of the difference of the two scores over resampled examples. Corpus scores such as
    BLEU are computed anew from the sums of each resample.
    """
    references = [one.references for one in answers]
    before, after = (
        metric.statistics(texts, references) for texts in ([one.before for one in answers], [one.after for one in answers])
    )

    def score(statistics: Tensor) -> float:
        return metric.metrics(statistics.sum(0), len(statistics))[name]

    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(answers), (len(answers),), generator=generator) for _ in range(resamples)]
    differences = torch.tensor([score(after[rows]) - score(before[rows]) for rows in draws], dtype=torch.float64)
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Gain(score(before), score(after), Interval(low, high))


def _rows(file: Path) -> Mapping[str, Mapping[str, str]]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {row["prompt"]: row for row in rows}
