"""Nodes and workers that are killed in the middle of a run."""

import os
import signal
from contextlib import ExitStack
from threading import Thread

import pytest

from fedlora.config.experiment import build
from fedlora.deploy import launch as deploy
from fedlora.deploy.address import Address
from fedlora.deploy.join import start_node
from fedlora.deploy.processes import free_port
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.errors import RunStopped
from fedlora.rounds.progress import NullProgress

from lives import rows_in, table, until
from wired import furnish

pytestmark = [pytest.mark.flower, pytest.mark.full, pytest.mark.timeout(600)]


def test_nodes_and_workers_may_die_or_be_stopped_and_return_and_their_base_is_that_of_all(tmp_path):
    what = table(
        furnish(tmp_path), 3, rounds=500, deploy={"deadline": 60.0, "wait": 200.0, "poll": 0.2}, evaluate={"every": 99}
    )
    path, address = tmp_path / "run", Address("127.0.0.1", free_port())
    experiment = build(what)
    deploy.prepare(experiment, path)
    with ExitStack() as stack:
        link = SuperLink.start(tmp_path / "link", address, None)
        stack.callback(link.stop)
        nodes = {}
        for client in ("000", "001", "002"):
            Settings.trusting(experiment, [client]).write(tmp_path / client)
            nodes[client] = start_node(tmp_path / client, address, None)
            stack.callback(nodes[client].stop)

        def follow_it():
            with pytest.raises(RunStopped, match="the SuperLink ended"):
                link.run(path, NullProgress(), print)

        follow = Thread(target=follow_it)
        follow.start()
        assert until(lambda: rows_in(path))
        worker = int((tmp_path / "000" / "worker.pid").read_text())
        os.kill(worker, signal.SIGKILL)
        os.killpg(nodes["001"].pid, signal.SIGKILL)
        missing = until(lambda: [row for row in rows_in(path) if "001" in row["rejected"]])
        assert missing and missing[0]["accepted"] == ["000", "002"], [row["rejected"] for row in missing]
        nodes["001"] = start_node(tmp_path / "001", address, None)
        stack.callback(nodes["001"].stop)
        back = until(lambda: [r["round"] for r in rows_in(path) if r["round"] > missing[0]["round"] and not r["rejected"]])
        assert back
        asleep = [nodes["002"].pid, int((tmp_path / "002" / "worker.pid").read_text())]
        for pid in asleep:
            os.kill(pid, signal.SIGSTOP)
        try:
            late = until(lambda: [r for r in rows_in(path) if r["round"] > back[0] and "002" in r["rejected"]])
        finally:
            for pid in asleep:
                os.kill(pid, signal.SIGCONT)
        awake = until(
            lambda: [row for row in rows_in(path) if late and row["round"] > late[0]["round"] and not row["rejected"]]
        )
        link.stop()
        follow.join()
    assert late and late[0]["accepted"] == ["000", "001"] and awake
    assert all("000" in row["accepted"] for row in rows_in(path))
    assert int((tmp_path / "000" / "worker.pid").read_text()) != worker
    for client in nodes:  # what came with the work of that round
        assert set(range(back[0] - 1)) <= {int(f.stem) for f in (tmp_path / client).glob("runs/*/base_updates/*")}
