"""Runs a Flower command whose requests have the secret of our SuperLink, which no command line contains."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

from fedlora.deploy.guard import send_secret

_MODULE = "fedlora.deploy.flower_command"
_TOKEN = "FEDLORA_TASK_TOKEN"


def flower_command(*words: str) -> list[str]:
    """Command line that runs the Flower command `words` through this module."""
    return [sys.executable, "-m", _MODULE, *words]


def main() -> None:
    """Runs the Flower command named by the first argument, with the other arguments."""
    sys.argv = sys.argv[1:]
    send_secret()
    if sys.argv[0] == "flower-superexec":
        _hide_tokens()
    if token := os.environ.pop(_TOKEN, None):
        sys.argv += ["--token", token]  # in this process only: the system shows the original command line
    (command,) = {found.value: found for found in entry_points(group="console_scripts", name=sys.argv[0])}.values()
    sys.exit(command.load()())


def _hide_tokens() -> None:
    """Makes the SuperExec start its processes with this module, and pass their tokens in the environment."""
    from flwr.supercore.superexec.executor import subprocess_executor

    def start(command: Sequence[str], **named: Any) -> "subprocess.Popen[bytes]":
        option = command.index("--token")
        without = [*command[:option], *command[option + 2 :]]
        return subprocess.Popen(flower_command(*without), env={**os.environ, _TOKEN: command[option + 1]}, **named)

    subprocess_executor.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined,assignment]


if __name__ == "__main__":
    main()
