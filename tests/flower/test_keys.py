"""Who gets in: a SuperLink with TLS and node keys, and SuperNodes with the right key, another one, or none."""

import time
from contextlib import ExitStack

import pytest

from fedlora.config import build
from fedlora.rounds.flower import deploy
from fedlora.rounds.flower.address import Address
from fedlora.rounds.flower.join import start_node
from fedlora.rounds.flower.keys import Keys
from fedlora.rounds.flower.link import SuperLink
from fedlora.rounds.flower.processes import Process, free_port
from fedlora.rounds.flower.settings import Settings
from fedlora.rounds.watch import Silent

from tiny import tiny_bert, tiny_rows
from wired import problem, rows_of

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def refused(process, seconds=120.0):
    """What the SuperNode said when it was not let in; None if it is still there."""
    until = time.monotonic() + seconds
    while process.ended() is None and time.monotonic() < until:
        time.sleep(0.2)
    return process.said("Exit Code: 305")


def test_only_nodes_whose_keys_the_server_has_get_in(tmp_path):
    tiny_bert(tmp_path / "bert")
    tiny_rows(tmp_path / "rows.jsonl", 40)
    more = {"rounds": 1, "deploy": {"deadline": 200.0, "wait": 200.0}, "clients": {"count": 1, "partition": "iid"}}
    path, address = tmp_path / "run", Address("127.0.0.1", free_port())
    deploy.prepare(build(problem(tmp_path, **more)), path)
    keys, others = Keys(tmp_path / "keys"), Keys(tmp_path / "others")
    for made in (keys, others):
        made.make_server(["127.0.0.1"])
    key, strange = keys.make_node("good"), others.make_node("stranger")
    with ExitStack() as stack:

        def node(name, key, ca):
            Settings(clients=["000"]).write(tmp_path / name)
            process = start_node(tmp_path / name, address, {"key": key, "ca": ca})
            stack.callback(process.stop)
            return process

        server = SuperLink.start(tmp_path / "server", address, keys)
        stack.callback(server.stop)
        stranger = node("stranger", strange, keys.ca)
        command = ["flower-supernode", "--superlink", str(address), "--port", str(free_port())]
        keyless = Process([*command, "--root-certificates", str(keys.ca)], tmp_path / "home", tmp_path / "keyless.log")
        stack.callback(keyless.stop)
        assert refused(stranger) and refused(keyless)
        elsewhere = node("elsewhere", key, others.ca)  # to this node, ours is an impostor
        node("good", key, keys.ca)
        server.run(path, Silent(), print)
        assert rows_of(path)[0]["accepted"] == ["000"]
        assert "Activated" not in elsewhere.log.read_text() and "SuperNode ID" not in elsewhere.log.read_text()
        server.stop()
        (tmp_path / "keys" / "nodes" / "good.pub").unlink()
        again = SuperLink.start(tmp_path / "server", address, keys)
        stack.callback(again.stop)
        assert refused(node("revoked", key, keys.ca))
