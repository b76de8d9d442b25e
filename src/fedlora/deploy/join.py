"""Node side of a deployment: a SuperNode. Without expensive imports; the worker holds the model."""

from collections.abc import Callable, Mapping
from pathlib import Path

from fedlora.deploy.address import Address
from fedlora.deploy.processes import Printer, Process
from fedlora.deploy.settings import Settings, any_accepted
from fedlora.errors import UserError


def credentials(server: Address, key: Path | None, ca: Path | None) -> Mapping[str, Path] | None:
    """Credential files of a node for a server at this address; not required on the loopback interface.

    Raises:
        UserError: they are required but not given, or do not exist.
    """
    given = {name: path for name, path in {"key": key, "ca": ca}.items() if path is not None}
    if len(given) < 2 and (given or not server.loopback):
        raise UserError(f"--server {server} requires --key (this node's, from fedlora keys) and --ca (the server's ca.crt)")
    for path in given.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    return given or None


def join(
    folder: Path,
    settings: Settings,
    server: Address,
    keys: Mapping[str, Path] | None,
    notify: Printer,
    confirm: Callable[[str], bool] | None = None,
) -> None:
    """Runs a SuperNode until it is interrupted; it reconnects after the server was unavailable.

    `confirm` asks the node's owner a question; None if nobody can be asked.

    Raises:
        UserError: the settings are invalid, nobody can be asked what the node may do, or the server rejects this node.
    """
    from fedlora.deploy import supernode  # takes a second to import

    if settings.data is not None and len(settings.clients) != 1:
        raise UserError("--data is the file of one client; pass one --client, or start one node for each client")
    if settings.data is not None and not Path(settings.data).is_file():
        raise UserError(f"{settings.data}: no such file")
    if confirm is None and settings.policy is None and not settings.accept and not any_accepted(folder):
        raise UserError(
            "nobody can be asked what this node may do, as there is no terminal: join with --policy FILE (fedlora join "
            "--write-policy FILE writes an example), or with --accept to allow whatever the server asks for"
        )
    settings.write(folder)
    notify(f"client {', '.join(settings.clients)} joins {server}; its state is in {folder}")
    supernode.run(folder, server, keys, notify, confirm)


def start_node(folder: Path, server: Address, keys: Mapping[str, Path] | None) -> Process:
    """Starts a SuperNode whose worker uses this folder; `keys` are the files `ca` and `key`, None means without TLS."""
    files = [] if keys is None else [str(keys["key"]), str(keys["ca"])]
    command = ["python", "-m", "fedlora.deploy.supernode", str(folder.resolve()), str(server), *files]
    return Process(command, folder / "flower", folder / "supernode.log")
