"""What happens when processes are killed, with a real SuperLink and real SuperNodes on this machine."""

import json
import os
import shlex
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
from fedlora.experiment import run
from fedlora.rounds.checkpoint import DEPLOY
from fedlora.rounds.flower import deploy
from fedlora.rounds.flower.address import Address
from fedlora.rounds.flower.join import start_node
from fedlora.rounds.flower.journal import NAME
from fedlora.rounds.flower.link import SuperLink
from fedlora.rounds.flower.processes import CONNECTION, Process, connection, flwr, free_port, wait_for_port
from fedlora.rounds.flower.settings import Settings
from fedlora.rounds.watch import Silent

from wired import assert_same_runs, furnish, problem

APP = Path(deploy.__file__).parent / "app"
pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


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
    file = path / DEPLOY / NAME
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows_in(path):
    return [line["row"] for line in journal(path) if "row" in line]


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


def interrupted(process, path):
    """What it printed after a Ctrl-C once the ServerApp has begun: the command that goes on."""
    assert until(lambda: journal(path))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; go on with: fedlora " in said
    return shlex.split(said.partition("go on with: fedlora ")[2])


def test_a_local_run_that_is_interrupted_and_killed_goes_on_as_if_nothing_had_happened_and_leaves_no_process(
    home, tmp_path
):
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(table(home, 2)))
    resume = interrupted(fedlora("deploy", "local", "--clients", "2", file, "--out", path), path)
    assert resume == ["deploy", "local", "--resume", str(path)]
    assert until(lambda: not alive_in(path), 30)
    second = fedlora(*resume)
    assert until(lambda: rows_in(path))
    assert alive_in(path)
    second.kill()
    second.communicate()
    assert until(lambda: not alive_in(path), 90)
    third = fedlora(*resume)
    out, err = third.communicate()
    assert third.returncode == 0, err
    assert "round 3/3" in out and "run directory" in out
    assert until(lambda: not alive_in(path), 30)
    run(build(table(home, 2)), tmp_path / "simulated")
    assert_same_runs(tmp_path / "simulated", path)


def test_nodes_and_workers_may_die_and_return_and_their_base_is_that_of_all(home, tmp_path):
    what = table(home, 3, rounds=99, deploy={"deadline": 40.0, "wait": 200.0, "poll": 0.2}, evaluate={"every": 99})
    path, address = tmp_path / "run", Address("127.0.0.1", free_port())
    deploy.prepare(build(what), path)
    with ExitStack() as stack:
        link = SuperLink.start(tmp_path / "link", address, None)
        stack.callback(link.stop)
        nodes = {}
        for client in ("000", "001", "002"):
            Settings(clients=[client]).write(tmp_path / client)
            nodes[client] = start_node(tmp_path / client, address, None)
            stack.callback(nodes[client].stop)

        def follow_it():
            with pytest.raises(RunStopped, match="the SuperLink ended"):
                link.run(path, Silent(), print)

        follow = Thread(target=follow_it)
        follow.start()
        assert until(lambda: rows_in(path))
        worker = int((tmp_path / "000" / "worker.pid").read_text())
        os.kill(worker, signal.SIGKILL)
        os.killpg(nodes["001"].pid, signal.SIGKILL)
        missing = until(lambda: [row for row in rows_in(path) if "001" in row["refused"]])
        assert missing and missing[0]["accepted"] == ["000", "002"]
        nodes["001"] = start_node(tmp_path / "001", address, None)
        stack.callback(nodes["001"].stop)
        back = until(lambda: [r["round"] for r in rows_in(path) if r["round"] > missing[0]["round"] and not r["refused"]])
        link.stop()
        follow.join()
    assert back and all({"000", "002"} <= set(row["accepted"]) for row in rows_in(path))
    assert int((tmp_path / "000" / "worker.pid").read_text()) != worker
    for client in nodes:  # what came with the work of that round
        assert set(range(back[0] - 1)) <= {int(f.stem) for f in (tmp_path / client).glob("runs/*/folds/*")}


def test_a_served_run_goes_on_after_an_interruption_and_its_superlinks_death_and_on_flowers_own_superlink(home, tmp_path):
    """And `flwr run` does the same there, without our command."""
    file, path, address = tmp_path / "experiment.toml", tmp_path / "run", Address("127.0.0.1", free_port())
    file.write_text(tomli_w.dumps(table(home, 2)))
    with ExitStack() as stack:
        joined = [fedlora("join", "--server", address, "--client", c, "--folder", tmp_path / c) for c in ("000", "001")]
        for process in joined:
            stack.callback(process.communicate)
            stack.callback(process.terminate)
        resume = interrupted(fedlora("serve", "--listen", address, file, "--out", path), path)
        assert resume == ["serve", "--listen", str(address), "--resume", str(path)]
        second = fedlora(*resume)
        assert until(lambda: rows_in(path))
        for pid in [pid for pid in alive_in(path) if "rounds.flower.superlink" in command_of(pid)]:
            os.kill(pid, signal.SIGKILL)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1 and "the SuperLink ended" in err and shlex.join(resume) in err
        command = ["flower-superlink", "--insecure", "--host", address.host, "--port", str(address.port)]
        flowers = Process(command, tmp_path / "link", tmp_path / "superlink.log")
        stack.callback(flowers.stop)
        wait_for_port(address.port, flowers)
        third = fedlora("serve", "--superlink", address, "--resume", path)
        _, err = third.communicate(timeout=200)
        assert third.returncode == 0, err
        by_hand = tmp_path / "by hand"
        by_hand.mkdir()
        (by_hand / "experiment.toml").write_text(file.read_text())
        (tmp_path / "settings.toml").write_text(tomli_w.dumps({"folder": str(by_hand)}))
        connection(tmp_path / "operator", str(address), None)
        flwr(tmp_path / "operator", "run", str(APP), CONNECTION, "--run-config", str(tmp_path / "settings.toml"))
        assert until(lambda: journal(by_hand) and journal(by_hand)[-1].get("ended") == "done")
        for process in joined:
            process.send_signal(signal.SIGINT)
        assert [process.wait(60) for process in joined] == [130, 130]
    run(build(table(home, 2)), tmp_path / "simulated")
    assert_same_runs(tmp_path / "simulated", path)
    assert_same_runs(tmp_path / "simulated", by_hand)
    assert until(lambda: not alive_in(tmp_path), 60)


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
