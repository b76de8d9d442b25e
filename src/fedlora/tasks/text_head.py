"""Models with one output for each text, or pair of texts: loading, encoding, features."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Int
from torch import Tensor, nn

from fedlora.data.columns import Column, Kind
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.loading import load_model, outline_model
from fedlora.models.tokenizers import cached_tokens, reads_last_token
from fedlora.tasks.task import Examples


def text_columns(named: Collection[str], label: Kind) -> list[Column]:
    """The columns `text`, for pairs `text_pair`, and `label`, of this kind."""
    texts = ["text", "text_pair"] if "text_pair" in named else ["text"]
    return [*(Column(name, "text") for name in texts), Column("label", label, target=True)]


def load_head(source: str, settings: Mapping[str, Any], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
    """The model with a head, initialized from `seed` if necessary; see `load_model`."""
    return load_model(source, transformers.AutoModelForSequenceClassification, settings, seed)


def outline_head(source: str, settings: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The same model without its weights; see `outline_model`."""
    return outline_model(source, transformers.AutoModelForSequenceClassification, settings)


def encode_texts(tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int, dtype: torch.dtype) -> Examples:
    """Encodes the columns of `text_columns`, truncated to `max_length` tokens, with targets of this type."""
    targets = torch.tensor(list(columns["label"]), dtype=dtype)
    if not len(columns["text"]):
        return Examples({}, torch.zeros(1, dtype=torch.long), targets, {})
    texts = [list(columns[name]) for name in ("text", "text_pair") if name in columns]
    features = cached_tokens(tokenizer, texts, max_length)
    starts, padding = features.pop("starts"), {"input_ids": tokenizer.pad_token_id}
    return Examples(features, starts, targets, {name: padding.get(name, 0) for name in features})


def head_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Last-layer features at the token that the head reads [rows, width].

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


def first_tokens(inputs: Mapping[str, Tensor]) -> Bool[Tensor, "rows longest"]:
    """The first token of each row, [CLS], which the heads of most encoders read."""
    first = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    first[:, 0] = True
    return first


def _last(which: Bool[Tensor, "rows longest"]) -> Int[Tensor, " rows"]:
    """The index of the last true entry of each row; 0 if there is none."""
    return (which * torch.arange(which.shape[1], device=which.device)).argmax(1)
