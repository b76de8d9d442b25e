"""The interface of a task: what is particular to a kind of task, and nothing else in the package knows."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from fedlora.data.columns import Column
from fedlora.messages import Statistics
from fedlora.models.checkpoint import Checkpoint
from fedlora.tasks.questions import Question

NO_TARGET = -100
"""Marks a token without a target; also the default `ignore_index` of torch's cross-entropy."""


@dataclass(frozen=True)
class Examples:
    """Encoded examples: a flat tensor for each model input, and the offsets at which examples start in all of them.

    `padding` has the value that fills shorter examples of a batch, for each input; they are filled on the right, or on the
    `left`. There is one target for each example; or, with `target_starts`, `targets` is flat, too, and example i has those
    from `target_starts[i]` to `target_starts[i + 1]`, of which some may be `NO_TARGET`.

    `decode` turns a batch's features into the model's inputs, if they are stored in another form. `augment` changes a
    batch's features at random, given a random number for each row; only training does this.

    With `decoded`, the targets are answers that a decoder reads, so that their lengths are not those of the inputs.

    `truncated` counts the examples of which a part, such as the prompt, was truncated, by the part's name. With
    `block_length`, the examples are passages of text without limit; see `cut_into_blocks`.
    """

    features: Mapping[str, Shaped[Tensor, "tokens ..."]]
    starts: Int[Tensor, " bounds"]
    targets: Tensor
    padding: Mapping[str, int]
    target_starts: Int[Tensor, " bounds"] | None = None
    left: bool = False
    decode: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    augment: Callable[[dict[str, Tensor], Int[Tensor, " rows"]], dict[str, Tensor]] | None = None
    truncated: Mapping[str, int] = field(default_factory=dict)
    block_length: int | None = None
    decoded: bool = False

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of each example."""
        return self.starts.diff()

    def batch(
        self, rows: Int[Tensor, " rows"], device: torch.device, draws: Int[Tensor, " rows"] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs [rows, longest, ...] and the targets: [rows], or padded as the inputs [rows, most].

        With `draws`, the examples are augmented.
        """
        at, inside = self._places(self.starts, rows)
        inputs = {name: _filled(flat, at, inside, self.padding[name]).to(device) for name, flat in self.features.items()}
        if draws is not None and self.augment is not None:
            inputs = self.augment(inputs, draws.to(device))
        if self.decode is not None:
            inputs = self.decode(inputs)
        if self.target_starts is None:
            return inputs, self.targets[rows].to(device)
        return inputs, _filled(self.targets, *self._places(self.target_starts, rows), NO_TARGET).to(device)

    def longest_answers(self, batches: Sequence[Int[Tensor, " _"]]) -> list[int]:
        """The number of targets of each batch's longest answer; empty unless `decoded`."""
        if not self.decoded or self.target_starts is None:
            return []
        lengths = self.target_starts.diff()
        return [int(lengths[rows].max()) for rows in batches]

    def have_targets(self) -> Bool[Tensor, " examples"]:
        """Whether each example has a target. Those without have no loss, and are neither trained on nor evaluated."""
        if self.target_starts is None:
            return torch.ones(len(self), dtype=torch.bool)
        counted = torch.cat([torch.zeros(1, dtype=torch.long), (self.targets != NO_TARGET).cumsum(0)])
        return counted[self.target_starts].diff() > 0

    def _places(
        self, starts: Int[Tensor, " bounds"], rows: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, "rows longest"], Bool[Tensor, "rows longest"]]:
        """The flat index of each entry of a batch, and whether there is one."""
        first, lengths = starts[rows][:, None], (starts[rows + 1] - starts[rows])[:, None]  # [rows, 1]
        longest = int(lengths.max())
        place = torch.arange(longest) - (longest - lengths if self.left else 0)  # [longest], or [rows, longest]
        inside = (place >= 0) & (place < lengths)
        return torch.where(inside, first + place, 0), inside


