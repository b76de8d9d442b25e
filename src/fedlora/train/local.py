"""The trainer of one process, with all clients' examples and one model."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedlora.adapter import Adapter
from fedlora.config.sections import Train
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, FitRequest, Gradient, LabelledFeatures, Round, Statistics, Trained
from fedlora.models.adapted import AdaptedModel
from fedlora.models.requests import check_request
from fedlora.models.structure import structure
from fedlora.randomness import derive
from fedlora.tasks.task import Examples, Task
from fedlora.train.batched import train_together
from fedlora.train.evaluate import score, test_set_metrics
from fedlora.train.features import features
from fedlora.train.gradient import gradient
from fedlora.train.job import Entropy, Job, step_key
from fedlora.train.record_privacy import RecordPrivacy
from fedlora.train.schedule import round_rate


@dataclass(frozen=True)
class LocalTrainer:
    """Executes the clients' requests, at most `clients_per_step` clients in one step and `max_tokens` in one micro-batch.

    `rows` and `held_out` are each client's rows of `examples`; `rounds` is the number of rounds of the run. Clients in
    `privacy` are trained by DP-SGD, with randomness from `entropy`.
    """

    adapted: AdaptedModel
    task: Task
    examples: Examples
    rows: Mapping[str, torch.Tensor]
    held_out: Mapping[str, torch.Tensor]
    test: Examples
    settings: Train
    eval_batch_size: int
    clients_per_step: int = 1
    max_tokens: int = 1 << 11
    rounds: int = 1
    privacy: Mapping[str, RecordPrivacy] = field(default_factory=dict)
    entropy: Entropy = "seed"

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> list[Trained]:
        """The trained adapters, each with its `loss`, in the order of `asked`.

        Raises:
            ValueError: a request is invalid (see `check_request`), or a client's privacy is missing; nothing was trained.
        """
        for one in asked:
            check_request(self.adapted.spec, one.request)
        jobs = [self._job(one, rnd) for one in asked]
        lr = self.settings.lr * round_rate(self.settings, rnd.index, self.rounds)
        settings = self.settings.model_copy(update={"lr": lr})
        found: dict[int, Trained] = {}
        for group in self._groups(jobs):
            results = train_together(
                self.adapted, self.task, self.examples, [jobs[i] for i in group], settings, self.max_tokens
            )
            found |= zip(group, results, strict=True)
        return [found[i] for i in range(len(asked))]

    def steps(self, asked: FitRequest) -> int:
        """The number of batches of the request."""
        return Job(asked.request, self.rows[asked.client.id], 0, 0).steps(self.settings)

    def _refuse(self, client: ClientInfo, what: str) -> None:
        if client.id in self.privacy:
            raise UserError(
                f"privacy.unit = 'record': the method requests {what} of the examples, to which no noise is added"
            )

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """The gradient of the client's mean training loss.

        Raises:
            ValueError: the request is invalid.
            UserError: the client's examples are private.
        """
        self._refuse(client, "the gradient")
        check_request(self.adapted.spec, request)
        rows = self.rows[client.id]
        settings = self.settings
        return gradient(self.adapted, self.task, self.examples, rows, request, settings.batch_size, settings.reduction)

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """Base-model features of the client's training examples, without any adapter.

        Raises:
            UserError: the client's examples are private.
        """
        self._refuse(client, "features")
        rows = self.rows[client.id]
        found = features(self.adapted, self.task, self.examples, rows, self.eval_batch_size)
        return LabelledFeatures(found, self.examples.targets[rows], self.adapted.spec.classes)

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges a base update into the model, permanently."""
        self.adapted.merge_into_base(change)

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> list[Statistics | None]:
        """The statistics of each adapter on its client's held-out examples; None if the client has none."""
        indices = [i for i, (client, _) in enumerate(asked) if len(self.held_out[client.id])]
        found: dict[int, Statistics] = {}
        for group in self._equal_keys(indices, [structure(asked[i][1]) for i in indices]):
            pairs = [(self.held_out[client.id], adapter) for client, adapter in (asked[i] for i in group)]
            found |= zip(group, score(self.adapted, self.task, self.examples, pairs, self.eval_batch_size), strict=True)
        return [found.get(i) for i in range(len(asked))]

    def evaluate(self, adapter: Adapter) -> Mapping[str, int | float]:
        """The adapter's metrics on the global test set; see `test_set_metrics`."""
        return test_set_metrics(self.adapted, self.task, self.test, adapter, self.eval_batch_size)

    def _job(self, asked: FitRequest, rnd: Round) -> Job:
        privacy, rows = self.privacy.get(asked.client.id), self.rows[asked.client.id]
        if self.privacy and privacy is None and len(rows):
            raise ValueError(f"client {asked.client.id!r} has no privacy, as others have; expected one for each client")
        again = [rnd.attempt] if privacy is not None and rnd.attempt else []  # new noise: the download may differ
        seed = derive(rnd.seed, "fit", rnd.index, asked.client.id, asked.step, *again)
        pace = derive(rnd.seed, "pace", rnd.index, asked.step)
        return Job(asked.request, rows, seed, pace, privacy, self.entropy)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[int]]:
        """Groups of jobs for one step: those with the same `step_key`, the longest first."""
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps(self.settings))
        return self._equal_keys(order, [step_key(jobs[i].request) for i in order])

    def _equal_keys(self, order: Sequence[int], keys: Sequence[Hashable]) -> Iterator[list[int]]:
        """Groups of equal keys, at most `clients_per_step` each, in the given order."""
        groups: dict[Hashable, list[int]] = {}
        for i, key in zip(order, keys, strict=True):
            groups.setdefault(key, []).append(i)
        for group in groups.values():
            yield from (group[i : i + self.clients_per_step] for i in range(0, len(group), self.clients_per_step))
