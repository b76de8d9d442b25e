"""Text classification."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional

from fedlora.data.columns import Column
from fedlora.errors import UserError
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.printable import listed
from fedlora.tasks.confusion import confusion_metrics
from fedlora.tasks.merged_models import code_for_merged
from fedlora.tasks.task import Examples
from fedlora.tasks.text_head import encode_texts, first_tokens, head_features, load_head, outline_head, text_columns

_LOAD = """\
import json
from pathlib import Path

from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = Path()  # where this file is
labels = dict(enumerate(json.loads((folder / "labels.json").read_text())))
model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, num_labels={classes}, id2label=labels, pad_token_id={pad}, ignore_mismatched_sizes=True{arguments}
)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


@dataclass(frozen=True)
class Classification:
    """Classification of texts or pairs of texts. Statistics are confusion counts, by label and prediction, and losses.

    Label smoothing and class weights change the training loss only, not that of evaluations.
    """

    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None

    peft_type: ClassVar[str | None] = "SEQ_CLS"
    pipeline_tag: ClassVar[str] = "text-classification"
    merged_code: ClassVar[str] = code_for_merged("AutoModelForSequenceClassification")
    lower_is_better = frozenset({"loss"})
    test_metrics = None
    questions = None

    def columns(self, named: Collection[str]) -> list[Column]:
        """A text or two, and the label."""
        return text_columns(named, "label")

    def partition_keys(self, train: Mapping[str, Sequence[Any]]) -> list[int]:
        """The labels."""
        return list(train["label"])

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """The texts, and all labels in turn."""
        return {"text": texts, "label": [i % max(classes, 1) for i in range(len(texts))]}

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model with a head for these labels; see `load_head`."""
        return load_head(source, self._settings(labels), seed)

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_head`."""
        return outline_head(source, self._settings(labels))

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """See `encode_texts`."""
        return encode_texts(tokenizer, columns, max_length, torch.long)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy of each example, in fp32, and the weight of its label."""
        logits = model(**inputs).logits.float()
        weights = None if self.class_weights is None else torch.tensor(self.class_weights).to(logits)
        found = functional.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=self.label_smoothing)
        return found, torch.ones_like(found) if weights is None else weights[targets]

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """Confusion counts [clients, labels, predictions], and the sum of the cross-entropies [clients].

        The prediction is the label with the largest logit, the first of several.
        """
        logits = model(**inputs).logits.float()
        losses = functional.cross_entropy(logits, targets, reduction="none").double().view(real.shape)
        clients, labels = len(real), logits.shape[-1]
        cells = (labels * targets + logits.argmax(-1)).view(real.shape)
        counts = torch.zeros(clients, labels * labels, dtype=torch.long, device=cells.device)
        counts.scatter_add_(1, cells, real.long())
        return {"confusion": counts.view(clients, labels, labels), "loss": losses.where(real, 0.0).sum(1)}

    def predict(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """The label with the largest logit, the first of several, and its probability."""
        whole: Any = model
        each = whole(**inputs).logits.float().softmax(-1)
        best = each.argmax(-1)
        names, probabilities = whole.config.id2label, each.gather(1, best[:, None])[:, 0]
        return [{"label": names[i], "probability": x} for i, x in zip(best.tolist(), probabilities.tolist(), strict=True)]

    def no_statistics(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        """No counts and no losses."""
        confusion = torch.zeros(len(labels), len(labels), dtype=torch.long)
        return {"confusion": confusion, "loss": torch.zeros((), dtype=torch.float64)}

    def check(self, statistics: Statistics) -> str | None:
        """A reason if there is not one count for each example, or a cross-entropy is negative."""
        counted = float(statistics.sums["confusion"].double().sum())
        if counted != statistics.examples:
            return f"its confusion counts are of {counted:.0f} examples, not {statistics.examples}"
        return "its loss is negative" if statistics.sums["loss"] < 0 else None

    def metrics(self, statistics: Statistics) -> Mapping[str, float]:
        """Accuracy, cross-entropy, macro F1 and Matthews correlation coefficient (see `confusion_metrics`)."""
        accuracy, f1, mcc = confusion_metrics(statistics.sums["confusion"])
        return {"accuracy": accuracy, "loss": float(statistics.sums["loss"]) / statistics.examples, "f1": f1, "mcc": mcc}

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """Loads the adapter with the head for these labels."""
        return _LOAD.format(classes=len(labels), pad=pad, arguments=arguments)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `head_features`."""
        return head_features(model, inputs)

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> Bool[Tensor, "rows longest"] | None:
        """The first ones."""
        return first_tokens(inputs)

    def _settings(self, labels: Sequence[str]) -> dict[str, Any]:
        """Settings of the model's configuration; the checkpoint may set another problem type, such as "regression".

        Raises:
            UserError: there is not one class weight for each label.
        """
        if self.class_weights is not None and len(self.class_weights) != len(labels):
            raise UserError(
                f"task.class_weights has {len(self.class_weights)} entries for {len(labels)} labels; expected one for "
                f"each, in this order: {listed(labels, 10)}"
            )
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": None,
        }
