"""Metrics of generated texts as statistics that add up over examples, batches and clients."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from fedlora.tasks.answers import exact_match, gsm8k, squad


@runtime_checkable
class TextMetric(Protocol):
    """A metric of generated texts, or several that are computed together. Values are from 0 to 100."""

    def statistics(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Shaped[Tensor, "examples sums"]:
        """Each example's statistics, given its one or more references; int64 counts or fp64 scores, as many for any text.

        Their sums over the examples are the argument of `metrics`.
        """

    def metrics(self, sums: Shaped[Tensor, " sums"], examples: int) -> dict[str, float]:
        """The metrics of this number of examples by name; NaN for no examples."""

    def check(self, sums: Shaped[Tensor, " sums"], examples: int) -> str | None:
        """The reason why finite, non-negative sums cannot be those of this number of examples; None if they can."""


@dataclass(frozen=True)
class MeanOfScores:
    """Means over the examples of scores in [0, 1], one for each name."""

    names: tuple[str, ...]
    score: Callable[[str, Sequence[str]], tuple[float, ...]]

    def statistics(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Float64[Tensor, "examples sums"]:
        """The scores."""
        scores = [self.score(text, wanted) for text, wanted in zip(predictions, references, strict=True)]
        return torch.tensor(scores, dtype=torch.float64).view(len(scores), len(self.names))

    def metrics(self, sums: Float64[Tensor, " sums"], examples: int) -> dict[str, float]:
        """The mean scores in percent."""
        return {
            name: 100 * x / examples if examples else math.nan for name, x in zip(self.names, sums.tolist(), strict=True)
        }

    def check(self, sums: Float64[Tensor, " sums"], examples: int) -> str | None:
        """A reason if a mean is above 1."""
        return "its scores exceed its examples" if (sums > examples).any() else None


@dataclass(frozen=True)
class CorpusScore:
    """The corpus score of a metric of sacrebleu, computed from the sums of the examples' n-gram counts."""

    name: str
    counts: int
    metric: Callable[[], Any]
    limits: Callable[[list[int]], list[tuple[int, int]]]
    """The pairs (number of matches, number of n-grams, which it cannot exceed) among the counts."""

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Int64[Tensor, "examples sums"]:
        """The counts of each example: for BLEU the lengths of prediction and reference, matches and n-grams of 4 orders,
        for chrF the n-grams of the prediction and of the reference and matches, for each of 6 orders."""
        extract = self.metric()._extract_corpus_statistics  # what `corpus_score` adds up
        counts = [
            extract([text], [[one] for one in wanted])[0] for text, wanted in zip(predictions, references, strict=True)
        ]
        return torch.tensor(counts, dtype=torch.long).view(len(counts), self.counts)

    def metrics(self, sums: Int64[Tensor, " sums"], examples: int) -> dict[str, float]:
        """The corpus score, not a mean of scores."""
        return {self.name: self.metric()._compute_score_from_stats(sums.tolist()).score if examples else math.nan}

    def check(self, sums: Int64[Tensor, " sums"], examples: int) -> str | None:
        """A reason if there are more matches than n-grams."""
        more = any(matches > limit for matches, limit in self.limits(sums.tolist()))
        return "its matches exceed its n-grams" if more else None

    def signature(self) -> str:
        """Sacrebleu's signature, to be reported with the score; the number of references may vary between examples."""
        metric = self.metric()
        metric.num_refs = -1  # sacrebleu's "var"
        return str(metric.get_signature())


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU  # imports lxml, which the other metrics do not need

    return BLEU(tokenize="13a", smooth_method="exp", force=True)  # no warning about texts that look tokenized


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(char_order=6, word_order=0, beta=2)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes seconds

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _rouge(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    """F1 of unigrams, bigrams and the longest common subsequence, each the best over the references.

    Words are runs of a-z and 0-9 of the lower-case text, stemmed by Porter's rules: meaningful for English only.
    """
    best = _rouge_scorer().score_multi(references, prediction)
    return tuple(float(one.fmeasure) for one in best.values())


TEXT_METRICS: Mapping[str, TextMetric] = {
    "exact-match": MeanOfScores(("exact_match",), exact_match),
    "squad": MeanOfScores(("squad_exact_match", "squad_f1"), squad),
    "gsm8k": MeanOfScores(("gsm8k_strict", "gsm8k_flexible"), gsm8k),
    "rouge": MeanOfScores(("rouge1", "rouge2", "rougeL"), _rouge),
    "bleu": CorpusScore("bleu", 10, _bleu, lambda n: list(zip(n[2:6], n[6:], strict=True))),
    "chrf": CorpusScore("chrf", 18, _chrf, lambda n: list(zip(n[2::3], map(min, n[::3], n[1::3]), strict=True))),
}
"""Each metric by name."""
