"""The interface of a task (encoding, losses, metrics), and text classification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.models.loading import Checkpoint, load_classifier, outline_classifier
from fedlora.models.tokenizers import cached_tokens, reads_last_token


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids: a flat tensor for each model input, and the offsets at which examples start in all of them."""

    features: Mapping[str, Int[Tensor, " tokens"]]
    starts: Int[Tensor, " bounds"]
    targets: Tensor
    padding: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of each example."""
        return self.starts.diff()

    def batch(self, rows: Int[Tensor, " rows"], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs [rows, longest] and the targets [rows]; shorter examples are padded on the right."""
        starts, lengths = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        place = torch.arange(int(lengths.max()))  # [longest]
        inside = place < lengths[:, None]  # [rows, longest]
        at = torch.where(inside, starts[:, None] + place, 0)
        inputs = {name: flat[at].where(inside, self.padding[name]).to(device) for name, flat in self.features.items()}
        return inputs, self.targets[rows].to(device)


@runtime_checkable
class Task(Protocol):
    """Interface between the trainer and a task."""

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model, its tokenizer, and facts about its weights on disk."""

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The model without its weights, and its tokenizer."""

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Encoded:
        """Examples as token ids."""

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The loss of each example of a batch [rows]."""

    def evaluate(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Each metric of each example of a batch [rows]; a score is their mean."""

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Last-layer features of each example of a batch [rows, width]."""


class Classification:
    """Classification of texts or pairs of texts. `metrics` are the names of the metrics that `evaluate` returns."""

    metrics = ("accuracy", "loss")

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

    def evaluate(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Accuracy (0 or 1) and cross-entropy of each example."""
        logits = model(**inputs).logits.float()
        return {
            "accuracy": (logits.argmax(-1) == targets).float(),
            "loss": functional.cross_entropy(logits, targets, reduction="none"),
        }

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
