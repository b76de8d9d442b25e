"""Overhead of a deployed round beyond the nodes' work, and Flower's share of it.

    python benchmarks/deployment.py [--nodes 4] [--rounds 8] [--set KEY=VALUE ...] [--write]

A shortened `fedlora demo` with a SuperLink and SuperNodes on this machine, one client each, with and without the clients'
evaluation after every round. Then an app that only echoes (`benchmarks/echo`) sends as many messages of the same size over
another SuperLink and as many of Flower's own SuperNodes, which start a process for each message. A round is the time from
one row of the log to the next; work is the time logged by the worker of the slowest node. The first round, before which
nodes load the model, and the last, after which nothing is sent, are excluded. With --write the page
docs/benchmarks/deployment.md is written.
"""

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import flwr
import tomli_w

from fedlora.config.demos import DEMOS
from fedlora.config.experiment import build
from fedlora.deploy import launch as deploy
from fedlora.deploy.address import Address
from fedlora.deploy.join import start_node
from fedlora.deploy.processes import CONNECTION, Process, free_port
from fedlora.deploy.processes import flwr as command
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.federated_data import FederatedData
from fedlora.rounds.progress import NullProgress
from fedlora.rounds.row import RoundRow

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks" / "deployment.md"
SMALL = ["data.rows=400", "data.test_rows=50", "train.max_length=32", "train.device=cpu", "clients.partition=iid"]
SMALL += ["evaluate.before=false"]  # no row and no message before the first training
SAID = re.compile(r"^(\d+) bytes answered with (\d+) in ([\d.]+) s$", re.MULTILINE)


class Clock(NullProgress):
    """Records the time and size of each round."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.sizes: list[int] = []

    def round_ended(self, row: RoundRow) -> None:
        """Notes the time."""
        self.ends.append(time.time())
        self.sizes.append(row.bytes_down)


def measured(home: Path, nodes: int, rounds: int, overrides: Sequence[str]) -> tuple[list[float], list[float], int]:
    """Seconds of each round but the first and the last, the work in each, and the bytes that one node was sent."""
    what = build(
        DEMOS["classification"], [*SMALL, f"clients.count={nodes}", f"rounds={rounds}", "deploy.wait=300", *overrides]
    )
    evaluated = what.evaluate.clients != "none"
    address, clock = Address("127.0.0.1", free_port()), Clock()
    deploy.prepare(what, home / "run")
    with ExitStack() as stack:
        link = SuperLink.start(home / "link", address, None)
        stack.callback(link.stop)
        members = [client.id for client in FederatedData.make(what).clients]
        for client in members:
            Settings.trusting(what, [client]).write(home / client)
            stack.callback(start_node(home / client, address, None).stop)
        link.run(home / "run", clock, print)
        work = [worked((home / client / "worker.log").read_text(), evaluated) for client in members]
    return (
        [b - a for a, b in pairwise(clock.ends)][:-1],
        [max(node[i] for node in work) for i in range(1, rounds - 1)],
        clock.sizes[1] // nodes,
    )


def worked(log: str, evaluated: bool) -> list[float]:
    """A node's seconds for each round, its training and its evaluation."""
    _, *seconds, _ = [float(found[2]) for found in SAID.findall(log)]  # without the handshake and the end
    return [sum(some) for some in zip(seconds[::2], seconds[1::2], strict=True)] if evaluated else seconds


def floor(home: Path, nodes: int, rounds: int, messages: int, size: int) -> list[float]:
    """Seconds of the rounds of the app that only echoes."""
    address, file = Address("127.0.0.1", free_port()), home / "ends.json"
    with ExitStack() as stack:
        link = SuperLink.start(home / "link", address, None)
        stack.callback(link.stop)
        for i in range(nodes):
            command_line = ["flower-supernode", "--insecure", "--superlink", str(address), "--port", str(free_port())]
            stack.callback(Process(command_line, home / f"node{i}", home / f"node{i}.log").stop)
        config = {"file": str(file), "nodes": nodes, "rounds": rounds, "messages": messages, "size": size}
        (home / "settings.toml").write_text(tomli_w.dumps(config))
        command(link.home, "run", str(HERE / "echo"), CONNECTION, "--run-config", str(home / "settings.toml"))
        while not file.exists():
            time.sleep(0.5)
    ends = json.loads(file.read_text())
    return [b - a for a, b in pairwise(ends)]


def seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def line(name: str, nodes: int, rounds: int, overrides: Sequence[str], messages: int) -> str:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole, work, size = measured(Path(one), nodes, rounds, overrides)
        beyond = [a - b for a, b in zip(whole, work, strict=True)]
        idle = floor(Path(other), nodes, rounds, messages, size)
    text = f"| {name} | {seconds(whole)} | {seconds(work)} | {seconds(beyond)} | {seconds(idle)} |"
    print(text, flush=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(HERE.parent)}")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    cases = [
        ("train, clients evaluate every round", ["evaluate.clients=all"], 2),
        ("train only", ["evaluate.clients=none"], 1),
    ]
    rows = [line(name, given.nodes, given.rounds, [*given.set, *more], messages) for name, more, messages in cases]
    text = "\n".join(
        [
            "# Overhead of a deployed round",
            "",
            f"Made by `benchmarks/deployment.py`: flwr {flwr.__version__}, {given.nodes} "
            f"SuperNode{'s' * (given.nodes != 1)} and the SuperLink on one machine with {os.cpu_count()} cores "
            f"({platform.machine()}), load average at the start {load:.1f}.",
            "",
            f"Seconds: the median of {given.rounds - 2} rounds, and the range. Work: training and evaluation on the "
            "slowest node. Overhead: the rest of the round. Flower alone: an app that only echoes as many messages of the "
            "same size.",
            "",
            "| round | total | work | overhead | Flower alone |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    if given.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
