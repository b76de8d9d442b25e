"""Regression of a score on a text."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from fedlora.data.columns import Column
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.tasks.correlation import pearson, spearman
from fedlora.tasks.merged_models import code_for_merged
from fedlora.tasks.task import Examples, client_sums
from fedlora.tasks.text_head import encode_texts, first_tokens, head_features, load_head, outline_head, text_columns

_BINS = 5
_SETTINGS = {"num_labels": 1, "problem_type": "regression"}
_SUMS = ("x", "y", "xx", "yy", "xy", "loss")
_LOAD = """\
from pathlib import Path

from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = Path()  # where this file is
model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, num_labels=1, problem_type="regression", pad_token_id={pad}, ignore_mismatched_sizes=True{arguments}
)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


@dataclass(frozen=True)
class Regression:
    """Regression of a score on a text or a pair of texts, by the squared error of the head's only output.

    Statistics are the sums of x, y, their squares and their product, where x is the prediction and y the score, both minus
    `center`; and the sum of the squared errors.
    """

    center: float = 0.0

    peft_type = "SEQ_CLS"
    pipeline_tag = "text-classification"  # the hub's, of text scoring too
    merged_code = code_for_merged("AutoModelForSequenceClassification")
    lower_is_better = frozenset({"mse", "loss"})
    questions = None

    def columns(self, named: Collection[str]) -> list[Column]:
        """A text or two, and the score."""
        return text_columns(named, "number")

    def partition_keys(self, train: Mapping[str, Sequence[Any]]) -> list[int]:
        """The index of the score's interval, of five equal ones between the smallest and the largest score."""
        scores = torch.tensor(train["label"], dtype=torch.float64)
        if not len(scores):
            return []
        width = scores.max() - scores.min()
        if not width:
            return [0] * len(scores)
        keys: list[int] = (_BINS * ((scores - scores.min()) / width)).long().clamp(max=_BINS - 1).tolist()
        return keys

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """The texts, and different scores."""
        return {"text": texts, "label": [self.center + i / len(texts) for i in range(len(texts))]}

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model with a head of one output; see `load_head`."""
        return load_head(source, _SETTINGS, seed)

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_head`."""
        return outline_head(source, _SETTINGS)

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """See `encode_texts`."""
        return encode_texts(tokenizer, columns, max_length, torch.float32)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The squared error of each example, in fp32, and ones."""
        found = (_predictions(model, inputs) - targets).square()
        return found, torch.ones_like(found)

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """Each of the sums [clients], in fp64."""
        predictions = _predictions(model, inputs)
        x, y = predictions.double() - self.center, targets.double() - self.center
        terms = (x, y, x * x, y * y, x * y, (predictions - targets).square().double())
        return {name: client_sums(term, real) for name, term in zip(_SUMS, terms, strict=True)}

    def predict(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """The score."""
        return [{"score": score} for score in _predictions(model, inputs).tolist()]

    def no_statistics(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        """Sums of zero."""
        return {name: torch.zeros((), dtype=torch.float64) for name in _SUMS}

    def check(self, statistics: Statistics) -> str | None:
        """A reason if a sum of squares is negative."""
        wrong = next((name for name in ("xx", "yy", "loss") if statistics.sums[name] < 0), None)
        return None if wrong is None else f"its {wrong} is negative, a sum of squares"

    def metrics(self, statistics: Statistics) -> Mapping[str, float]:
        """Pearson correlation, NaN if predictions or scores are constant; mean squared error, which is the loss."""
        mse = float(statistics.sums["loss"]) / statistics.examples
        return {"pearson": pearson(statistics.examples, statistics.sums), "mse": mse, "loss": mse}

    def test_metrics(self, each: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Spearman's rank correlation, which is NaN if predictions or scores are constant."""
        return {"spearman": spearman(each["x"], each["y"])}

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """Loads the adapter with its head of one output."""
        return _LOAD.format(pad=pad, arguments=arguments)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `head_features`."""
        return head_features(model, inputs)

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> Bool[Tensor, "rows longest"] | None:
        """The first ones."""
        return first_tokens(inputs)


def _predictions(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits  # [rows, 1]
    return logits.float().squeeze(-1)
