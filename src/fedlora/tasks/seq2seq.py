"""Sequence-to-sequence models: an encoder reads the prompt, a decoder writes the answer."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.data.columns import Column
from fedlora.errors import UserError
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.loading import load_model, outline_model
from fedlora.models.tokenizers import positions
from fedlora.tasks.merged_models import code_for_merged
from fedlora.tasks.prompts import eos, surrounding, token_lists
from fedlora.tasks.questions import Question
from fedlora.tasks.task import NO_TARGET, Examples, client_sums
from fedlora.tasks.token_features import mean_of_tokens
from fedlora.tasks.token_losses import token_losses
from fedlora.tasks.token_metrics import token_metrics

_MANY = 100
"""With more different answers than this, the answers are no classes."""
_COUNTS = ("tokens", "right", "exact")
_LOAD = """\
from pathlib import Path

from peft import AutoPeftModelForSeq2SeqLM
from transformers import AutoTokenizer

folder = Path()  # where this file is
model = AutoPeftModelForSeq2SeqLM.from_pretrained(folder{arguments})
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


@dataclass(frozen=True)
class Seq2Seq:
    """Answers to prompts by an encoder-decoder, such as T5 or BART. The targets are the tokens of the answer and eos.

    Statistics are the sum of the cross-entropies, the numbers of targets (`tokens`) and of those with the largest logit
    (`right`), and the number of examples of which all targets have it (`exact`).
    """

    prefix: str = ""
    max_target_length: int = 128

    peft_type = "SEQ_2_SEQ_LM"
    pipeline_tag = "text2text-generation"
    merged_code = code_for_merged("AutoModelForSeq2SeqLM")
    lower_is_better = frozenset({"loss", "perplexity"})
    test_metrics = None
    predict = None

    def columns(self, named: Collection[str]) -> list[Column]:
        """The prompt, and its answer."""
        return [Column("prompt", "text"), Column("response", "text", target=True)]

    def partition_keys(self, train: Mapping[str, Sequence[Any]]) -> list[int] | None:
        """The index of the answer among the sorted answers, if these are the names of classes: at most 100, each of them
        the answer of two examples on average."""
        answers = list(train["response"])
        classes = {answer: i for i, answer in enumerate(sorted(set(answers)))}
        return None if len(classes) > min(_MANY, len(answers) // 2) else [classes[answer] for answer in answers]

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """The texts, and as answers the same texts in the opposite order, so that answer and prompt differ in length."""
        return {"prompt": texts, "response": texts[::-1]}

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The encoder-decoder with its output layer; see `load_model`.

        Raises:
            UserError: the checkpoint lacks weights, or the model has too few positions for the answers.
        """
        model, tokenizer, checkpoint = load_model(source, transformers.AutoModelForSeq2SeqLM, {}, seed)
        if checkpoint.new:
            raise UserError(
                f"model = {source!r}: the checkpoint lacks {checkpoint.new[0]}, or has it in another size; choose a model "
                "that was trained for text generation"
            )
        self._check_positions(source, model)
        return model, tokenizer, checkpoint

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The same model without its weights; see `outline_model`."""
        model, tokenizer = outline_model(source, transformers.AutoModelForSeq2SeqLM, {})
        self._check_positions(source, model)
        return model, tokenizer

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """The encoder's inputs, and the answers as targets, each with the special tokens of the tokenizer.

        Both are truncated on the right: a prompt keeps its special tokens, an answer that is too long has no eos.
        """
        before, after = surrounding(tokenizer)
        end = eos(tokenizer, columns["response"])
        prompts = token_lists(tokenizer, [self.prefix + text for text in columns["prompt"]])
        answers = [[*before, *answer, end] for answer in token_lists(tokenizer, columns["response"])]
        room, most = max(0, max_length - len(before) - len(after)), self.max_target_length
        ids, starts = _flat([[*before, *prompt[:room], *after] for prompt in prompts])
        targets, target_starts = _flat([answer[:most] for answer in answers])
        cut = {"prompt": sum(len(x) > room for x in prompts), "answer": sum(len(x) > most for x in answers)}
        return Examples(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            starts,
            targets,
            {"input_ids": tokenizer.pad_token_id, "attention_mask": 0},
            target_starts,
            truncated={part: count for part, count in cut.items() if count},
            decoded=True,
        )

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropies of each example's targets, in fp32, and their number."""
        return token_losses(model, _call(model, inputs, targets), targets)[0].sum(1), (targets != NO_TARGET).sum(1)

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """Each of the sums [clients]. Of several tokens with the largest logit, the first one counts."""
        losses, right = token_losses(model, _call(model, inputs, targets), targets)
        tokens, hits = (targets != NO_TARGET).sum(1), right.sum(1)
        each = {"loss": losses.double().sum(1), "tokens": tokens, "right": hits, "exact": (hits == tokens).long()}
        return {name: client_sums(x, real) for name, x in each.items()}

    def no_statistics(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        """Sums of zero."""
        counts = {name: torch.zeros((), dtype=torch.long) for name in _COUNTS}
        return {"loss": torch.zeros((), dtype=torch.float64), **counts}

    def check(self, statistics: Statistics) -> str | None:
        """A reason if the loss is negative, or the counts cannot be those of so many examples."""
        tokens, right, exact = (int(statistics.sums[name]) for name in _COUNTS)
        if statistics.sums["loss"] < 0:
            return "its loss is negative"
        if not (max(statistics.examples, right) <= tokens and exact <= min(statistics.examples, right)):
            return f"{tokens} targets, {right} of them and {exact} answers right, are not of {statistics.examples} examples"
        return None

    def metrics(self, statistics: Statistics) -> Mapping[str, float]:
        """Those of `token_metrics`, and the fraction of examples of which greedy decoding writes exactly the answer, which
        it does if all of its targets have the largest logit."""
        exact = float(statistics.sums["exact"])
        return {
            **token_metrics(statistics.sums),
            "accuracy": exact / statistics.examples if statistics.examples else math.nan,
        }

    def questions(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> list[Question]:
        """The ids that the encoder reads, and the text of the answer."""
        examples = self.encode(tokenizer, columns, max_length)
        prompts = torch.tensor_split(examples.features["input_ids"], examples.starts[1:-1])
        return [Question(ids, (answer,)) for ids, answer in zip(prompts, columns["response"], strict=True)]

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """Loads the adapter on its encoder-decoder."""
        return _LOAD.format(arguments=arguments)

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean of the encoder's last layer over the tokens of each prompt [rows, width]."""
        whole: Any = model
        return mean_of_tokens(whole.get_encoder()(**inputs).last_hidden_state, inputs["attention_mask"])

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> None:
        """All of the prompt."""

    def _check_positions(self, source: str, model: nn.Module) -> None:
        limit = positions(model)
        if limit is not None and self.max_target_length > limit:
            raise UserError(
                f"task.max_target_length = {self.max_target_length}: model = {source!r} has {limit} positions; set "
                f"task.max_target_length to at most {limit}"
            )


def _flat(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " bounds"]]:
    """The ids of all rows, and the offsets at which the rows begin."""
    return torch.tensor([*chain.from_iterable(rows)], dtype=torch.long), torch.tensor([0, *accumulate(map(len, rows))])


def _call(model: Any, inputs: Mapping[str, Tensor], targets: Int[Tensor, "rows most"]) -> dict[str, Tensor]:
    """The arguments of the model, with the targets as the decoder's inputs: shifted right, after the model's start token.

    Most models have a method for this, as some, such as mBART, have another start token.
    """
    if (shift := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        return {**inputs, "decoder_input_ids": shift(targets)}
    shifted = functional.pad(targets[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    return {**inputs, "decoder_input_ids": shifted.where(shifted != NO_TARGET, model.config.pad_token_id)}
