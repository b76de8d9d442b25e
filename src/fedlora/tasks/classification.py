"""Text classification."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.messages import Statistics
from fedlora.models.loading import Checkpoint, load_classifier, outline_classifier
from fedlora.models.tokenizers import cached_tokens, reads_last_token
from fedlora.tasks.confusion import confusion_metrics
from fedlora.tasks.task import Encoded


class Classification:
    """Classification of texts or pairs of texts. Statistics are confusion counts, by label and prediction, and losses."""

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model with a head for these labels, initialized from `seed` if necessary; see `load_classifier`."""
        return load_classifier(source, labels, seed)

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_classifier`."""
        return outline_classifier(source, labels)

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Encoded:
        """Encodes the columns `text`, `label` and, for pairs, `text_pair`, truncated to `max_length` tokens."""
        if not len(columns["text"]):
            return Encoded({}, torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long), {})
        texts = [list(columns["text"])] + ([list(columns["text_pair"])] if "text_pair" in columns else [])
        features = cached_tokens(tokenizer, texts, max_length)
        starts, padding = features.pop("starts"), {"input_ids": tokenizer.pad_token_id}
        return Encoded(features, starts, torch.tensor(list(columns["label"])), {n: padding.get(n, 0) for n in features})

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Cross-entropy of each example, in fp32."""
        return functional.cross_entropy(model(**inputs).logits.float(), targets, reduction="none")

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


def _last(which: Bool[Tensor, "rows longest"]) -> Int[Tensor, " rows"]:
    """The index of the last true entry of each row; 0 if there is none."""
    return (which * torch.arange(which.shape[1], device=which.device)).argmax(1)
