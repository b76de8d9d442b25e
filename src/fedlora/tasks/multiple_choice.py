"""Multiple choice by the likelihoods of the options under a language model."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional

from fedlora.data.columns import Column
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.loading import load_model, outline_model
from fedlora.tasks.language_models import language_model_code
from fedlora.tasks.merged_models import code_for_merged
from fedlora.tasks.options import FILLER, call, check_apart, encode_questions, learned, log_likelihoods
from fedlora.tasks.task import NO_TARGET, Examples, client_sums
from fedlora.tasks.token_features import mean_of_tokens

_COUNTS = ("targets", "right", "right_per_byte")


@dataclass(frozen=True)
class MultipleChoice:
    """Questions with options, of which one is right. An example is a question with all its options.

    Statistics are the sum of the losses, the number of their terms, and the numbers of questions answered right by the
    log-likelihood and by the log-likelihood per byte.
    """

    objective: Literal["choice", "answer"] = "choice"

    peft_type = "CAUSAL_LM"
    pipeline_tag = "text-generation"
    merged_code = code_for_merged("AutoModelForCausalLM")
    lower_is_better = frozenset({"loss"})
    test_metrics = None
    questions = None

    def columns(self, named: Collection[str]) -> list[Column]:
        """The question, its options, and the right one."""
        answer = Column("answer", "choice", of="options", target=True)
        return [Column("prompt", "text"), Column("options", "texts"), answer]

    def partition_keys(self, train: Mapping[str, Sequence[Any]]) -> None:
        """None: questions have no classes."""

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """The texts as questions with two or three options."""
        options = [["one", "two words", "three more words"][: 2 + i % 2] for i in range(len(texts))]
        return {"prompt": texts, "options": options, "answer": [i % 2 for i in range(len(texts))]}

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The language model with its output layer; see `load_model` and `check_apart`."""
        model, tokenizer, checkpoint = load_model(source, transformers.AutoModelForCausalLM, {}, seed)
        check_apart(source, model)
        return model, tokenizer, checkpoint

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_model`."""
        return outline_model(source, transformers.AutoModelForCausalLM, {})

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """See `encode_questions`."""
        return encode_questions(tokenizer, columns, max_length)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each question in fp32, by `objective`, and its number of terms."""
        sums, counts, _ = log_likelihoods(model, inputs)
        return self._losses(sums, counts, targets[:, 0])

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """Each of the sums [clients]. The answer is the option with the largest score, the first of several."""
        sums, counts, sizes = log_likelihoods(model, inputs)
        right = targets[:, 0]
        loss, terms = self._losses(sums, counts, right)
        guesses = (_best(scores, counts) for scores in (sums, _per_byte(sums, sizes)))
        each = (loss.double(), terms, *((guess == right).long() for guess in guesses))
        named = zip(("loss", *_COUNTS), each, strict=True)
        return {name: client_sums(x, real) for name, x in named}

    def predict(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """The option with the largest log-likelihood per byte, its text and index; None for a question without room."""
        sums, counts, sizes = log_likelihoods(model, inputs)
        best = _best(_per_byte(sums, sizes), counts).where(targets[:, 0] != NO_TARGET, -1).tolist()
        return [
            {"option": None if i < 0 else options[i], "index": None if i < 0 else i}
            for i, options in zip(best, columns["options"], strict=True)
        ]

    def no_statistics(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        """Sums of zero."""
        counts = {name: torch.zeros((), dtype=torch.long) for name in _COUNTS}
        return {"loss": torch.zeros((), dtype=torch.float64), **counts}

    def check(self, statistics: Statistics) -> str | None:
        """A reason if there are more right answers than questions, fewer terms, or the loss is negative."""
        loss, targets, *right = (float(statistics.sums[name]) for name in ("loss", *_COUNTS))
        if max(right) > statistics.examples or targets < statistics.examples:
            return f"its counts are not those of {statistics.examples} questions"
        return "its loss is negative" if loss < 0 else None

    def metrics(self, statistics: Statistics) -> Mapping[str, float]:
        """The fractions of right answers by the log-likelihood per byte (`acc_norm`) and as such (`acc`); the mean loss."""
        loss, targets, right, per_byte = (float(statistics.sums[name]) for name in ("loss", *_COUNTS))
        examples = statistics.examples
        return {
            "acc_norm": per_byte / examples if examples else math.nan,
            "acc": right / examples if examples else math.nan,
            "loss": loss / targets if targets else math.nan,
        }

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """Loads the adapter on its language model."""
        return language_model_code(arguments)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean of the last layer over the tokens that are not padding [rows, width]."""
        whole: Any = model
        hidden = whole.base_model(**call(model, inputs), use_cache=False)[0]
        return mean_of_tokens(hidden, inputs["option"] != FILLER)

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> Bool[Tensor, "rows longest"] | None:
        """Those before a token of an option."""
        return None if targets is None else learned(inputs)

    def _losses(self, sums: Tensor, counts: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if self.objective == "answer":
            return -sums.gather(1, right[:, None])[:, 0], counts.gather(1, right[:, None])[:, 0]
        found = functional.cross_entropy(sums.masked_fill(counts == 0, -math.inf), right, reduction="none")
        return found, torch.ones_like(right)


def _per_byte(sums: Tensor, sizes: Tensor) -> Tensor:
    """The log-likelihoods of options, divided by their sizes."""
    return sums / sizes.clamp(min=1)


def _best(scores: Tensor, counts: Tensor) -> Tensor:
    """The index of the option with the largest score, the first of several; options without tokens are absent."""
    return scores.masked_fill(counts == 0, -math.inf).argmax(1)
