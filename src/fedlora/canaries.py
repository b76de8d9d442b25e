"""Canaries in the data of an experiment: random texts with random targets, as examples of a client or as clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedlora.config.experiment import Experiment
from fedlora.data.columns import Column
from fedlora.data.partition import ClientSplit
from fedlora.data.sources import column_values, data_set
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData, columns_of
from fedlora.messages import ClientInfo
from fedlora.privacy.audit import coins
from fedlora.randomness import generator
from fedlora.tasks.table import task_of

_TOKENS = 12  # of a text
_LARGEST_CLIENT = 32
_KINDS = ("text", "label", "number")


@dataclass(frozen=True)
class Canaries:
    """The data with the included canaries, and each canary's rows of the training set.

    `client` has the canaries among its examples; None if canaries are clients.
    """

    data: FederatedData
    rows: Sequence[Sequence[int]]
    included: torch.Tensor
    client: ClientInfo | None


def example_canaries(experiment: Experiment, data: FederatedData, count: int) -> Canaries:
    """Examples of the smallest client.

    Raises:
        UserError: the task has columns other than texts, labels and numbers, or no targets.
    """
    rows = [[len(data.labelled_data.train) + i] for i in range(count)]
    included = coins(count, experiment.seed)
    smallest = min(data.clients, key=lambda client: (client.examples, client.id))
    added = tuple(row for (row,), is_in in zip(rows, included.tolist(), strict=True) if is_in)
    shares = tuple(
        replace(one, train=one.train + added) if one.client == smallest.id else one for one in data.partition.shares
    )
    client = replace(smallest, examples=smallest.examples + len(added))
    clients = [client if one.id == client.id else one for one in data.clients]
    return Canaries(_with(experiment, data, count, shares, clients), rows, included, client)


def client_canaries(experiment: Experiment, data: FederatedData, count: int) -> Canaries:
    """Clients as large as the smallest one, but of at most 32 examples.

    Raises:
        UserError: the task has columns other than texts, labels and numbers, or no targets.
    """
    size = min(_LARGEST_CLIENT, *(client.examples for client in data.clients))
    first, included = len(data.labelled_data.train), coins(count, experiment.seed)
    rows = [range(first + i * size, first + (i + 1) * size) for i in range(count)]
    named = [(f"canary-{i:04}", rows[i]) for i in range(count) if included[i]]
    shares = (*data.partition.shares, *(ClientSplit(name, tuple(own), ()) for name, own in named))
    rank = min(client.rank for client in data.clients)
    clients = [*data.clients, *(ClientInfo(name, rank, size) for name, _ in named)]
    return Canaries(_with(experiment, data, count * size, shares, clients), rows, included, None)


def _with(
    experiment: Experiment,
    data: FederatedData,
    count: int,
    shares: tuple[ClientSplit, ...],
    clients: Sequence[ClientInfo],
) -> FederatedData:
    """The data with `count` random examples, and these splits and clients."""
    labelled, columns = data.labelled_data, columns_of(experiment)
    values = column_values(labelled.train)
    new = _random_values(experiment, columns, values, labelled.labels, count)
    new |= {name: [values[name][0]] * count for name in values.keys() - new.keys()}  # the owner, whom splits replace
    train = data_set({name: [*values[name], *new[name]] for name in values})
    partition = replace(data.partition, shares=tuple(sorted(shares, key=lambda one: one.client)))
    ordered = sorted(clients, key=lambda one: one.id)
    return FederatedData(replace(labelled, train=train), partition, ordered, None)


def _random_values(
    experiment: Experiment,
    columns: Sequence[Column],
    values: Mapping[str, Sequence[Any]],
    labels: Sequence[str],
    count: int,
) -> dict[str, list[Any]]:
    """Texts of random tokens, random labels, and numbers that occur."""
    if other := next((column for column in columns if column.kind not in _KINDS), None):
        raise UserError(
            f"task.kind = {experiment.task.kind!r}: an audit needs columns of texts, labels or numbers, found "
            f"{other.name!r} of kind {other.kind!r}"
        )
    if not any(column.target for column in columns):
        raise UserError("an audit needs separate examples; texts without prompts or labels are cut into blocks")
    _, tokenizer = task_of(dict(experiment.task)).outline(experiment.model, labels)
    special = set(tokenizer.all_special_ids)
    tokens = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    found: dict[str, list[Any]] = {}
    for column in columns:
        rng = generator(experiment.seed, "canaries", column.name)
        if column.kind == "text":
            drawn = tokens[torch.randint(len(tokens), (count, _TOKENS), generator=rng)]
            found[column.name] = [str(tokenizer.decode(ids)) for ids in drawn.tolist()]
        else:
            among = range(len(labels)) if column.kind == "label" else values[column.name]
            found[column.name] = [among[i] for i in torch.randint(len(among), (count,), generator=rng).tolist()]
    return found
