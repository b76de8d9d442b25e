"""The examples of a run, partitioned among the clients."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedlora.config.experiment import Experiment
from fedlora.config.sections import Data
from fedlora.data.columns import Column
from fedlora.data.fingerprint import fingerprint
from fedlora.data.other import load_labelled, load_unlabelled
from fedlora.data.partition import Partition, divide, share
from fedlora.data.ranks import client_ranks
from fedlora.data.sources import LabelledData, column_values, load, load_own
from fedlora.errors import UserError
from fedlora.messages import ClientInfo
from fedlora.reuse import Reuse
from fedlora.rounds.sample import check_cohort
from fedlora.runs.client_folder import client_folder
from fedlora.runs.manifest import Client, DataFingerprint, Examples
from fedlora.tasks.metric_names import check_metric
from fedlora.tasks.table import task_of


@dataclass(frozen=True)
class FederatedData:
    """Examples partitioned among the clients."""

    labelled_data: LabelledData
    partition: Partition
    clients: Sequence[ClientInfo]
    keys: Sequence[int] | None = ()
    """The class of each training example, by which they are partitioned, but for clusters; None if they have none."""

    @cached_property
    def fingerprint(self) -> DataFingerprint:
        """Fingerprint by which changes of the examples or their partition are detected."""
        shares = [[share.client, share.task, share.train, share.held_out] for share in self.partition.shares]
        train, test = self.labelled_data.train, self.labelled_data.test
        return DataFingerprint(
            labels=list(self.labelled_data.labels),
            train=Examples(count=len(train), digest=fingerprint(train)),
            test=Examples(count=len(test), digest=fingerprint(test)),
            partition=hashlib.sha256(json.dumps(shares).encode()).hexdigest(),
            clients=[
                Client(id=client.id, rank=client.rank, examples=client.examples, task=client.task)
                for client in self.clients
            ],
        )

    @classmethod
    def make(cls, experiment: Experiment, in_memory: Any = None, reuse: Reuse | None = None) -> "FederatedData":
        """Reads and partitions the data, or the rows in memory; needs the model only for the partition by clusters.

        With `reuse`, examples that an earlier run of this process has read are not read again.

        Raises:
            UserError: the data cannot be read, or cannot be partitioned as configured; or they are on other machines.
        """
        if experiment.data.source == "none" and in_memory is None:
            raise UserError(
                "data.source = 'none': the examples are on the clients' machines, where fedlora join --data FILE uses them "
                "(docs/deployment.md); set data.source to examples on this machine"
            )
        labelled_data = _loaded(experiment, in_memory, reuse)
        keys = task_of(dict(experiment.task)).partition_keys(column_values(labelled_data.train))
        classes = keys
        if experiment.clients.partition == "clusters":
            from fedlora.embedding_clusters import embedding_clusters  # imports what loads models

            classes = embedding_clusters(experiment, labelled_data)
        split = experiment.clients.model_copy(update={"held_out": experiment.held_out})
        partition = divide(labelled_data.train, classes, split, experiment.seed)
        wanted, count = experiment.clients.ranks, len(partition.shares)
        if isinstance(wanted, list) and len(wanted) != count:
            raise UserError(f"clients.ranks has {len(wanted)} entries, the data have {count} clients")
        if long := [share.client for share in partition.shares if len(client_folder(share.client)) > 200]:
            raise UserError(f"the client name {long[0]!r} is too long for a folder name; shorten the names in data.user")
        check_cohort(count, experiment.sampling.fraction, experiment.sampling.min_replies)
        ranks = client_ranks(wanted, count, experiment.method.rank, experiment.seed)
        shares = zip(partition.shares, ranks, strict=True)
        clients = [ClientInfo(share.client, rank, len(share.train), share.task) for share, rank in shares]
        max_examples = experiment.sampling.max_examples
        if large := next((client for client in clients if client.examples > max_examples), None):
            raise UserError(
                f"sampling.max_examples = {max_examples}: client {large.id!r} has {large.examples} examples; raise it"
            )
        return cls(labelled_data, partition, clients, keys)

    @classmethod
    def of_server(cls, experiment: Experiment) -> "FederatedData":
        """Reads only the global test set and the label names: the examples are on the clients.

        Raises:
            UserError: the data cannot be read.
        """
        labelled_data = _loaded(experiment)
        return cls(replace(labelled_data, train=labelled_data.train.select([])), Partition((), 0, 0), [])

    @classmethod
    def without_examples(
        cls, experiment: Experiment, labels: Sequence[str], clients: Sequence[ClientInfo]
    ) -> "FederatedData":
        """Label names and clients only, which suffice for an export."""
        nothing = Data(source="none", labels=list(labels) or None)
        return cls(load(nothing, 0, columns_of(experiment)), Partition((), 0, 0), clients)

    @classmethod
    def of_test_set(cls, experiment: Experiment, rows: Any, labels: Sequence[str], targets: bool = True) -> "FederatedData":
        """Only the examples in a file or in memory, as the test set; without `targets`, with placeholders for these.

        Raises:
            UserError: see `load_labelled` and `load_unlabelled`.
        """
        columns = columns_of(experiment)
        if targets:
            test = load_labelled(experiment.data, rows, labels, columns)
        else:
            test = load_unlabelled(experiment.data, rows, columns)
        return cls(LabelledData(test.select([]), test, tuple(labels)), Partition((), 0, 0), [])

    @classmethod
    def of_client(cls, experiment: Experiment, client: str, file: str, rank: int, labels: Sequence[str]) -> "FederatedData":
        """Reads one client's own file; without a global test set.

        Raises:
            UserError: the file cannot be read, or has a label not in `labels`.
        """
        examples = load_own(experiment.data, file, labels, experiment.seed, columns_of(experiment))
        own = share(client, list(range(len(examples))), experiment.held_out, experiment.seed)
        labelled_data = LabelledData(examples, examples.select([]), tuple(labels))
        return cls(labelled_data, Partition((own,), 0, 0), [ClientInfo(client, rank, len(own.train))])


def columns_of(experiment: Experiment) -> Sequence[Column]:
    """The columns that the task reads, as configured.

    Raises:
        UserError: these settings do not belong together.
    """
    named = {name for name, value in experiment.data if value is not None}
    try:
        return task_of(dict(experiment.task)).columns(named)
    except ValueError as error:
        raise UserError(f"data: {error}") from None


def _loaded(experiment: Experiment, in_memory: Any = None, reuse: Reuse | None = None) -> LabelledData:
    """All examples.

    Raises:
        UserError: they cannot be read, do not have one label each, and the method needs it, or lack `evaluate.metric`.
    """
    columns = columns_of(experiment)
    if experiment.method.row.needs_labels and not any(column.kind == "label" for column in columns):
        raise UserError(
            f"method.name = {experiment.method.name!r} needs labelled examples, task.kind = {experiment.task.kind!r} has "
            "no labels of whole examples; choose another method"
        )
    if reuse is None or in_memory is not None:
        found = load(experiment.data, experiment.seed, columns, in_memory)
    else:
        key = experiment.model_dump_json(include={"data": True, "task": True, "seed": True})
        found = reuse.get("examples", key, lambda: load(experiment.data, experiment.seed, columns))
    check_metric("evaluate.metric", experiment.evaluate.metric, dict(experiment.task), found.labels)
    return found
