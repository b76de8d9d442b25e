"""What happens when processes are killed, with a real SuperLink and real SuperNodes on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest
import tomli_w

from fedlora.config import build
from fedlora.errors import RunStopped
from fedlora.experiment import Silent, run
from fedlora.rounds.flower import deploy
from fedlora.rounds.flower.journal import FOLDER, NAME
from fedlora.rounds.flower.link import Address, SuperLink
from fedlora.rounds.flower.node import Settings
from fedlora.rounds.flower.processes import free_port

from wired import assert_same_runs, furnish, problem, rows_of

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


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


def journal(path):
    file = path / FOLDER / NAME
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows_in(path):
    return [line for line in journal(path) if "row" in line]


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


def test_a_server_killed_with_all_its_flower_goes_on_as_if_nothing_had_happened_and_leaves_no_process(home, tmp_path):
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(table(home, 2)))
    command = [sys.executable, "-m", "fedlora.cli", "deploy", "local", "--clients", "2"]
    first = subprocess.Popen([*command, str(file), "--out", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert until(lambda: rows_in(path))
    assert alive_in(path)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert until(lambda: not alive_in(path), 90)
    second = subprocess.run([*command, "--resume", str(path)], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "round 3/3" in second.stdout and "run directory" in second.stdout
    assert until(lambda: not alive_in(path), 60)
    run(build(table(home, 2)), tmp_path / "simulated")
    assert_same_runs(tmp_path / "simulated", path)


def test_nodes_and_workers_may_die_and_return_and_their_base_is_that_of_all(home, tmp_path):
    what = table(home, 3, rounds=8, deploy={"deadline": 60.0, "wait": 200.0, "poll": 0.2}, evaluate={"every": 8})
    path, address = tmp_path / "run", Address("127.0.0.1", free_port())
    deploy.prepare(build(what), path)
    with ExitStack() as stack:
        server = SuperLink.start(tmp_path / "server", address, None)
        stack.callback(server.stop)
        nodes = {}
        for client in ("000", "001", "002"):
            Settings(clients=[client]).write(tmp_path / client)
            nodes[client] = deploy.start_node(tmp_path / client, address, None)
            stack.callback(nodes[client].stop)
        said = []
        follow = Thread(target=lambda: said.append(server.run(path, Silent(), said.append)))
        follow.start()
        assert until(lambda: rows_in(path))
        worker = int((tmp_path / "000" / "worker.pid").read_text())
        os.kill(worker, signal.SIGKILL)
        os.killpg(nodes["001"].pid, signal.SIGKILL)
        missing = until(lambda: [line["row"] for line in rows_in(path) if "001" in line["row"]["refused"]])
        assert missing and missing[0]["accepted"] == ["000", "002"]
        nodes["001"] = deploy.start_node(tmp_path / "001", address, None)
        stack.callback(nodes["001"].stop)
        follow.join()
    rows = rows_of(path)
    assert len(rows) == 8 and all({"000", "002"} <= set(row["accepted"]) for row in rows)
    assert "001" in rows[-1]["accepted"], rows[-1]["refused"]
    assert int((tmp_path / "000" / "worker.pid").read_text()) != worker
    folds = {client: sorted(f.stem for f in (tmp_path / client).glob("runs/*/folds/*")) for client in nodes}
    assert folds["000"] == folds["001"] == folds["002"] == [str(i) for i in range(8)]


def test_a_superlink_killed_stops_the_run_which_another_superlink_takes_up_with_the_same_nodes(home, tmp_path):
    path, address = tmp_path / "run", Address("127.0.0.1", free_port())
    deploy.prepare(build(table(home, 2)), path)
    with ExitStack() as stack:
        joined = [sys.executable, "-m", "fedlora.cli", "join", "--server", str(address)]
        for client in ("000", "001"):
            process = subprocess.Popen([*joined, "--client", client, "--folder", str(tmp_path / client)])
            stack.callback(process.wait)
            stack.callback(process.terminate)
        server = SuperLink.start(tmp_path / "server", address, None)
        stack.callback(server.stop)
        killer = Thread(target=lambda: until(lambda: rows_in(path)) and os.kill(server.process.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(RunStopped, match="the SuperLink ended"):
            server.run(path, Silent(), print)
        killer.join()
        server.stop()
        again = SuperLink.start(tmp_path / "server", address, None)
        stack.callback(again.stop)
        again.run(path, Silent(), print)
    run(build(table(home, 2)), tmp_path / "simulated")
    assert_same_runs(tmp_path / "simulated", path)
    assert until(lambda: not alive_in(tmp_path), 60)
