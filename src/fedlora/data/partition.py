"""Partition of the training set among the clients."""

import hashlib
import platform
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Int
from safetensors.numpy import load, save

from fedlora.cache import cached
from fedlora.config.sections import Clients
from fedlora.errors import UserError
from fedlora.randomness import derive, generator


@dataclass(frozen=True)
class ClientSplit:
    """One client's rows of the training set, in ascending order: its training rows and its held-out rows."""

    client: str
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    task: str = ""


@dataclass(frozen=True)
class Partition:
    """The clients' splits, ordered by client id, and the numbers of rows and users that are not assigned.

    Rows are not assigned by `shards` (the remainder), by `pathological` (labels that no client has), and by `natural`
    (users with fewer than `min_size` examples, or not among the `count` largest); with tasks, also rows of a client's
    tasks with fewer than `min_size` rows. Only `natural` leaves users unassigned.
    """

    shares: tuple[ClientSplit, ...]
    left_out_rows: int
    left_out_clients: int


_BY_CLASS = ("dirichlet", "pathological", "shards", "clusters")


def divide(train: Dataset, keys: Sequence[int] | None, clients: Clients, seed: int) -> Partition:
    """The partition of `train`: no row belongs to two clients, and every client has at least `min_size` rows.

    `keys` are the classes of the examples, by which dirichlet, pathological and shards divide, or their clusters, by which
    clusters does; None if they have none.
    A client's held-out rows are drawn at random for its id: at least one if it has two or more rows, never all.
    Numbered clients are "000", "001", ...; clients of the natural partition have their user's name. Takes about two
    milliseconds per client, less for iid, length and natural. If the examples have tasks, a client's rows of each task
    form a separate split named "CLIENT/TASK".

    Raises:
        UserError: there are too few examples or labels for this partition, or the examples have no classes or no text.
    """
    if keys is None and clients.partition in _BY_CLASS:
        raise UserError(
            f"clients.partition = {clients.partition!r} divides by classes of the examples, which this task does not have; "
            "set clients.partition to 'iid', 'clusters', 'length' or 'natural'"
        )
    rows_of = _users(train, clients) if clients.partition == "natural" else _numbered(train, keys, clients, seed)
    users = len(train.unique("user")) if clients.partition == "natural" else len(rows_of)
    owned = {(owner, ""): rows for owner, rows in rows_of.items()}
    if "task" in train.column_names:
        owned = _by_task(train["task"][:], rows_of, clients.min_size)
    shares = tuple(share(name, owned[name, task], clients.held_out, seed, task) for name, task in sorted(owned))
    given = sum(len(rows) for rows in owned.values())
    return Partition(shares, left_out_rows=len(train) - given, left_out_clients=users - len(rows_of))


def label_table(keys: Sequence[int], partition: Partition, labels: int) -> Int[np.ndarray, "clients labels"]:
    """The number of examples of each label for each client, held-out ones included."""
    label_of = np.asarray(keys)
    return np.stack(
        [np.bincount(label_of[[*share.train, *share.held_out]], minlength=labels) for share in partition.shares]
    )


def share(client: str, rows: list[int], held_out: float, seed: int, task: str = "") -> ClientSplit:
    """The split of one client's rows; held-out rows are drawn at random for its id."""
    count = min(max(round(held_out * len(rows)), 1), len(rows) - 1) if held_out else 0
    order = torch.randperm(len(rows), generator=generator(seed, "held out", client)).tolist()
    rows = sorted(rows)
    return ClientSplit(
        client,
        train=tuple(sorted(rows[i] for i in order[count:])),
        held_out=tuple(sorted(rows[i] for i in order[:count])),
        task=task,
    )


