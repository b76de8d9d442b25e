"""Causal language models: answers to prompts, conversations, texts."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import transformers
from jaxtyping import Bool
from torch import Tensor, nn

from fedlora.data.columns import Column
from fedlora.errors import UserError
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.loading import load_model, load_tokenizer, outline_model
from fedlora.tasks.conversations import Messages, conversations
from fedlora.tasks.language_models import language_model_code
from fedlora.tasks.merged_models import code_for_merged
from fedlora.tasks.prompts import (
    Prompted,
    eos,
    last_prompt,
    leading,
    pairs,
    to_examples,
    token_examples,
    token_lists,
    truncated,
)
from fedlora.tasks.questions import Question
from fedlora.tasks.task import NO_TARGET, Examples, client_sums
from fedlora.tasks.token_features import mean_of_tokens
from fedlora.tasks.token_losses import token_losses, with_decoder_output
from fedlora.tasks.token_metrics import token_metrics

_chat_tokenizer = partial(load_tokenizer, chat=True)


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: of the answers to prompts, of the assistant's messages, or of whole texts.

    Statistics are the sum of the cross-entropies, and the numbers of targets and of right predictions.
    """

    separator: str = "\n"
    chat: bool = False

    peft_type = "CAUSAL_LM"
    pipeline_tag = "text-generation"
    merged_code = code_for_merged("AutoModelForCausalLM")
    lower_is_better = frozenset({"loss", "perplexity"})
    test_metrics = None
    predict = None

    def columns(self, named: Collection[str]) -> list[Column]:
        """Conversations, or a prompt and its answer, or a text."""
        pair = [name for name in ("prompt", "response") if name in named]
        if "messages" in named:
            if pair:
                raise ValueError(f"messages and {pair[0]}: a language model reads one of them; remove the other")
            return [Column("messages", "messages")]
        if len(pair) == 1:
            raise ValueError("prompt and response: a language model needs both; set the other, too")
        return [Column(name, "text", target=name == "response") for name in pair or ["text"]]

    def partition_keys(self, train: Mapping[str, Sequence[Any]]) -> None:
        """None: texts have no classes."""

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """The texts as prompts, and as answers."""
        return {"prompt": texts, "response": texts}

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The language model with its output layer; see `load_model`."""
        found = load_model(source, transformers.AutoModelForCausalLM, {}, seed, _chat_tokenizer)
        _check_causal(source, found[0])
        return found

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_model`."""
        found = outline_model(source, transformers.AutoModelForCausalLM, {}, _chat_tokenizer)
        _check_causal(source, found[0])
        return found

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """Each conversation, or prompt with its answer, truncated as in `to_examples`; each text whole, and eos."""
        if "text" in columns:
            return _passages(tokenizer, columns["text"], max_length)
        return to_examples(self._prompted(tokenizer, columns), max_length, tokenizer.pad_token_id)

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropies of each example's targets, in fp32, and their number."""
        return token_losses(model, _call(inputs), targets)[0].sum(1), (targets != NO_TARGET).sum(1)

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """Each of the sums [clients]. The prediction is the token with the largest logit, the first of several."""
        losses, right = token_losses(model, _call(inputs), targets)
        sums = {"loss": losses.double(), "tokens": (targets != NO_TARGET).long(), "right": right.long()}
        return {name: client_sums(x.sum(1), real) for name, x in sums.items()}

    def no_statistics(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        """Sums of zero."""
        counts = {name: torch.zeros((), dtype=torch.long) for name in ("tokens", "right")}
        return {"loss": torch.zeros((), dtype=torch.float64), **counts}

    def check(self, statistics: Statistics) -> str | None:
        """A reason if there are fewer targets than examples or right predictions, or the loss is negative."""
        loss, tokens, right = (float(statistics.sums[name]) for name in ("loss", "tokens", "right"))
        if tokens < max(statistics.examples, right):
            return f"its {tokens:.0f} targets are fewer than its {statistics.examples} examples or {right:.0f} hits"
        return "its loss is negative" if loss < 0 else None

    def metrics(self, statistics: Statistics) -> Mapping[str, float]:
        """See `token_metrics`."""
        return token_metrics(statistics.sums)

    def questions(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> list[Question]:
        """The ids before each example's last answer (see `last_prompt`), and the answer's text.

        An example that has no answer, or no token before it, is left out. Plain texts are prompts without an answer.
        """
        if "text" in columns:
            start = leading(tokenizer)
            texts = ([*start, *ids] for ids in token_lists(tokenizer, columns["text"]))
            return [Question(torch.tensor(truncated(ids, max_length, len(start))), ()) for ids in texts if ids]
        answers = columns.get("response") or [_last_answer(row) for row in columns["messages"]]
        prompts = (last_prompt(one, max_length) for one in self._prompted(tokenizer, columns))
        return [Question(torch.tensor(ids), (text,)) for ids, text in zip(prompts, answers, strict=True) if len(ids)]

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """Loads the adapter on its language model."""
        return language_model_code(arguments)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean of the last layer over the tokens that are not padding [rows, width]."""
        hidden = with_decoder_output(model, _call(inputs), lambda output: output.last_hidden_state)
        return mean_of_tokens(hidden, inputs["attention_mask"])

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> Bool[Tensor, "rows longest"] | None:
        """Those with a target."""
        return None if targets is None else targets != NO_TARGET

    def _prompted(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]]) -> Iterable[Prompted]:
        """The whole ids of each conversation, or prompt with its answer."""
        if "messages" in columns:
            return conversations(tokenizer, columns["messages"])
        prompts, answers = columns["prompt"], columns["response"]
        if self.chat:
            return conversations(tokenizer, list(map(_exchange, prompts, answers)))
        return pairs(tokenizer, [text + self.separator for text in prompts], answers)


def _call(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of the model. It needs no mask: the padding is on the right, where no token of a causal model looks."""
    return {"input_ids": inputs["input_ids"]}


def _check_causal(source: str, model: Any) -> None:
    """Rejects encoders such as BERT's, whose tokens read those after them, and thus the targets."""
    masked: Any = transformers.AutoModelForMaskedLM
    if type(model.config) in masked._model_mapping and not model.config.is_decoder:
        raise UserError(
            f"model = {source!r}: a {model.config.model_type!r} model is not causal; choose a model for text generation"
        )


def _last_answer(messages: Messages) -> str:
    return [one["content"] for one in messages if one["role"] == "assistant"][-1]


def _exchange(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _passages(tokenizer: Any, texts: Sequence[str], max_length: int) -> Examples:
    """Each text with the special tokens that the tokenizer puts before it, and eos; every token is a target."""
    start, end = leading(tokenizer), eos(tokenizer, texts)
    rows = [[*start, *ids, end] for ids in token_lists(tokenizer, texts)]
    targets = [target for row in rows for target in (*row[1:], NO_TARGET)]
    ids = [i for row in rows for i in row]
    return token_examples(ids, targets, [0, *accumulate(map(len, rows))], tokenizer.pad_token_id, block_length=max_length)
