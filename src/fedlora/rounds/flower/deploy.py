"""The commands that start a server, or all of Flower on this machine; `join` starts their other end."""

from contextlib import ExitStack
from pathlib import Path

from fedlora.config import Experiment
from fedlora.errors import UserError
from fedlora.result import Result
from fedlora.rounds.checkpoint import DEPLOY, RunFolder
from fedlora.rounds.flower.address import Address
from fedlora.rounds.flower.join import start_node
from fedlora.rounds.flower.keys import Keys
from fedlora.rounds.flower.link import SuperLink
from fedlora.rounds.flower.processes import Say, free_port, private
from fedlora.rounds.flower.settings import Settings
from fedlora.rounds.sample import check_cohort
from fedlora.rounds.watch import Watcher
from fedlora.runs import read_folder, record, settled


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
    private(path)
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
    from fedlora.problem import Problem  # takes a second to import

    experiment = read_folder(path)
    members = [who.id for who in Problem.make(experiment).members]
    home, address = path.resolve() / DEPLOY, Address("127.0.0.1", free_port())
    count = len([*home.glob("node*")]) or min(count, len(members))
    with ExitStack() as stack:
        server = SuperLink.start(home, address, None)
        stack.callback(server.stop)
        for i in range(count):
            node = home / f"node{i}"
            Settings.trusting(experiment, members[i::count]).write(node)
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
    if not keys.credentials():
        raise UserError(f"{folder}: has no node's key, so nobody could connect; see fedlora keys")
    return keys


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
