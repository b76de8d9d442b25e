"""A server that is killed, its SuperLink that is killed, and Flower's own SuperLink instead."""

import os
import shlex
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.deploy import launch as deploy
from fedlora.deploy.address import Address
from fedlora.deploy.processes import CONNECTION, Process, flwr, free_port, wait_until_ready, write_connection
from fedlora.deploy.settings import Settings

from lives import alive_in, command_of, event_log, fedlora, rows_in, table, until
from wired import assert_same_runs, furnish

APP = Path(deploy.__file__).parent / "app"
pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def test_a_served_run_goes_on_after_its_death_and_its_superlinks_and_on_flowers_own_superlink(tmp_path):
    """And `flwr run` does the same there at the same time, without our command."""
    home = furnish(tmp_path)
    file, path, address = tmp_path / "experiment.toml", tmp_path / "run", Address("127.0.0.1", free_port())
    file.write_text(tomli_w.dumps(table(home, 2)))
    with ExitStack() as stack:
        trusting = Settings.trusting(build(table(home, 2)), ()).overrides
        agreed = [word for override in trusting for word in ("--set", override)]
        joined = [
            fedlora("join", "--server", address, "--client", c, "--folder", tmp_path / c, "--accept", *agreed)
            for c in ("000", "001")
        ]
        for process in joined:
            stack.callback(process.communicate)
            stack.callback(process.terminate)
        first = fedlora("serve", "--listen", address, file, "--out", path)
        assert until(lambda: rows_in(path))
        assert alive_in(path)
        first.kill()
        first.communicate()
        assert until(lambda: not alive_in(path), 90)
        resume = ["serve", "--listen", str(address), "--resume", str(path)]
        second, before = fedlora(*resume), len(rows_in(path))
        assert until(lambda: len(rows_in(path)) > before)
        for pid in [pid for pid in alive_in(path) if "deploy.superlink_guard" in command_of(pid)]:
            os.kill(pid, signal.SIGKILL)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1 and "the SuperLink ended" in err and shlex.join(resume) in err
        command = ["flower-superlink", "--insecure", "--host", address.host, "--port", str(address.port)]
        flowers = Process(command, tmp_path / "link", tmp_path / "superlink.log")
        stack.callback(flowers.stop)
        wait_until_ready(address, None, flowers)
        third = fedlora("serve", "--superlink", address, "--resume", path)
        by_hand = tmp_path / "by hand"
        by_hand.mkdir()
        (by_hand / "experiment.toml").write_text(file.read_text())
        (tmp_path / "settings.toml").write_text(tomli_w.dumps({"folder": str(by_hand)}))
        write_connection(tmp_path / "operator", address, None)
        flwr(tmp_path / "operator", "run", str(APP), CONNECTION, "--run-config", str(tmp_path / "settings.toml"))
        _, err = third.communicate(timeout=400)
        assert third.returncode == 0, err
        assert until(lambda: event_log(by_hand) and event_log(by_hand)[-1].get("ended") == "done")
        for process in joined:
            process.send_signal(signal.SIGINT)
        assert [process.wait(60) for process in joined] == [130, 130]
    simulated = run(build(table(home, 2)), tmp_path / "simulated").folder
    assert_same_runs(simulated, path)
    assert_same_runs(simulated, by_hand)
    assert until(lambda: not alive_in(tmp_path), 60)
