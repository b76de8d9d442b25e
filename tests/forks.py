"""Processes that may be killed: forks of one server that has imported everything once, so that each costs milliseconds."""

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["peft", "transformers.models.bert.modeling_bert", "fedlora.api", "pytest"])
if multiprocessing.current_process().name == "MainProcess":
    forkserver.ensure_running()  # its imports take seconds, and go on while the first tests run


def started(function: Callable[..., None], *arguments: Any, **named: Any) -> BaseProcess:
    """A process that runs a function of a module."""
    process = _CONTEXT.Process(target=function, args=arguments, kwargs=named, daemon=True)
    process.start()
    return process


def ended(function: Callable[..., None], *arguments: Any, **named: Any) -> int:
    """The exit code of such a process; minus the signal's number if it was killed."""
    process = started(function, *arguments, **named)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def pipe() -> tuple[Connection, Connection]:
    """An end to receive from, and one to give to a process to send by."""
    return _CONTEXT.Pipe(duplex=False)
