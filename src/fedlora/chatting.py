"""Conversation with a trained language model, or with the model before training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.config.experiment import Experiment
from fedlora.data.columns import reader
from fedlora.data.other import PLACEHOLDER
from fedlora.errors import UserError
from fedlora.federated_data import columns_of
from fedlora.generation_setup import UNLIMITED, stop_tokens
from fedlora.models.adapted import AdaptedModel
from fedlora.models.streaming import stream
from fedlora.models.tokenizers import positions
from fedlora.saved_adapter import SavedAdapter
from fedlora.tasks.table import task_of
from fedlora.tasks.task import Task

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class Chat:
    """A language model in memory that answers questions in the form in which it was trained.

    `adapter` has all changes by training; of a merged model it is empty, and the model before training is not known.
    """

    experiment: Experiment
    task: Task
    adapted: AdaptedModel
    tokenizer: Any
    adapter: Adapter
    notes: Sequence[str]

    @classmethod
    def open(cls, path: str | Path, client: str | None = None, overrides: Sequence[str] = ()) -> "Chat":
        """Loads the model of a run, of an adapter or a merged one; see `SavedAdapter.find`.

        Raises:
            UserError: it cannot be used, or generates no text.
        """
        saved = SavedAdapter.find(path, client, overrides)
        experiment = saved.experiment
        task = task_of(dict(experiment.task))
        if task.questions is None:
            raise UserError(f"{path}: task.kind = {experiment.task.kind!r} generates no text; use fedlora predict")
        loaded = saved.load()
        return cls(experiment, task, loaded.adapted, loaded.tokenizer, loaded.whole_adapter(), loaded.notes)

    @property
    def remembers(self) -> bool:
        """Whether the model was trained on conversations, so that a question follows the earlier ones and their answers."""
        return self.experiment.task.chat or self.experiment.data.messages is not None

    def answer(
        self,
        text: str,
        history: Sequence[Turn] = (),
        *,
        base: bool = False,
        temperature: float = 0.0,
        on_text: Callable[[str], None] = lambda piece: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> str:
        """The answer to a question after the turns of `history`, or of the model before training, `base`.

        It is greedy, or sampled with a temperature above 0. `on_text` gets it piece by piece; it ends early if `stopped`.

        Raises:
            UserError: the text is empty, has special tokens, or is too long.
        """
        assert self.task.questions is not None
        columns, limit = self._columns(text, history if self.remembers else ()), self.experiment.evaluate.max_new_tokens
        longest = self._longest(limit)
        questions = self.task.questions(self.tokenizer, columns, longest)
        if not questions:
            raise UserError("the text is empty for the model's tokenizer")
        ids: list[int] = []
        shown = ""

        def show(found: str) -> None:
            nonlocal shown
            if found.startswith(shown):
                on_text(found[len(shown) :])
                shown = found

        def on_token(token: int) -> bool:
            ids.append(token)
            if not (found := self._text(ids)).endswith("\ufffd"):  # else the rest of a character follows
                show(found)
            return not stopped()

        examples = self.task.encode(self.tokenizer, columns, longest)
        stop = stop_tokens(self.adapted.model, self.tokenizer, examples)
        adapter = {} if base else self.adapter
        stream(self.adapted, questions[0].prompt, adapter, limit, stop, on_token, temperature)
        show(self._text(ids))
        return self._text(ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _columns(self, text: str, history: Sequence[Turn]) -> Mapping[str, Sequence[Any]]:
        """The columns of an example with the question, and a placeholder for its answer."""
        try:
            text = reader("text")(text)
        except ValueError as error:
            raise UserError(f"the text {error}") from None
        if self.remembers:
            turns = [*history, (text, PLACEHOLDER)]
            roles = ("user", "assistant")
            return {"messages": [[{"role": r, "content": x} for turn in turns for r, x in zip(roles, turn, strict=True)]]}
        return {one.name: [PLACEHOLDER if one.target else text] for one in columns_of(self.experiment)}

    def _longest(self, max_new_tokens: int) -> int:
        """The largest length of a prompt, by the model's positions: `train.max_length` would cut conversations."""
        model: Any = self.adapted.model
        limit = positions(model) or UNLIMITED
        return max(1, limit if model.config.is_encoder_decoder else limit - max_new_tokens)
