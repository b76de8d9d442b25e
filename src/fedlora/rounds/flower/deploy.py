"""The commands that start Flower: a server, a node, or all of it on this machine."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from fedlora.config import Experiment
from fedlora.errors import UserError
from fedlora.experiment import Problem, Result, read_folder, record, settled
from fedlora.rounds.checkpoint import DEPLOY, RunFolder
from fedlora.rounds.flower.keys import Keys
from fedlora.rounds.flower.line import SETTING
from fedlora.rounds.flower.link import Address, Say, SuperLink
from fedlora.rounds.flower.node import Settings
from fedlora.rounds.flower.processes import Process, free_port
from fedlora.rounds.loop import Watcher
from fedlora.rounds.sample import check_cohort

_POLL = 0.2
_AGAIN_SECONDS = 5.0
_NOT_LET_IN = "Exit Code: 305"


def prepare(experiment: Experiment, path: Path) -> None:
    """Makes the run's folder.

    Raises:
        UserError: the folder cannot be used, or the experiment does not say how many clients there will be.
    """
    if experiment.data.task is not None:
        raise UserError("data.task is for one machine: over Flower an owner joins once for each task, with a file for each")
    if (count := experiment.clients.size) is None:
        raise UserError("clients.count must say for how many clients the server waits")
    check_cohort(count, experiment.sampling)
    folder = RunFolder.create(path)
    try:
        record(folder, settled(experiment))
    finally:
        folder.release()


def local(path: Path, count: int, watch: Watcher, say: Say) -> Result:
    """Runs the folder's experiment with a SuperLink and so many SuperNodes on this machine, without keys.

    A run that is taken up again has its nodes already, which hold the clients' states.

    Raises:
        UserError: the experiment or its data cannot be used, or Flower does not start.
        RunStopped: the run cannot go on.
    """
    members = [who.id for who in Problem.make(read_folder(path)).members]
    home, address = path.resolve() / DEPLOY, Address("127.0.0.1", free_port())
    count = len([*home.glob("node*")]) or min(count, len(members))
    with ExitStack() as stack:
        server = SuperLink.start(home, address, None)
        stack.callback(server.stop)
        for i in range(count):
            node = home / f"node{i}"
            Settings(clients=members[i::count]).write(node)
            stack.callback(start_node(node, address, None).stop)
        return server.run(path, watch, say)


def needed(address: Address, folder: Path | None) -> Keys | None:
    """The keys for a server that listens there; none are needed on the loopback.

    Raises:
        UserError: they are needed and not given, or incomplete.
    """
    if folder is None:
        if not address.loopback:
            raise UserError(f"--listen {address} can be reached from other machines and needs --keys (see fedlora keys)")
        return None
    keys = Keys(folder)
    keys.superlink()
    if not keys.nodes():
        raise UserError(f"{folder}: has no node's key, so nobody could connect; see fedlora keys")
    return keys


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


def serve(path: Path, address: Address, keys: Keys | None, watch: Watcher, say: Say) -> Result:
    """Runs the folder's experiment with a SuperLink there.

    Raises:
        UserError: the experiment or its data cannot be used, or Flower does not start.
        RunStopped: the run cannot go on.
    """
    server = SuperLink.start(path.resolve() / DEPLOY, address, keys)
    try:
        say(f"listening on {address}" + ("" if keys is None else f" for {len(keys.nodes())} nodes with keys"))
        return server.run(path, watch, say)
    finally:
        server.stop()


def serve_on(path: Path, address: Address, ca: Path | None, watch: Watcher, say: Say) -> Result:
    """Runs the folder's experiment on a SuperLink of this machine that runs already.

    Raises:
        UserError: the experiment or its data cannot be used.
        RunStopped: the run cannot go on, or there is no SuperLink.
    """
    return SuperLink.running(path.resolve() / DEPLOY, address, ca).run(path, watch, say)


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