def _filled(flat: Tensor, at: Tensor, inside: Tensor, padding: int) -> Tensor:
    """The entries of a batch, and the padding outside of the examples."""
    return flat[at].where(inside.view(*inside.shape, *[1] * (flat.ndim - 1)), padding)


Reduction = Literal["token", "example"]


def reduced(sums: Tensor, counts: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """The numerators and denominators [rows] whose sums over a client's examples give its mean loss; see `Task.losses`."""
    return (sums, counts) if reduction == "token" else (sums / counts, torch.ones_like(counts))


def client_sums(values: Shaped[Tensor, " rows"], real: Bool[Tensor, "clients longest"]) -> Shaped[Tensor, " clients"]:
    """The sum of each client's values, without those of rows that are not real; see `Task.measure`."""
    return values.view(real.shape).where(real, 0).sum(1)


@runtime_checkable
class Task(Protocol):
    """A kind of task. `labels` are the names of the labels, empty for a task without labels."""

    pipeline_tag: str
    """The hub's name of the task, such as "text-classification"."""
    merged_code: str
    """A Python program that loads the exported merged model and its tokenizer or image processor."""
    lower_is_better: frozenset[str]
    """The metrics of which smaller values are better."""

    @property
    def peft_type(self) -> str | None:
        """PEFT's `task_type`; None if PEFT has none for the task."""

    def columns(self, named: Collection[str]) -> Sequence[Column]:
        """The columns of the examples, given the names of the settings in `[data]` that have a value.

        Raises:
            ValueError: these settings do not belong together; the message begins with their names.
        """

    def partition_keys(self, train: Mapping[str, Sequence[Any]]) -> list[int] | None:
        """The class of each example, by which the partitions `dirichlet`, `pathological` and `shards` divide, if any."""

    def made_up(self, texts: Sequence[str], classes: int) -> Mapping[str, Sequence[Any]]:
        """The columns of examples with these texts, on which the model is tested; targets are made up."""

    def load(self, source: str, labels: Sequence[str], seed: int) -> tuple[nn.Module, Any, Checkpoint]:
        """The model, its tokenizer or image processor, and facts about its weights on disk."""

    def outline(self, source: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """The model without its weights, and its tokenizer or image processor."""

    def encode(self, tokenizer: Any, columns: Mapping[str, Sequence[Any]], max_length: int) -> Examples:
        """Examples as the model's inputs, of any number, also none."""

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of each example's losses, and their number [rows]: one for each of its targets.

        Weighted losses have the sum of their weights in place of their number.

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
        """The metrics of the examples: first the main one, which reports show, and among them `loss`, the mean loss.

        An undefined metric is NaN.
        """

    @property
    def test_metrics(self) -> Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None:
        """Further metrics of the test set, which cannot be computed from sums; None if there are none.

        They are computed from the statistics of each single example [examples, ...].
        """

    @property
    def predict(
        self,
    ) -> Callable[[nn.Module, Mapping[str, Tensor], Tensor, Mapping[str, Sequence[Any]]], list[dict[str, Any]]] | None:
        """A JSON object with the prediction for each example of a batch; None for a task that generates text.

        Arguments are the model, its inputs and targets, of which only the form matters, and the examples' columns.
        """

    @property
    def questions(self) -> Callable[[Any, Mapping[str, Sequence[Any]], int], Sequence[Question]] | None:
        """The prompts of examples, with their answers; None for a task that generates no text.

        Arguments are the tokenizer, the examples' columns and the maximum length of a prompt, which does not depend on its
        answer.
        """

    def loading_code(self, labels: Sequence[str], pad: int, arguments: str) -> str:
        """A Python program that loads the exported adapter and its tokenizer.

        `pad` is the id of the pad token, 0 without one; `arguments` are further ones that loading the base model needs,
        such as ', gguf_file="x.gguf"'.
        """

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Last-layer features of each example of a batch [rows, width]."""

    def tokens_read(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> Bool[Tensor, "rows longest"] | None:
        """The tokens whose output of the last block `losses`, `measure` and `predict` read, given the targets; None: all.

        Without targets, those that `features` reads. If a model reads others, as the test at load finds, all are computed.
        """
