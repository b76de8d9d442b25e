"""The `fedlora` command: help, exit codes and signals."""

import os
import signal
import subprocess
import sys

from commands import assert_refused

from fedlora import api
from fedlora.version import __version__


def test_a_refusal_reaches_the_shell(place):
    done = subprocess.run(
        [sys.executable, "-m", "fedlora.cli", "run", place / "no-such.toml"], capture_output=True, text=True, check=False
    )
    assert_refused((done.returncode, done.stdout, done.stderr), "no-such.toml", "no such file")


def test_an_interrupt_of_any_command_is_one_line(by_python, command, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "export", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, _, errors = command("export", by_python, tmp_path / "out")
    assert (code, errors.strip().splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in errors


def test_without_arguments_the_commands_are_listed(command):
    _, printed, _ = command()
    assert all(word in printed for word in ("Federated fine-tuning", "--version", "init", "settings"))


def test_what_is_not_interrupted_leaves_the_signals_as_they_were(command):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert command("--version") == (0, f"{__version__}\n", "")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
