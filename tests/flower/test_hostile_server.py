"""A server that asks a node with a policy for no noise and a huge clip, in a run and again in another one."""

import pytest

from fedlora.config.experiment import build
from fedlora.config.policy import Policy
from fedlora.deploy import launch as deploy
from fedlora.deploy.address import Address
from fedlora.deploy.join import start_node
from fedlora.deploy.privacy_ledger import PrivacyLedger
from fedlora.deploy.processes import free_port
from fedlora.deploy.reasons import Reason
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.errors import RunStopped
from fedlora.privacy.account import epsilon
from fedlora.privacy.events import Gaussian
from fedlora.rounds.progress import NullProgress
from hostile import furnish

from tiny import LABELS
from wired import problem

pytestmark = [pytest.mark.flower, pytest.mark.full, pytest.mark.timeout(600)]
EPSILON, DELTA, CLIP = 2.0, 1e-5, 0.5


@pytest.fixture
def federation(tmp_path):
    """A SuperLink, and a node with a clinic's file, whose policy has this epsilon for all runs together."""
    home, address = furnish(tmp_path), Address("127.0.0.1", free_port())
    limits = {"unit": "record", "epsilon": EPSILON, "delta": DELTA, "clip": CLIP, "ledger": str(home / "ledger")}
    own = {"data": str(home / "clinic.jsonl"), "overrides": [f"model={home / 'bert'}"], "policy": Policy(privacy=limits)}
    Settings(clients=["clinic"], **own).write(home / "node")
    link, node = SuperLink.start(home / "server", address, None), start_node(home / "node", address, None)
    yield home, link, node
    node.stop()
    link.stop()


def hostile_run(home, link, name, wait=200.0):
    """Runs an experiment that asks for no noise; what the server was told."""
    privacy = {"unit": "record", "noise_multiplier": 0.0, "delta": 0.5, "clip": 1e9}
    sections = {"privacy": privacy, "clients": {"count": 1}, "evaluate": {"clients": "none"}}
    data, waiting = {"source": "none", "labels": list(LABELS)}, {"deadline": 120.0, "wait": wait, "poll": 0.2}
    deploy.prepare(build(problem(home, rounds=2, data=data, deploy=waiting, **sections)), home / "server" / name)
    told = []
    link.run(home / "server" / name, NullProgress(), told.append)
    return told


def releases(home):
    (file,) = (home / "ledger").glob("*.json")
    return PrivacyLedger(file.parent, file.stem, lambda *_: 0.0).releases()


def test_a_node_adds_its_own_noise_and_refuses_another_run_when_its_budget_is_spent(federation):
    home, link, node = federation
    hostile_run(home, link, "first")
    spent = releases(home)
    assert f"clip {CLIP:g}, noise multiplier" in node.log.read_text()
    assert sum(one.count for one in spent) and all(one.noise_multiplier > 0.1 for one in spent)
    assert 0 < epsilon([Gaussian(one.noise_multiplier, one.rate, one.count) for one in spent], DELTA) <= EPSILON
    with pytest.raises(RunStopped) as stopped:
        hostile_run(home, link, "again", wait=30.0)
    assert Reason.BUDGET.value in str(stopped.value)
    assert releases(home) == spent, "nothing was trained"
    for file in (home / "server").rglob("*"):
        assert not file.is_file() or not any(secret in file.read_bytes() for secret in (b"Patient", b"HIV")), file
