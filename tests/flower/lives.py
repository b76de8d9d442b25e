"""What the tests share that start, kill and look for processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fedlora.deploy.event_log import NAME
from fedlora.runs.folder import DEPLOY

from wired import problem


def table(home, clients, **more):
    return {
        **problem(home, "flora"),
        "clients": {"count": clients, "partition": "iid"},
        "deploy": {"deadline": 120.0, "wait": 200.0, "poll": 0.2},
        **more,
    }


def until(condition, seconds=240.0):
    """Waits; what the condition gave in the end."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def event_log(path):
    file = path / DEPLOY / NAME
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows_in(path):
    """Of the rounds, without the model before training."""
    return [line["row"] for line in event_log(path) if "row" in line and line["row"]["round"]]


def alive_in(folder):
    """The processes that have this folder in their command line or their environment, but for this one."""
    return {
        pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if pid != os.getpid() and knows(pid, folder)
    }


def knows(pid, folder):
    try:
        texts = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ", "stat")]
    except OSError:
        return False
    *where, state = texts
    return any(str(folder).encode() in text for text in where) and state.rpartition(b")")[2].split()[0] != b"Z"


def fedlora(*arguments):
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "fedlora.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
