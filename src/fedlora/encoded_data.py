"""The examples of a run as the model's inputs, with the rows of each client."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.data.sources import column_values, unlearned_labels
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.models.tokenizers import check_known, check_lengths, positions
from fedlora.tasks.task import NO_TARGET, Examples, Task
from fedlora.train.blocks import cut_into_blocks
from fedlora.train.targets import check_targets, rows_with_targets

Tokens = tuple[Examples, Examples]
"""The training and the test examples."""

_TRAIN, _HELD_OUT = "train", "held out"


def encode(task: Task, tokenizer: Any, federated_data: FederatedData, max_length: int) -> Tokens:
    """Tokenizes the training and the test examples."""
    data = federated_data.labelled_data
    train, test = (task.encode(tokenizer, column_values(part), max_length) for part in (data.train, data.test))
    return train, test


@dataclass(frozen=True)
class EncodedData:
    """The clients' examples, with each client's rows for training and held-out rows that have targets, and the test set."""

    examples: Examples
    rows: Mapping[str, Int[Tensor, " _"]]
    held_out: Mapping[str, Int[Tensor, " _"]]
    test: Examples
    notes: tuple[str, ...]
    """Messages for the user."""

    @classmethod
    def of(
        cls, tokens: Tokens, model: Any, tokenizer: Any, federated_data: FederatedData, max_length: int
    ) -> "EncodedData":
        """The encoded examples, checked, with their rows.

        Raises:
            UserError: they are too long for the model, none has a target, or the tokenizer has none of their words in its
                vocabulary.
        """
        examples, test = tokens
        shares = federated_data.partition.shares
        rows = {(_TRAIN, share.client): torch.tensor(share.train, dtype=torch.long) for share in shares}
        rows |= {(_HELD_OUT, share.client): torch.tensor(share.held_out, dtype=torch.long) for share in shares}
        if examples.block_length is not None:
            examples, rows = cut_into_blocks(examples, rows)
            test, _ = cut_into_blocks(test, {"": torch.arange(len(test))})
        notes = unlearned_labels(federated_data.labelled_data)
        for kind, of in (("training", examples), ("test", test)):
            check_lengths(of.lengths(), max_length, positions(model))
            notes += check_targets(of, kind)
        check_known(examples.features, tokenizer)
        rows = rows_with_targets(rows, examples.have_targets())
        for (part, client), own in rows.items():
            if part == _TRAIN and not len(own):
                raise UserError(f"client {client!r}: none of its training examples has a target; raise train.max_length")
        return cls(
            examples,
            {client: own for (part, client), own in rows.items() if part == _TRAIN},
            {client: own for (part, client), own in rows.items() if part == _HELD_OUT},
            test,
            tuple(notes),
        )

    def first_example(self, task: Task, tokenizer: Any) -> list[str]:
        """The first training example as the model gets it, and its targets, decoded; empty if targets are not tokens."""
        starts = self.examples.target_starts
        if task.questions is None or starts is None or not len(self.examples):
            return []
        ids = self.examples.features["input_ids"][: int(self.examples.starts[1])]
        targets = self.examples.targets[: int(starts[1])]
        return [
            f"first example: {tokenizer.decode(ids)!r}",
            f"its targets: {tokenizer.decode(targets[targets != NO_TARGET])!r}",
        ]
