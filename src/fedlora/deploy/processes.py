"""Flower's processes: started without console output or network services, and ended with their parent."""

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
from fedlora.deploy.guard import NODE_PATHS, SECRET
from fedlora.deploy.log_file import last_log_line
from fedlora.errors import RunStopped, UserError

Printer = Callable[[str], None]
"""Shows a line to the user."""

_LIBC = ctypes.CDLL(None)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_STOP_SECONDS = 8.0
CONNECTION = "fedlora"


def environment(home: Path) -> dict[str, str]:
    """Environment of Flower's processes: a separate home, the secret of a SuperLink started here, and no telemetry,
    update checks or installation at run time."""
    scripts, secret = str(Path(sys.executable).parent), home / "secret"
    return {
        **os.environ,
        **({SECRET: secret.read_text()} if secret.exists() else {}),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",  # seconds, bounds the delay of a message; the default is 1
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
    }


class Process:
    """Long-running process with a log file; ends when this process ends, for any reason."""

    def __init__(self, command: Sequence[str], home: Path, log: Path, descriptors: Sequence[int] = ()) -> None:
        """`descriptors` are inherited by the process. Files that it writes are readable by this user only."""
        make_private(home)
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
                start_new_session=True,  # Ctrl-C reaches this process only, which ends the others in order
                preexec_fn=_die_with(os.getpid()),
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ended(self) -> int | None:
        """Exit code, None while the process runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Terminates the process, then kills it if necessary, together with the processes that it started."""
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
    """Runs `flwr ... --format json` and returns its parsed output.

    Raises:
        RunStopped: the command failed; states the reason.
    """
    command = flower_command("flwr", *arguments, "--format", "json")
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        output = json.loads(done.stdout)
    except ValueError:
        output = {"success": False, "error-message": (done.stderr or done.stdout).strip().splitlines()[-1:]}
    if done.returncode or not output.get("success", True):
        raise RunStopped(f"flwr {arguments[0]}: {output.get('error-message', output)}")
    return output


def make_private(folder: Path) -> None:
    """Creates the folder, accessible to this user only."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def write_connection(home: Path, address: Address, ca: Path | None, secret: str | None = None) -> None:
    """Configures the `flwr` command of this home with the SuperLink's address, and its secret if it is our own."""
    security: Mapping[str, Any] = {"insecure": True} if ca is None else {"root-certificates": str(ca.resolve())}
    table = {"superlink": {"default": CONNECTION, CONNECTION: {"address": str(address), **security}}}
    make_private(home)
    (home / "config.toml").write_text(tomli_w.dumps(table))
    (home / "secret").unlink(missing_ok=True)
    if secret is not None:
        with open(home / "secret", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(secret)


def wait_until_ready(address: Address, ca: Path | None, process: Process, seconds: float = 60.0) -> None:
    """Waits until the process responds at the address.

    Raises:
        UserError: the process has ended, or does not respond in time.
    """
    import httpx

    until, scheme = time.monotonic() + seconds, "http" if ca is None else "https"
    verify = True if ca is None else ssl.create_default_context(cafile=ca)
    while True:
        with suppress(httpx.TransportError):
            httpx.get(f"{scheme}://{address}{NODE_PATHS}", verify=verify, timeout=5.0, trust_env=False)
            return
        if process.ended() is not None or time.monotonic() > until:
            raise UserError(
                f"Flower does not start on {address}; last log line: {last_log_line(process.log)}; its log is {process.log}"
            )
        time.sleep(0.1)


def free_port() -> int:
    """Returns a currently unused port of this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
