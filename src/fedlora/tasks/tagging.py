"""Token classification: a tag for each word of a text."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.data.columns import Column
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.loading import load_model, outline_model
from fedlora.tasks.entities import inner, scheme
from fedlora.tasks.merged_models import code_for_merged
from fedlora.tasks.task import NO_TARGET, Examples
from fedlora.tasks.token_features import mean_of_tokens
from fedlora.tasks.word_tokens import word_tokens

_COUNTS = ("targets", "words", "right")
_LOAD = """\
import json
from pathlib import Path

from peft import AutoPeftModelForTokenClassification
from transformers import AutoTokenizer

folder = Path()  # where this file is
labels = dict(enumerate(json.loads((folder / "labels.json").read_text())))
model = AutoPeftModelForTokenClassification.from_pretrained(
    folder, num_labels={classes}, id2label=labels, pad_token_id={pad}, ignore_mismatched_sizes=True{arguments}
)
tokenizer = AutoTokenizer.from_pretrained(folder)
# for words: tokenizer(words, is_split_into_words=True); a tokenizer like GPT-2's needs a blank before each word
"""


@dataclass(frozen=True)
class Tagging:
    """Classification of the words of a text, each at its first token.

    The targets of an example are those of its tokens, and after them the tags of all words. A tag that belongs to no first
    token, that of a word's other token or of a word without tokens, is stored as `_other(tag)`. Statistics are the sum of
    the losses, the numbers of targets, of words and of correct tags, and for each type of entity the numbers of correct,
    predicted and gold ones.
    """

    all_subwords: bool = False

    peft_type = "TOKEN_CLS"
    pipeline_tag = "token-classification"
    merged_code = code_for_merged("AutoModelForTokenClassification")
    lower_is_better = frozenset({"loss"})
    test_metrics = None
    questions = None

    def columns(self, named: Collection[str]) -> list[Column]:
        """The words, and their tags."""
        return [Column("tokens", "texts"), Column("tags", "tags", of="tokens", target=True)]

    def partition_keys(self, train: Mapping[str, Sequence[Any]]) -> None:
        """None: a text has many tags."""

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """The words of the texts, and all tags in turn."""
        tokens = [text.split() for text in texts]
        return {
            "tokens": tokens,
            "tags": [[(i + j) % max(classes, 1) for j in range(len(t))] for i, t in enumerate(tokens)],
        }

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model with a head for these tags; see `load_model`."""
        return load_model(source, transformers.AutoModelForTokenClassification, _settings(labels), seed)

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_model`."""
        return outline_model(source, transformers.AutoModelForTokenClassification, _settings(labels))

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """See `word_tokens` and the targets of this class; a text whose words are all truncated has no target."""
        none = torch.zeros(1, dtype=torch.long)
        if not len(columns["tokens"]):
            return Examples({}, none, none[:0], {}, none)
        features = word_tokens(tokenizer, columns["tokens"], max_length)
        starts, words = features.pop("starts"), features.pop("words")
        own = [part.tolist() for part in torch.split(words, starts.diff().tolist())]
        targets = list(map(self._targets, own, columns["tags"]))
        padding = {"input_ids": tokenizer.pad_token_id}
        return Examples(
            features,
            starts,
            torch.tensor(list(chain.from_iterable(targets))),
            {name: padding.get(name, 0) for name in features},
            torch.tensor([0, *map(len, targets)]).cumsum(0),
        )

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropies of each example's tokens, in fp32, and their number."""
        return _losses(model, model(**inputs).logits.float(), _of_tokens(inputs, targets))

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """Each of the sums [clients, ...].

        The prediction is the tag with the largest logit at a word's first token, the first of several. A word without
        tokens is predicted to have none.
        """
        logits, of_tokens = model(**inputs).logits.float(), _of_tokens(inputs, targets)
        gold, predicted = _tags_of_words(logits.argmax(-1), of_tokens, _of_words(inputs, targets), logits.shape[-1])
        loss, terms = _losses(model, logits, of_tokens)
        has_tag = gold < logits.shape[-1]
        each = {
            "loss": loss.double(),
            "targets": terms,
            "words": has_tag.sum(1),
            "right": (has_tag & (gold == predicted)).sum(1),
        }
        if (tags := scheme(_labels(model))) is not None:
            each["entities"] = tags.counts(gold, predicted)
        return {name: _sums(x, real) for name, x in each.items()}

    def predict(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """The tag of each word, as in `measure`; None for a word without tokens."""
        logits, of_tokens = model(**inputs).logits, _of_tokens(inputs, targets)
        _, found = _tags_of_words(logits.argmax(-1), of_tokens, _of_words(inputs, targets), logits.shape[-1])
        names = (*_labels(model), None)
        tags = [[names[tag] for tag in own] for own in found.tolist()]
        missing = [None] * max(map(len, columns["tokens"]))
        return [{"tags": [*own, *missing][: len(words)]} for own, words in zip(tags, columns["tokens"], strict=True)]

    def no_statistics(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        """Sums of zero; tags that do not mark entities have no counts of them."""
        sums = {"loss": torch.zeros((), dtype=torch.float64)} | {
            name: torch.zeros((), dtype=torch.long) for name in _COUNTS
        }
        tags = scheme(tuple(labels))
        return sums if tags is None else {**sums, "entities": torch.zeros(len(tags.types), 3, dtype=torch.long)}

    def check(self, statistics: Statistics) -> str | None:
        """A reason if a part is larger than its whole, or the loss is negative."""
        loss, targets, words, right = (float(statistics.sums[name]) for name in ("loss", *_COUNTS))
        if min(targets, words) < statistics.examples:
            return f"its {targets:.0f} targets and {words:.0f} words are fewer than its {statistics.examples} examples"
        if words < right:
            return f"its {right:.0f} correct tags are more than its {words:.0f} words"
        if (entities := statistics.sums.get("entities")) is not None:
            correct, predicted, gold = entities.double().unbind(-1)
            if (correct > torch.minimum(predicted, gold)).any() or max(float(predicted.sum()), float(gold.sum())) > words:
                return "its counts of entities contradict each other, or its number of words"
        return "its loss is negative" if loss < 0 else None

    def metrics(self, statistics: Statistics) -> Mapping[str, float]:
        """F1, precision and recall of entities, if tags mark them; accuracy of the tags, and the mean loss of a token.

        `f1_macro` is the mean of the types' F1, over those that are gold or predicted. A ratio is NaN if it is 0/0.
        """
        loss, targets, words, right = (float(statistics.sums[name]) for name in ("loss", *_COUNTS))
        of_words = {"accuracy": _ratio(right, words), "loss": _ratio(loss, targets)}
        if (entities := statistics.sums.get("entities")) is None:
            return of_words
        correct, predicted, gold = entities.double().sum(0).tolist()
        each = [_ratio(2 * c, p + g) for c, p, g in entities.double().tolist() if p + g]
        return {
            "f1": _ratio(2 * correct, predicted + gold),
            "precision": _ratio(correct, predicted),
            "recall": _ratio(correct, gold),
            "f1_macro": _ratio(sum(each, 0.0), float(len(each))),
            **of_words,
        }

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """Loads the adapter with the head for these tags."""
        return _LOAD.format(classes=len(labels), pad=pad, arguments=arguments)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean of the last layer over the tokens that are not padding [rows, width]."""
        whole: Any = model
        return mean_of_tokens(whole.base_model(**inputs)[0], inputs["attention_mask"])

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> None:
        """All."""

    def _targets(self, words: Sequence[int], tags: Sequence[int]) -> list[int]:
        """The targets of a text, given the word of each token, -1 for special tokens, and the tag of each word."""
        if not any(word >= 0 for word in words):
            return [NO_TARGET] * len(words)
        before = (None, *words[:-1])
        firsts = [word >= 0 and word != previous for word, previous in zip(words, before, strict=True)]
        others = [word >= 0 and self.all_subwords for word in words]
        of_tokens = [
            tags[word] if first else _other(tags[word]) if other else NO_TARGET
            for word, first, other in zip(words, firsts, others, strict=True)
        ]
        have_tokens = set(words)
        return of_tokens + [tag if word in have_tokens else _other(tag) for word, tag in enumerate(tags)]


def _settings(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _labels(model: nn.Module) -> tuple[str, ...]:
    config: Any = model.config
    return tuple(config.id2label.values())


def _other(tag: Any) -> Any:
    """Marks a tag of no first token, as a number below NO_TARGET; its own inverse."""
    return NO_TARGET - 1 - tag


def _of_tokens(inputs: Mapping[str, Tensor], targets: Int[Tensor, "rows most"]) -> Int[Tensor, "rows longest"]:
    """The targets of the tokens."""
    mask = inputs["attention_mask"]
    return targets[:, : mask.shape[1]].where(mask > 0, NO_TARGET)


def _of_words(inputs: Mapping[str, Tensor], targets: Int[Tensor, "rows most"]) -> Int[Tensor, "rows most"]:
    """The targets of the words, which follow those of the tokens."""
    most = targets.shape[1]
    at = inputs["attention_mask"].sum(1, keepdim=True) + torch.arange(most, device=targets.device)
    return targets.gather(1, at.clamp(max=most - 1)).where(at < most, NO_TARGET)


def _losses(model: nn.Module, logits: Float[Tensor, "rows longest labels"], of_tokens: Tensor) -> tuple[Tensor, Tensor]:
    inner_tags = torch.tensor(inner(_labels(model)), device=of_tokens.device)
    other = of_tokens < NO_TARGET
    targets = torch.where(other, inner_tags[_other(of_tokens).where(other, 0)], of_tokens)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=NO_TARGET)
    return losses.view(targets.shape).sum(1), (targets != NO_TARGET).sum(1)


def _tags_of_words(
    predicted: Int[Tensor, "rows longest"],
    of_tokens: Int[Tensor, "rows longest"],
    of_words: Int[Tensor, "rows most"],
    none: int,
) -> tuple[Int[Tensor, "rows most"], Int[Tensor, "rows most"]]:
    """The gold and the predicted tag of each word; `none` where there is no word, and predicted without tokens."""
    firsts = (of_tokens >= 0).long().argsort(dim=1, descending=True, stable=True)  # the first tokens, in order, then others
    has_token = of_words >= 0
    place = (has_token.cumsum(1) - 1).clamp(min=0)
    guessed = predicted.gather(1, firsts).gather(1, place).where(has_token, none)
    gold = torch.where(of_words < NO_TARGET, _other(of_words), of_words).where(of_words != NO_TARGET, none)
    return gold, guessed


def _sums(each: Tensor, real: Bool[Tensor, "clients longest"]) -> Tensor:
    """The sum over each client's real rows of statistics of rows [rows, ...]."""
    of_clients = each.view(*real.shape, *each.shape[1:])
    return of_clients.where(real.view(*real.shape, *[1] * (each.ndim - 1)), 0).sum(1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
