"""The interface of a task: what is particular to a kind of task, and nothing else in the package knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from fedlora.data.targets import Targets
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Examples:
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
class Task(Targets, Protocol):
    """A kind of task. `labels` are the names of the labels, empty for a task without labels."""

    peft_type: str
    """PEFT's `task_type`."""
    pipeline_tag: str
    """The hub's name of the task, such as "text-classification"."""

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model, its tokenizer, and facts about its weights on disk."""

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The model without its weights, and its tokenizer."""

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """Examples as token ids."""

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of each example's losses, and their number, which is not zero [rows]: one for each of its targets.

        An example's losses do not depend on the other examples of the batch.
        """

    def measure(
        self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor, real: Bool[Tensor, "clients longest"]
    ) -> Mapping[str, Tensor]:
        """The sums of `Statistics` [clients, ...] of a batch, whose rows belong to the clients in blocks of equal length.

        Rows that are not `real` are left out.
        """

    def no_statistics(self, labels: Sequence[str]) -> Mapping[str, Tensor]:
        """The sums of no examples: all zero, with the names, shapes and types of every client's sums."""

    def check(self, statistics: Statistics) -> str | None:
        """The reason why non-negative counts and finite sums cannot be those of any examples; None if they can."""

    def metrics(self, statistics: Statistics) -> Mapping[str, float]:
        """The metrics of the examples, `loss` (the mean loss) among them."""

    def loading_code(self, labels: Sequence[str], pad: int) -> str:
        """A Python program that loads the exported adapter and its tokenizer; `pad` is the id of the pad token."""

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Last-layer features of each example of a batch [rows, width]."""
