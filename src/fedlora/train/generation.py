"""Evaluation by generated answers."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.adapter import Adapter
from fedlora.models.adapted import AdaptedModel
from fedlora.models.generate import generate
from fedlora.tasks.questions import Question
from fedlora.tasks.text_metrics import TEXT_METRICS


@dataclass(frozen=True)
class Generation:
    """Questions, how they are answered, and the names of the metrics of the answers.

    An answer ends before a token in `stop`, at the latest after `max_new_tokens`.
    """

    questions: Sequence[Question]
    tokenizer: Any
    stop: Collection[int]
    max_new_tokens: int
    batch_size: int
    metrics: Sequence[str]

    def answers(self, adapted: AdaptedModel, adapter: Adapter) -> list[str]:
        """The adapter's greedy answers."""
        prompts = [one.prompt for one in self.questions]
        found = generate(adapted, [(prompts, adapter)], self.max_new_tokens, self.stop, self.batch_size)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in found[0]]

    def scores(self, answers: Sequence[str]) -> Mapping[str, float]:
        """The metrics of the answers."""
        references = [one.references for one in self.questions]
        found: dict[str, float] = {}
        for name in self.metrics:
            metric = TEXT_METRICS[name]
            found |= metric.metrics(metric.statistics(answers, references).sum(0), len(answers))
        return found

    def samples(self, answers: Sequence[str]) -> str:
        """The prompts, with special tokens, the answers and their references, as JSON Lines."""
        return "".join(
            json.dumps(
                {"prompt": self.tokenizer.decode(one.prompt), "answer": answer, "references": one.references},
                ensure_ascii=False,
            )
            + "\n"
            for one, answer in zip(self.questions, answers, strict=True)
        )
