"""A SuperLink, started here or already running, and the execution of a run on it."""

import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.deploy.address import Address
from fedlora.deploy.event_log import Reader
from fedlora.deploy.keys import Keys
from fedlora.deploy.log_file import last_log_line
from fedlora.deploy.processes import CONNECTION, Printer, Process, flwr, make_private, wait_until_ready, write_connection
from fedlora.errors import RunStopped, UserError
from fedlora.rounds.progress import Progress
from fedlora.runs.result import Result

_POLL = 0.2
_STATUS_SECONDS = 15.0


@dataclass(frozen=True)
class SuperLink:
    """SuperLink on which runs can be started. `home` has its files; `process` is None if it was started elsewhere.

    `keys` are the keys of the nodes; None if the SuperLink requires none, or was started elsewhere.
    """

    home: Path
    process: Process | None
    keys: Keys | None = None

    @classmethod
    def start(cls, home: Path, address: Address, keys: Keys | None) -> "SuperLink":
        """Starts a SuperLink that accepts the nodes in `keys`.

        Raises:
            UserError: it does not start.
        """
        here, ca = address.here, None if keys is None else keys.ca
        options = ["--insecure"] if keys is None else keys.superlink(here.host)
        nodes = "" if keys is None else str(keys.folder.resolve() / "nodes")
        make_private(home)
        write_connection(home / "flower", here, ca, secrets.token_hex(32))
        with address.listen() as listening:
            command = ["python", "-m", "fedlora.deploy.superlink_guard", str(listening.fileno()), nodes]
            command += ["--host", here.host, "--port", str(here.port), "--disable-runtime-dependency-installation"]
            process = Process([*command, *options], home / "flower", home / "superlink.log", [listening.fileno()])
        link = cls(home / "flower", process, keys)
        try:
            wait_until_ready(here, ca, process)
        except BaseException:
            link.stop()
            raise
        return link

    @classmethod
    def running(cls, home: Path, address: Address, ca: Path | None) -> "SuperLink":
        """Connects to a SuperLink started elsewhere. It must run on this machine, where the run's folder is."""
        write_connection(home / "flower", address, ca)
        return cls(home / "flower", None)

    def stop(self) -> None:
        """Stops the SuperLink and the processes that it started, unless it was started elsewhere."""
        if self.process is not None:
            self.process.stop()

    def run(self, path: Path, progress: Progress, notify: Printer) -> Result:
        """Runs the folder's experiment to its end, showing its progress.

        Raises:
            UserError: the experiment, its data or its model cannot be used.
            RunStopped: the run cannot continue, or Flower ended it.
        """
        reader = Reader(path, progress, notify)
        settings = self.home / "settings.toml"
        keys = "" if self.keys is None else str(self.keys.folder.resolve())
        settings.write_text(tomli_w.dumps({"folder": str(path.resolve()), "keys": keys}))
        app = str(files("fedlora.deploy") / "app")
        run = str(flwr(self.home, "run", app, CONNECTION, "--run-config", str(settings))["run-id"])
        try:
            how, why = self._follow(run, path, reader)
        except BaseException:
            if self.process is None:
                with suppress(RunStopped):
                    flwr(self.home, "stop", run, CONNECTION)
            raise
        if how != "done":
            raise (UserError if how == "unusable" else RunStopped)(why)
        return Result.read(path)

    def _follow(self, run: str, path: Path, reader: Reader) -> tuple[str, str]:
        """Waits for the end of the run; returns its result and reason, from its event log."""
        asked = time.monotonic()
        while (end := reader.show()) is None:
            if not path.is_dir():
                raise RunStopped(f"{path}: the run directory was moved or removed; move it back, or resume it where it is")
            if self.process is not None and self.process.ended() is not None:
                raise RunStopped(
                    f"the SuperLink ended; last log line: {last_log_line(self.process.log)}; its log is {self.process.log}"
                )
            if time.monotonic() - max(reader.changed, asked) > _STATUS_SECONDS:
                asked = time.monotonic()
                status = _status(flwr(self.home, "ls", CONNECTION, "--run-id", run))
                if status.startswith("finished"):
                    if (end := reader.show()) is not None:
                        return end  # written since the last read; a reader shows each event once
                    log = "" if self.process is None else f"; the server's log is {self.process.log}"
                    raise RunStopped(f"Flower reports that the run has {status}{log}")
            time.sleep(_POLL)
        return end


def _status(output: Any) -> str:
    """Status of the only run in the output of `flwr ls`."""
    runs = output.get("runs", [])
    return str(runs[0].get("status", "unknown")) if runs else "unknown"
