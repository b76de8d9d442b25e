"""Commands for clients in other processes, over Flower: deploy local, serve, join, keys."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.arguments import OptionalFile, Out, Overrides, Resume, select_run
from fedlora.cli.new_file import write_new
from fedlora.cli.progress import follow, interruptible, note
from fedlora.errors import UserError
from fedlora.printable import printable

if TYPE_CHECKING:
    from fedlora.rounds.progress import Progress
    from fedlora.runs.result import Result


def local(
    file: OptionalFile = None,
    clients: Annotated[int, typer.Option(help="Number of SuperNodes; the default of clients.count.")] = 4,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Run an experiment over Flower, with a SuperLink and SuperNodes on this machine."""
    _require_flower()
    from fedlora.config.experiment import Experiment
    from fedlora.deploy import launch

    if file is not None and Experiment.load(file, overrides or ()).clients.count is None:
        overrides = [*(overrides or ()), f"clients.count={clients}"]

    def start(path: Path, progress: "Progress") -> "Result":
        return launch.local(path, clients, progress, note)

    _run(file, overrides, out, resume, start, ["deploy", "local"])


def serve(
    file: OptionalFile = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address on which nodes connect.")] = "127.0.0.1:9092",
    keys: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder made by fedlora keys; not needed on the loopback.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = None,
    superlink: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Use the SuperLink that already runs on this machine at this address."),
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="The ca.crt of that SuperLink.")] = None,
) -> None:
    """Run an experiment with clients on other machines, on a Flower SuperLink."""
    _require_flower()
    from fedlora.deploy import launch
    from fedlora.deploy.address import Address

    address = Address.parse(listen if superlink is None else superlink)
    if superlink is None:
        found = launch.needed(address, keys)
        again = ["serve", "--listen", listen, *([] if keys is None else ["--keys", str(keys)])]
    else:
        again = ["serve", "--superlink", superlink, *([] if ca is None else ["--ca", str(ca)])]

    def start(path: Path, progress: "Progress") -> "Result":
        if superlink is None:
            return launch.serve(path, address, found, progress, note)
        return launch.serve_on(path, address, ca, progress, note)

    _run(file, overrides, out, resume, start, again)


def _write_policy(file: Path | None) -> None:
    """Writes the example of a policy, and exits."""
    if file is None:
        return
    from fedlora.config.policy import STARTER

    write_new(file, STARTER, "fedlora join --write-policy")
    raise typer.Exit


def _confirm(question: str) -> bool:
    """The answer of the node's owner on the terminal."""
    try:
        return typer.confirm(question)
    except typer.Abort:  # Ctrl-C
        raise KeyboardInterrupt from None


def join(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address of the server.")],
    client: Annotated[list[str], typer.Option(help="A client of this node; may be repeated, but not with --data.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The client's examples; by default its partition of data.source.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the node's state; by default nodes/CLIENT.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank of the clients; by default method.rank.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key of this node.")] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="The ca.crt of the server.")] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What this node allows; without it, it asks once per run.")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Allow whatever the server asks for, without a policy.")] = False,
    write_policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=_write_policy, is_eager=True, help="Write an example of a policy, and exit."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Take part in a run with the examples on this machine: start a Flower SuperNode. Stop it with Ctrl-C."""
    _require_flower()
    from fedlora.config.policy import Policy
    from fedlora.deploy import join as node
    from fedlora.deploy.address import Address
    from fedlora.deploy.settings import Settings

    address = Address.parse(server)
    if policy is not None and accept:
        raise UserError("--policy and --accept exclude each other: a policy says what is accepted")
    settings = Settings(
        clients=client,
        data=None if data is None else str(data),
        rank=rank,
        overrides=overrides or [],
        policy=None if policy is None else Policy.read(policy),
        accept=accept,
    )
    confirm = _confirm if sys.stdin.isatty() else None
    where = folder or Path("nodes", client[0])
    try:
        with interruptible():
            node.join(where, settings, address, node.credentials(address, key, ca), note, confirm)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def keys(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False)],
    host: Annotated[
        list[str] | None, typer.Option(help="Host name or IP address of the server, for its certificate; may be repeated.")
    ] = None,
    node: Annotated[list[str] | None, typer.Option(help="Name of a node that needs a key; may be repeated.")] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(help="A client that the node may represent; by default the one with the node's name."),
    ] = None,
) -> None:
    """Make the server's certificate and the keys of the nodes."""
    _require_flower()
    from fedlora.deploy.keys import Keys

    made = Keys(folder)
    if not host and not node:
        raise UserError("expected --host, for the server's certificate, or --node, for a node's key; found neither")
    if client and len(node or ()) != 1:
        raise UserError(f"--client: expected exactly one --node, found {len(node or ())}")
    if host:
        made.make_server(host)
        print(printable(str(made.ca)))
    for name in node or ():
        print(printable(str(made.make_node(name, client or ()))))


def _run(
    file: Path | None,
    overrides: list[str] | None,
    out: Path | None,
    resume: Path | None,
    start: Callable[[Path, "Progress"], "Result"],
    command: Sequence[str],
) -> None:
    """Runs or resumes a run with `start`, showing its progress; `command` with --resume resumes it."""
    from fedlora.deploy.launch import prepare

    path, experiment = select_run(file, overrides, out, resume)
    if resume is None:
        prepare(experiment, path)
    follow(path, experiment.rounds, lambda progress: start(path, progress), command)


def _require_flower() -> None:
    """Checks that Flower is installed, and makes all files written by this command private to its user."""
    os.umask(0o077)
    if find_spec("flwr") is None:
        raise UserError("Flower is not installed; install it with: pip install 'fedlora[flower]'")
