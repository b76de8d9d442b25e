"""Tables printed without a run: methods, settings, and the clients of an experiment."""

from collections.abc import Iterable

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedlora.config.reference import Setting
from fedlora.data.partition import label_table
from fedlora.federated_data import FederatedData
from fedlora.methods.row import Row
from fedlora.printable import printable
from fedlora.privacy.release import Released
from fedlora.report import method_docs

_FEW_LABELS = 20
CLIENTS_WIDTH = 120
"""Maximum width, in columns, at which the numbers in the table of clients are readable."""


def methods(rows: Iterable[Row]) -> Group:
    """Name and summary of each method, in one line of at most 80 columns."""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(Text(row.name, "bold"), Text(row.summary))
    return Group(table, Text("\nDetails of a method: fedlora methods NAME"))


def method(row: Row) -> Markdown:
    """Page of the method."""
    return Markdown(method_docs.page(row))


def settings(entries: Iterable[Setting]) -> Group:
    """Key, default and summary of each setting."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("setting", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=14)
    table.add_column("what it does", overflow="fold")
    for entry in entries:
        owners = f"{entry.owners}: " if entry.methods else ""
        table.add_row(*map(Text, (entry.key, entry.default, owners + entry.summary)))
    return Group(table, Text("Details of a setting or section: fedlora settings KEY"))


def setting(entry: Setting) -> Group:
    """Full description of one setting."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    facts = {
        "methods": entry.owners if entry.methods else "",
        "values": entry.values,
        "default": entry.default,
        "example": f"{entry.key} = {entry.example}",
    }
    for name, fact in facts.items():
        if fact:
            table.add_row(name, Text(fact))
    return Group(Text(entry.key, "bold"), Padding(Text(entry.text), (0, 2)), table, "")


def clients(federated_data: FederatedData) -> Group:
    """Rank, sizes and labels, if any, of each client: counts of all labels if they fit, else of the most frequent ones."""
    partition, keys = federated_data.partition, federated_data.keys
    labels = federated_data.labelled_data.labels if keys is not None else ()
    counts = label_table(keys or (), partition, len(labels)) if labels else np.zeros((len(partition.shares), 0), int)
    few = len(labels) <= _FEW_LABELS
    title = f"{len(federated_data.clients)} clients, {len(federated_data.labelled_data.test)} test examples"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("client", "rank", "train", "held out", *(map(str, range(len(labels))) if few else ("labels",))):
        table.add_column(name, justify="right")
    if not few:
        table.add_column("most frequent", overflow="fold")
    for client, share, own in zip(federated_data.clients, partition.shares, counts.tolist(), strict=True):
        ranked = sorted(range(len(labels)), key=lambda label: -own[label])
        top = ", ".join(f"{labels[label]} {own[label]}" for label in ranked[:3] if own[label])
        cells = map(str, own) if few else (str(sum(count > 0 for count in own)), top)
        row = (client.id, str(client.rank), str(len(share.train)), str(len(share.held_out)), *cells)
        table.add_row(*(Text(printable(cell)) for cell in row))
    below = (
        [Text(printable("labels: " + ", ".join(f"{i} {name}" for i, name in enumerate(labels))))] if labels and few else []
    )
    if partition.left_out_rows:
        below.append(Text(f"left out: {partition.left_out_rows} examples, {partition.left_out_clients} clients"))
    return Group(table, *below)


def released(unit: str, entries: Iterable[Released]) -> Table:
    """What leaves a client, and its rule."""
    title = f"what leaves a client, with privacy.unit = {unit!r}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    for entry in entries:
        table.add_row(Text(printable(entry.what)), Text(printable(entry.rule)))
    return table
