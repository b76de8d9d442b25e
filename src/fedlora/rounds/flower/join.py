"""A node's side of a deployment: a SuperNode, kept alive. Imports nothing heavy; the worker has the model."""

import time
from collections.abc import Mapping
from pathlib import Path

from fedlora.errors import UserError
from fedlora.rounds.flower.address import Address
from fedlora.rounds.flower.line import SETTING
from fedlora.rounds.flower.processes import Process, Say, free_port
from fedlora.rounds.flower.settings import Settings

_POLL = 0.2
_AGAIN_SECONDS = 5.0
_NOT_LET_IN = "Exit Code: 305"


def credentials(server: Address, key: Path | None, ca: Path | None) -> Mapping[str, Path] | None:
    """A node's files for a server there; none are needed on the loopback.

    Raises:
        UserError: they are needed and not given, or not there.
    """
    given = {name: path for name, path in {"key": key, "ca": ca}.items() if path is not None}
    if len(given) < 2 and (given or not server.loopback):
        raise UserError(f"--server {server} needs --key (this node's, from fedlora keys) and --ca (the server's ca.crt)")
    for path in given.values():
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    return given or None


def join(folder: Path, settings: Settings, server: Address, keys: Mapping[str, Path] | None, say: Say) -> None:
    """Runs a SuperNode until it is interrupted; starts it again if the server sent it away or Flower gave up.

    Raises:
        UserError: the settings cannot be used, or the server does not let this node in.
    """
    if settings.data is not None and len(settings.clients) != 1:
        raise UserError("--data is one client's; give one --client, or start one node for each")
    if settings.data is not None and not Path(settings.data).is_file():
        raise UserError(f"{settings.data}: no such file")
    settings.write(folder)
    say(f"client {', '.join(settings.clients)} joins {server}; its state is in {folder}")
    while True:
        node = start_node(folder, server, keys)
        try:
            while node.ended() is None:
                time.sleep(_POLL)
        finally:
            node.stop()
        if refusal := node.said(_NOT_LET_IN):
            raise UserError(f"{server} does not let this node in: {refusal}; the whole log is {node.log}")
        say(f"the SuperNode ended ({node.last_words()}); again in {_AGAIN_SECONDS:g} s")
        time.sleep(_AGAIN_SECONDS)


def start_node(folder: Path, server: Address, keys: Mapping[str, Path] | None) -> Process:
    """Starts a SuperNode whose worker has this folder; `keys` are the files `ca` and `key`, None: without TLS."""
    port = str(free_port())
    command = ["flower-supernode", "--superlink", str(server), "--port", port]
    command += ["--node-config", f'{SETTING}="{folder.resolve()}"']
    if keys is None:
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(keys["ca"]), "--auth-supernode-private-key", str(keys["key"])]
    return Process(command, folder / "flower", folder / "supernode.log")
