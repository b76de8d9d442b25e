"""Commands that start a server, or a whole deployment on this machine; `join` starts the nodes of a server."""

from contextlib import ExitStack
from pathlib import Path

from fedlora.config.experiment import Experiment
from fedlora.deploy.address import Address
from fedlora.deploy.join import start_node
from fedlora.deploy.keys import Keys
from fedlora.deploy.processes import Printer, free_port, make_private
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.errors import UserError
from fedlora.rounds.progress import Progress
from fedlora.rounds.sample import check_cohort
from fedlora.runs.folder import DEPLOY, RunFolder
from fedlora.runs.result import Result
from fedlora.runs.start import read_folder, record, resolve_settings


def prepare(experiment: Experiment, path: Path) -> None:
    """Creates the run's folder.

    Raises:
        UserError: the folder cannot be used, or the experiment does not specify the number of clients.
    """
    if experiment.data.task is not None:
        raise UserError(
            "data.task is supported on one machine only; over Flower, start one node for each task, with its own file"
        )
    if (count := experiment.clients.size) is None:
        raise UserError("clients.count is missing; set it to the number of clients for which the server waits")
    check_cohort(count, experiment.sampling.fraction, experiment.sampling.min_replies)
    folder = RunFolder.create(path)
    make_private(path)
    try:
        record(folder, resolve_settings(experiment))
    finally:
        folder.release()


def local(path: Path, count: int, progress: Progress, notify: Printer) -> Result:
    """Runs the folder's experiment with a SuperLink and at most `count` SuperNodes on this machine, without keys.

    A resumed run uses its existing nodes, which hold the clients' states.

    Raises:
        UserError: the experiment or its data cannot be used, or Flower does not start.
        RunStopped: the run cannot continue.
    """
    from fedlora.federated_data import FederatedData  # takes a second to import

    experiment = read_folder(path)
    clients = [client.id for client in FederatedData.make(experiment).clients]
    home, address = path.resolve() / DEPLOY, Address("127.0.0.1", free_port())
    count = len([*home.glob("node*")]) or min(count, len(clients))
    with ExitStack() as stack:
        server = SuperLink.start(home, address, None)
        stack.callback(server.stop)
        for i in range(count):
            node = home / f"node{i}"
            Settings.trusting(experiment, clients[i::count]).write(node)
            stack.callback(start_node(node, address, None).stop)
        return server.run(path, progress, notify)


def needed(address: Address, folder: Path | None) -> Keys | None:
    """Keys of a server that listens on this address; not required on the loopback interface.

    Raises:
        UserError: they are required but not given, or incomplete.
    """
    if folder is None:
        if not address.loopback:
            raise UserError(
                f"--listen {address} is reachable from other machines, which requires --keys (see fedlora keys)"
            )
        return None
    keys = Keys(folder)
    keys.superlink()
    if not keys.credentials():
        raise UserError(f"{folder}: has no node keys, so no node could connect; create one with fedlora keys")
    return keys


def serve(path: Path, address: Address, keys: Keys | None, progress: Progress, notify: Printer) -> Result:
    """Runs the folder's experiment with a SuperLink on this address.

    Raises:
        UserError: the experiment or its data cannot be used, or Flower does not start.
        RunStopped: the run cannot continue.
    """
    server = SuperLink.start(path.resolve() / DEPLOY, address, keys)
    try:
        notify(f"listening on {address}" + ("" if keys is None else f" for {len(keys.nodes())} nodes with keys"))
        return server.run(path, progress, notify)
    finally:
        server.stop()


def serve_on(path: Path, address: Address, ca: Path | None, progress: Progress, notify: Printer) -> Result:
    """Runs the folder's experiment on a SuperLink that already runs on this machine.

    Raises:
        UserError: the experiment or its data cannot be used.
        RunStopped: the run cannot continue, or no SuperLink is reachable.
    """
    return SuperLink.running(path.resolve() / DEPLOY, address, ca).run(path, progress, notify)
