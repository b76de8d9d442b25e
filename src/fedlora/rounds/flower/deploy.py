"""The commands that start Flower: a server, a node, or all of it on this machine."""

import ipaddress
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.config import Experiment
from fedlora.errors import RunStopped, UserError
from fedlora.experiment import Problem, Result, read_folder, record, settled
from fedlora.rounds.checkpoint import RunFolder
from fedlora.rounds.flower.journal import FOLDER, Reader
from fedlora.rounds.flower.keys import Keys
from fedlora.rounds.flower.line import SETTING
from fedlora.rounds.flower.node import Settings
from fedlora.rounds.flower.processes import CONNECTION, Process, connection, flwr, free_port, wait_for_port
from fedlora.rounds.loop import Watcher
from fedlora.rounds.sample import check_cohort

Say = Callable[[str], None]
_POLL = 0.2
_STATUS_SECONDS = 15.0
_AGAIN_SECONDS = 5.0
_NOT_LET_IN = "Exit Code: 305"


@dataclass(frozen=True)
class Address:
    """Where a SuperLink listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """HOST:PORT.

        Raises:
            UserError: it is not that.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"{text!r} is no address; expected HOST:PORT, for example server.example.org:9092")
        return cls(host.strip("[]"), int(port))

    @property
    def loopback(self) -> bool:
        """Whether it can only be reached from this machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


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

    Raises:
        UserError: the experiment or its data cannot be used, or Flower does not start.
        RunStopped: the run cannot go on.
    """
    members = [who.id for who in Problem.make(read_folder(path)).members]
    home, address = path.resolve() / FOLDER, Address("127.0.0.1", free_port())
    with ExitStack() as stack:
        server = Server(home, address, None)
        stack.callback(server.stop)
        for i in range(min(count, len(members))):
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
    server = Server(path.resolve() / FOLDER, address, keys)
    try:
        say(f"listening on {address}" + ("" if keys is None else f" for {len(keys.nodes())} nodes with keys"))
        return server.run(path, watch, say)
    finally:
        server.stop()


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


class Server:
    """A SuperLink of our own."""

    def __init__(self, home: Path, address: Address, keys: Keys | None) -> None:
        """Starts it, and registers the nodes whose keys there are.

        Raises:
            UserError: it does not start.
        """
        self._home = home
        command = ["python", "-m", "fedlora.rounds.flower.superlink", "--host", address.host, "--port", str(address.port)]
        command += ["--disable-runtime-dependency-installation"]
        command += ["--insecure"] if keys is None else keys.superlink()
        home.mkdir(parents=True, exist_ok=True)
        self._link = Process(command, home / "flower", home / "superlink.log")
        try:
            wait_for_port(address.port, self._link)
            connection(self._home / "flower", f"127.0.0.1:{address.port}", None if keys is None else keys.ca)
            for public in () if keys is None else keys.nodes():
                flwr(self._home / "flower", "supernode", "register", str(public), CONNECTION)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The SuperLink's process."""
        return self._link.pid

    def stop(self) -> None:
        """Ends it and what it started."""
        self._link.stop()

    def run(self, path: Path, watch: Watcher, say: Say) -> Result:
        """Runs the folder's experiment to its end, and shows its progress.

        Raises:
            UserError: the experiment, its data or its model cannot be used.
            RunStopped: the run cannot go on, or Flower ended it.
        """
        home = self._home / "flower"
        reader = Reader(path, watch, say)
        settings = self._home / "settings.toml"
        settings.write_text(tomli_w.dumps({"folder": str(path.resolve())}))
        app = str(files("fedlora.rounds.flower") / "app")
        run = flwr(home, "run", app, CONNECTION, "--run-config", str(settings))["run-id"]
        asked = time.monotonic()
        while (end := reader.show()) is None:
            if self._link.ended() is not None:
                raise RunStopped(f"the SuperLink ended: {self._link.last_words()}; its log is {self._link.log}")
            if time.monotonic() - max(reader.changed, asked) > _STATUS_SECONDS:
                asked = time.monotonic()
                status = _status(flwr(home, "ls", CONNECTION, "--run-id", str(run)))
                if status.startswith("finished") and (end := reader.show()) is None:
                    raise RunStopped(f"Flower says that the run has {status}; the server's log is {self._link.log}")
            time.sleep(_POLL)
        how, why = end
        if how != "done":
            raise (UserError if how == "unusable" else RunStopped)(why)
        folder = RunFolder(path)
        try:
            return Result(path, folder.rows(), {"": path / "adapter"} if (path / "adapter").exists() else {})
        finally:
            folder.release()


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


def _status(said: Any) -> str:
    """The status of the only run that `flwr ls` tells of."""
    runs = said.get("runs", [])
    return str(runs[0].get("status", "unknown")) if runs else "unknown"
