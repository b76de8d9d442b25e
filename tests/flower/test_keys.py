"""Who gets in: a SuperLink with TLS and node keys, and nodes with the right key, a wrong one, another node's, or none."""

import re
import sys
import time
from contextlib import ExitStack

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlora.config.experiment import build
from fedlora.deploy import launch as deploy
from fedlora.deploy.address import Address
from fedlora.deploy.join import start_node
from fedlora.deploy.keys import Keys
from fedlora.deploy.processes import Process, free_port
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.rounds.progress import NullProgress

from tiny import tiny_bert, tiny_rows
from wired import problem, rows_of

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]

SKEWED = """
import sys
from datetime import UTC, datetime, timedelta
from flwr.supernode import node_auth_http_interceptor as signed
from fedlora.deploy import supernode
from fedlora.deploy.address import Address
from pathlib import Path

class Ahead(datetime):
    @classmethod
    def now(cls, zone=None):
        return datetime.now(UTC) + timedelta(hours=1)

signed.now = Ahead.now
supernode.datetime = Ahead
folder, server, key, ca = sys.argv[1:]
supernode.run(Path(folder), Address.parse(server), {"key": Path(key), "ca": Path(ca)}, lambda x: print(x, flush=True))
"""


def said(process, what, seconds=120.0):
    """Whether the node has said so to its owner."""
    until = time.monotonic() + seconds
    while what not in process.log.read_text() and time.monotonic() < until:
        time.sleep(0.2)
    return what in process.log.read_text()


def test_only_nodes_whose_keys_the_server_has_get_in_and_the_others_owners_are_told_why(tmp_path):
    tiny_bert(tmp_path / "bert")
    tiny_rows(tmp_path / "rows.jsonl", 40)
    more = {"rounds": 1, "deploy": {"deadline": 200.0, "wait": 200.0}, "clients": {"count": 1, "partition": "iid"}}
    experiment = build(problem(tmp_path, **more))
    path, address = tmp_path / "run", Address("127.0.0.1", free_port())
    deploy.prepare(experiment, path)
    keys, others = Keys(tmp_path / "keys"), Keys(tmp_path / "others")
    for made in (keys, others):
        made.make_server(["127.0.0.1"])
    key, strange, other = keys.make_node("good", ["000"]), others.make_node("stranger"), keys.make_node("other")
    with ExitStack() as stack:

        def node(name, key, ca):
            Settings.trusting(experiment, ["000"]).write(tmp_path / name)
            process = start_node(tmp_path / name, address, {"key": key, "ca": ca})
            stack.callback(process.stop)
            return process

        early = node("good", key, keys.ca)
        server = SuperLink.start(tmp_path / "server", address, keys)
        stack.callback(server.stop)
        stranger, elsewhere, borrower = (
            node("stranger", strange, keys.ca),
            node("elsewhere", key, others.ca),  # to this node, ours is an impostor
            node("borrower", other, keys.ca),
        )
        skewed = ["python", "-c", SKEWED, str(tmp_path / "skewed"), str(address), str(key), str(keys.ca)]
        late = Process(skewed, tmp_path / "skewed", tmp_path / "skewed.log")
        stack.callback(late.stop)
        assert rejected_without_key(address, keys.ca)
        assert said(early, "waiting for the server") and said(early, "connected to")
        assert said(borrower, "connected to")
        assert said(stranger, "rejected because this node's key is not registered there")
        assert said(elsewhere, "its certificate is not valid: unable to get local issuer certificate")
        assert said(late, "this machine's clock is 360")  # the server tells whole seconds, and is asked a little later
        assert re.search(r"clock is 360[0-9] s ahead of the server's", late.log.read_text())
        server.run(path, NullProgress(), print)
        assert rows_of(path)[-1].accepted == ["000"]
        assert said(borrower, "rejected: its key 'other' is not for client '000'")
        assert said(early, "round 1 of 1: training") and said(early, "finished")
        assert "connected to" not in elsewhere.log.read_text() + stranger.log.read_text() + late.log.read_text()
        server.stop()
        early.stop()
        (tmp_path / "keys" / "nodes" / "good.pub").unlink()
        again = SuperLink.start(tmp_path / "server", address, keys)
        stack.callback(again.stop)
        assert said(node("revoked", key, keys.ca), "rejected because this node's key is not registered there")


def rejected_without_key(address, ca):
    """Whether a node with a key that it has made itself is neither registered nor let in."""
    private, public = generate_key_pairs()
    made = public_key_to_bytes(public)
    signed = [NodeAuthHttpInterceptor(private, public)]
    with FleetHttpClient.from_server_address(str(address), False, ca.read_bytes(), signed) as client:
        for call, request in (
            (client.RegisterNode, RegisterNodeFleetRequest(public_key=made)),
            (client.ActivateNode, ActivateNodeRequest(public_key=made, heartbeat_interval=30.0)),
        ):
            with pytest.raises(httpx.HTTPStatusError) as error:
                call(request)
            assert error.value.response.status_code in (400, 412, 426), sys.version
    return True