def _by_task(tasks: list[str], rows_of: dict[str, list[int]], min_size: int) -> dict[tuple[str, str], list[int]]:
    """Each owner's rows of each task, as {(OWNER/TASK, task): rows}, if there are at least `min_size`."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for owner, rows in rows_of.items():
        for row in rows:
            found[f"{owner}/{tasks[row]}", tasks[row]].append(row)
    enough = {key: rows for key, rows in found.items() if len(rows) >= min_size}
    if not enough:
        raise UserError(f"clients.min_size = {min_size}: no client has this many examples of a task (data.task); lower it")
    if len({client for client, _ in found}) < len(found):
        raise UserError("data.task: names of clients and tasks are ambiguous once joined by '/'; rename one of them")
    return enough


def _users(train: Dataset, clients: Clients) -> dict[str, list[int]]:
    """The rows of each user with at least `min_size` rows; only the `count` largest users if that is set."""
    if "user" not in train.column_names:
        raise UserError("clients.partition = 'natural' requires data.user, the column that names the owner of each example")
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, user in enumerate(train["user"][:]):
        rows_of[user].append(row)
    able = sorted(
        (user for user, rows in rows_of.items() if len(rows) >= clients.min_size), key=lambda u: (-len(rows_of[u]), u)
    )
    if len(able) < (clients.count or 1):
        raise UserError(
            f"clients.count = {clients.count}: only {len(able)} of {len(rows_of)} users have clients.min_size = "
            f"{clients.min_size} examples or more; lower one of the two"
        )
    return {user: rows_of[user] for user in able[: clients.count]}


def _numbered(train: Dataset, keys: Sequence[int] | None, clients: Clients, seed: int) -> dict[str, list[int]]:
    """The rows of clients "000", "001", ...

    The rows are shuffled first: the partitioners take contiguous pieces, and rows of equal length are divided at random.
    """
    count = clients.size or 1
    _check_enough(len(train), keys, clients, count)
    order = torch.randperm(len(train), generator=generator(seed, "row order")).numpy()
    if clients.partition == "length":
        order = order[_lengths(train)[order].argsort(stable=True)]
    if keys is None or clients.partition not in _BY_CLASS:
        parts = np.array_split(order, count)  # equals flwr_datasets' IidPartitioner, which takes 20 s for 10,000 clients
    else:
        parts = _cached_parts(order, keys, clients, derive(seed, "partition"))
    smallest = min(len(part) for part in parts)
    if smallest < clients.min_size:
        raise UserError(
            f"clients.min_size = {clients.min_size}: by clients.partition = {clients.partition!r} the smallest of {count} "
            f"clients would have {smallest} examples; lower clients.min_size or clients.count"
        )
    width = max(3, len(str(count - 1)))
    return {f"{i:0{width}}": part.tolist() for i, part in enumerate(parts)}


def _lengths(train: Dataset) -> Int[np.ndarray, " rows"]:
    """The number of characters of each example's texts."""
    columns = [train[name][:] for name in train.column_names if name not in ("user", "task")]
    lengths = np.array([sum(map(_characters, cells)) for cells in zip(*columns, strict=True)], dtype=np.int64)
    if not lengths.any():
        raise UserError("clients.partition = 'length': the examples of this task have no text; choose another partition")
    return lengths


def _characters(value: Any) -> int:
    """The number of characters in a cell, which may be a list or a mapping."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _check_enough(rows: int, keys: Sequence[int] | None, clients: Clients, count: int) -> None:
    if count * clients.min_size > rows:
        raise UserError(
            f"clients.count = {count} with clients.min_size = {clients.min_size} requires {count * clients.min_size} "
            f"training examples, found {rows}; lower one of the two"
        )
    if clients.partition == "shards" and count * clients.shards > rows:
        raise UserError(
            f"clients.shards = {clients.shards} for clients.count = {count} is {count * clients.shards} shards of "
            f"{rows} examples; lower one of the two"
        )
    present = len(set(keys or ()))
    if clients.partition == "pathological" and clients.classes > present:
        raise UserError(f"clients.classes = {clients.classes}: the training set has {present} labels; lower it")


def _cached_parts(
    order: Int[np.ndarray, " rows"], keys: Sequence[int], clients: Clients, seed: int
) -> list[Int[np.ndarray, " _"]]:
    """`order`, in parts by the classes of these rows; cached, as flwr_datasets takes seconds to import."""
    labels, count = np.asarray(keys)[order], clients.size or 1

    def make() -> bytes:
        shuffled = Dataset.from_dict({"row": order, "label": labels}).with_format("numpy")
        parts = _parts(shuffled, clients, count, seed)
        return save({"rows": np.concatenate(parts), "bounds": np.cumsum([len(part) for part in parts])[:-1]})

    rows = hashlib.sha256(order.tobytes() + labels.tobytes()).hexdigest()
    versions = [version("flwr-datasets"), version("numpy"), platform.machine()]
    found = load(cached("partition", [*versions, clients.model_dump_json(), str(seed), rows], make))
    return np.split(found["rows"], found["bounds"])


def _parts(shuffled: Dataset, clients: Clients, count: int, seed: int) -> list[np.ndarray]:
    """The values of `row` in each partition, by flwr_datasets, of a data set with the columns row and label."""
    # imported here because it imports matplotlib and seaborn, which takes seconds
    from flwr_datasets.partitioner import DirichletPartitioner, Partitioner, PathologicalPartitioner, ShardPartitioner

    partitioner: Partitioner
    match clients.partition:
        case "dirichlet" | "clusters":
            partitioner = DirichletPartitioner(count, "label", clients.alpha, clients.min_size, seed=seed)
            advice = (
                f"lower clients.count or clients.min_size = {clients.min_size}, or change clients.alpha = {clients.alpha}"
            )
        case "pathological":
            # every label has a client if there are at least as many clients as labels
            partitioner = PathologicalPartitioner(count, "label", clients.classes, "first-deterministic", seed=seed)
            advice = f"a label has fewer examples than takers; lower clients.classes = {clients.classes} or clients.count"
        case _:
            partitioner = ShardPartitioner(count, "label", clients.shards, seed=seed)
            advice = f"lower clients.shards = {clients.shards} or clients.count"
    partitioner.dataset = shuffled
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one warning per failed draw, and those of the library's dependencies
            return [partitioner.load_partition(i)["row"][:] for i in range(count)]
    except ValueError as error:
        raise UserError(
            f"clients.partition = {clients.partition!r}: no partition of {len(shuffled)} examples among {count} clients "
            f"found; {advice}"
        ) from error
