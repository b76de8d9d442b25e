"""Text classification."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.data.labels import found_labels, label_ids
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.loading import load_model, outline_model
from fedlora.models.tokenizers import cached_tokens, reads_last_token
from fedlora.tasks.confusion import confusion_metrics
from fedlora.tasks.task import Examples

_LOAD = """\
import json
from pathlib import Path

from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = Path()  # where this file is
labels = dict(enumerate(json.loads((folder / "labels.json").read_text())))
model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, num_labels={classes}, id2label=labels, pad_token_id={pad}, ignore_mismatched_sizes=True
)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


class Classification:
    """Classification of texts or pairs of texts. Statistics are confusion counts, by label and prediction, and losses."""

    peft_type = "SEQ_CLS"
    pipeline_tag = "text-classification"

    def label_space(self, train: Sequence[str], test: Sequence[str]) -> tuple[str, ...]:
        """The labels that occur; see `found_labels`."""
        return found_labels(train, test)

    def targets(self, values: Sequence[str], labels: Sequence[str]) -> list[int]:
        """The index of each label; see `label_ids`."""
        ids = label_ids(values, labels)
        return [ids[value] for value in values]

    def partition_keys(self, targets: Sequence[int]) -> list[int]:
        """The labels."""
        return list(targets)

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model with a head for these labels, initialized from `seed` if necessary; see `load_model`."""
        return load_model(source, transformers.AutoModelForSequenceClassification, _settings(labels), seed)

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_model`."""
        return outline_model(source, transformers.AutoModelForSequenceClassification, _settings(labels))

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """Encodes the columns `text`, `label` and, for pairs, `text_pair`, truncated to `max_length` tokens."""
        if not len(columns["text"]):
            return Examples({}, torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long), {})
        texts = [list(columns["text"])] + ([list(columns["text_pair"])] if "text_pair" in columns else [])
        features = cached_tokens(tokenizer, texts, max_length)
        starts, padding = features.pop("starts"), {"input_ids": tokenizer.pad_token_id}
        return Examples(features, starts, torch.tensor(list(columns["label"])), {n: padding.get(n, 0) for n in features})

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each example, in fp32, and ones."""
        found = functional.cross_entropy(model(**inputs).logits.float(), targets, reduction="none")
        return found, torch.ones_like(found)

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

    def loading_code(self, labels: Sequence[str], pad: int) -> str:
        """Loads the adapter with the head for these labels."""
        return _LOAD.format(classes=len(labels), pad=pad)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Last-layer features at the token that the head reads.

        That is the first token ([CLS]), for decoders the last non-padding token, for encoder-decoders the last eos.
        """
        whole: Any = model
        found: list[Tensor] = []
        hook = whole.base_model.register_forward_hook(lambda *call: found.append(call[-1][0]))
        try:
            whole(**inputs)
        finally:
            hook.remove()
        (hidden,), ids = found, inputs["input_ids"]  # [rows, longest, width], [rows, longest]
        config = getattr(whole, "config", whole.base_model.config).get_text_config()
        at = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        if reads_last_token(model):
            at = _last(ids != config.pad_token_id)
        elif config.is_encoder_decoder:
            at = _last(ids == config.eos_token_id)
        return hidden[torch.arange(len(hidden), device=hidden.device), at].float()


def _settings(labels: Sequence[str]) -> dict[str, Any]:
    """Settings of the model's configuration; the checkpoint may set another problem type, such as "regression"."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": None,
    }


def _last(which: Bool[Tensor, "rows longest"]) -> Int[Tensor, " rows"]:
    """The index of the last true entry of each row; 0 if there is none."""
    return (which * torch.arange(which.shape[1], device=which.device)).argmax(1)
