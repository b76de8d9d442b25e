"""Metrics of classifications from confusion counts."""

import math

from jaxtyping import Int
from torch import Tensor


def confusion_metrics(confusion: Int[Tensor, "labels labels"]) -> tuple[float, float, float]:
    """Accuracy, macro F1 and Matthews correlation coefficient of counts by label (rows) and prediction (columns).

    They equal scikit-learn's `accuracy_score`, `f1_score(average="macro")` and `matthews_corrcoef`: macro F1 is the mean
    over the labels that occur among the labels or the predictions; the coefficient is 0 if its denominator is. NaN for no
    examples.
    """
    counts = confusion.double()
    examples, right = float(counts.sum()), counts.diagonal()
    if not examples:
        return math.nan, math.nan, math.nan
    labelled, predicted = counts.sum(1), counts.sum(0)
    occurs = labelled + predicted > 0
    f1 = (2 * right / (labelled + predicted))[occurs].mean()
    square = examples * examples
    spread = float((square - labelled @ labelled) * (square - predicted @ predicted))
    covariance = examples * float(right.sum()) - float(labelled @ predicted)
    mcc = covariance / math.sqrt(spread) if spread else 0.0
    return float(right.sum()) / examples, float(f1), mcc
