"""Flower's processes: started so that they are quiet, stay offline and end with whoever started them."""

import ctypes
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.deploy.address import Address
from fedlora.deploy.flower_command import flower_command
from fedlora.deploy.guard import NODES_MAY, SECRET
from fedlora.errors import RunStopped, UserError

Printer = Callable[[str], None]
"""Who shows a line to a person."""

_LIBC = ctypes.CDLL(None)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_STOP_SECONDS = 8.0
CONNECTION = "fedlora"


def environment(home: Path) -> dict[str, str]:
    """What Flower's processes get: a home of their own, the secret of the SuperLink that it belongs to if that is our own,
    and no telemetry, look for updates or installing at run time."""
    here, file = str(Path(sys.executable).parent), home / "secret"
    return {
        **os.environ,
        **({SECRET: file.read_text()} if file.exists() else {}),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # of a second that each message waits at most; a whole one otherwise
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
    }


class Process:
    """One long-lived process with its log; it ends when this process ends, however that happens."""

    def __init__(self, command: Sequence[str], home: Path, log: Path, descriptors: Sequence[int] = ()) -> None:
        """`descriptors` are handed on to it. What it writes, this user alone can read."""
        private(home)
        self.log = log
        with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            self._process = subprocess.Popen(
                [f"{Path(sys.executable).parent}/{command[0]}", *command[1:]],
                env=environment(home),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=descriptors,
                umask=0o077,
                start_new_session=True,  # a Ctrl-C is for us: we end them in order
                preexec_fn=_die_with(os.getpid()),
            )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def ended(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The last line of its log that is not empty."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")

    def stop(self) -> None:
        """Asks it to end, and then makes it; what it started ends with it."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        _kill_group(self.pid)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _die_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def flwr(home: Path, *arguments: str) -> Any:
    """What the command `flwr ... --format json` says.

    Raises:
        RunStopped: it failed, and why.
    """
    command = flower_command("flwr", *arguments, "--format", "json")
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {"success": False, "error-message": (done.stderr or done.stdout).strip().splitlines()[-1:]}
    if done.returncode or not said.get("success", True):
        raise RunStopped(f"flwr {arguments[0]}: {said.get('error-message', said)}")
    return said


def private(folder: Path) -> None:
    """Makes the folder, for this user alone."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def connection(home: Path, address: Address, ca: Path | None, secret: str | None = None) -> None:
    """Tells the command `flwr` of this home where the SuperLink is, and its secret if it is our own."""
    security: Mapping[str, Any] = {"insecure": True} if ca is None else {"root-certificates": str(ca.resolve())}
    table = {"superlink": {"default": CONNECTION, CONNECTION: {"address": str(address), **security}}}
    private(home)
    (home / "config.toml").write_text(tomli_w.dumps(table))
    (home / "secret").unlink(missing_ok=True)
    if secret is not None:
        with open(home / "secret", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(secret)


def wait_until_ready(address: Address, ca: Path | None, process: Process, seconds: float = 60.0) -> None:
    """Waits until the process answers there.

    Raises:
        UserError: it has ended instead, or does not answer.
    """
    import httpx

    until, scheme = time.monotonic() + seconds, "http" if ca is None else "https"
    verify = True if ca is None else ssl.create_default_context(cafile=ca)
    while True:
        with suppress(httpx.TransportError):
            httpx.get(f"{scheme}://{address}{NODES_MAY}", verify=verify, timeout=5.0, trust_env=False)
            return
        if process.ended() is not None or time.monotonic() > until:
            raise UserError(f"Flower does not start on {address}: {process.last_words()}; its log is {process.log}")
        time.sleep(0.1)


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
