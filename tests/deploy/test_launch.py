import datetime
import os
import ssl
import stat
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.config.experiment import build
from fedlora.deploy import keys as keys_module
from fedlora.deploy import launch as deploy
from fedlora.deploy import superlink_client as link
from fedlora.deploy import supernode
from fedlora.deploy.address import Address
from fedlora.deploy.event_log import EventLog, Reader
from fedlora.deploy.join import credentials
from fedlora.deploy.keys import Keys
from fedlora.deploy.processes import environment, free_port
from fedlora.deploy.superlink_client import SuperLink
from fedlora.errors import UserError
from fedlora.rounds.progress import NullProgress

from wired import problem


@pytest.mark.parametrize(
    ("text", "loopback"),
    [("127.0.0.1:9092", True), ("localhost:1", True), ("[::1]:9092", True), ("0.0.0.0:9092", False), ("a.org:443", False)],
)
def test_an_address_is_read_and_written(text, loopback):
    address = Address.parse(text)
    assert str(address) == text and address.loopback == loopback


@pytest.mark.parametrize("text", ["", "9092", "host", "host:", "host:0", "host:70000", ":9092", "host:x"])
def test_an_invalid_address_is_rejected(text):
    with pytest.raises(UserError, match="HOST:PORT"):
        Address.parse(text)


def test_tasks_of_one_data_set_are_refused(tmp_path):
    table = problem(tmp_path)
    with pytest.raises(UserError, match=r"data\.task .* one node for each task"):
        deploy.prepare(build({**table, "data": {**table["data"], "task": "user"}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_keys_nothing_listens_or_joins_beyond_this_machine(tmp_path):
    with pytest.raises(UserError, match="requires --keys"):
        deploy.needed(Address("0.0.0.0", 1), None)
    with pytest.raises(UserError, match="requires --key"):
        credentials(Address("example.org", 1), None, None)
    assert deploy.needed(Address("127.0.0.1", 1), None) is None
    assert credentials(Address("127.0.0.1", 1), None, None) is None


def test_half_of_the_credentials_is_refused_also_on_the_loopback(tmp_path):
    with pytest.raises(UserError, match="requires --key"):
        credentials(Address("127.0.0.1", 1), tmp_path / "key", None)


def test_keys_can_be_read_by_their_owner_alone_and_are_made_once(tmp_path):
    keys = Keys(tmp_path / "keys")
    with pytest.raises(UserError, match=r"has no ca\.crt"):
        keys.superlink()
    keys.make_server(["example.org", "192.0.2.1"])
    private = keys.make_node("clinic-a")
    for secret in (private, keys.folder / "ca.key", keys.folder / "server.key"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert [public.name for public in keys.nodes()] == ["clinic-a.pub"]
    with pytest.raises(UserError, match="already"):
        keys.make_node("clinic-a")
    with pytest.raises(UserError, match="not a valid node name"):
        keys.make_node("../x")


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_nothing_in_the_folder_of_keys_can_be_read_by_others(tmp_path, umask):
    before = os.umask(umask)
    try:
        Keys(tmp_path / "keys").make_node("clinic")
        deploy.prepare(build(problem(tmp_path)), tmp_path / "run")
    finally:
        os.umask(before)
    for folder in ("keys", "keys/nodes", "run"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_a_key_speaks_for_the_clients_that_it_was_made_for_and_by_default_for_its_own_name(tmp_path):
    keys = Keys(tmp_path / "keys")
    keys.make_node("north", ["a", "b é"])
    keys.make_node("south")
    found = {credential.name: credential.clients for credential in keys.credentials().values()}
    assert found == {"north": {"a", "b é"}, "south": {"south"}}
    for clients in (["b é"], ["south"], ["x", ""], ["x\ny"]):
        with pytest.raises(UserError, match=r"belongs to node|not a valid client name"):
            keys.make_node("west", clients)
    assert not (tmp_path / "keys" / "nodes" / "west.key").exists()


def test_clients_are_declared_for_one_node_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: 0)  # of this process, which goes on
    make = [str(word) for word in ("keys", tmp_path / "keys", "--client", "x", "--client", "y", "--node", "a")]
    rejected = CliRunner().invoke(app, [*make, "--node", "b"])
    assert isinstance(rejected.exception, UserError) and "exactly one --node" in str(rejected.exception)
    assert CliRunner().invoke(app, make).exit_code == 0
    assert [one.clients for one in Keys(tmp_path / "keys").credentials().values()] == [{"x", "y"}]


def test_a_key_made_before_clients_were_declared_speaks_for_its_own_name(tmp_path):
    keys = Keys(tmp_path / "keys")
    keys.make_node("north", ["a"])
    (tmp_path / "keys" / "nodes" / "north.clients").unlink()
    assert [credential.clients for credential in keys.credentials().values()] == [{"north"}]


def test_a_server_with_an_expired_certificate_or_one_for_another_address_does_not_start(tmp_path, monkeypatch):
    keys = Keys(tmp_path / "keys")
    keys.make_server(["127.0.0.1"])
    with pytest.raises(UserError, match=r"is not valid for 192\.0\.2\.1"):
        keys.superlink("192.0.2.1")
    assert "--enable-supernode-auth" in keys.superlink("127.0.0.1")
    make_expired(keys, monkeypatch)
    with pytest.raises(UserError, match="is valid from"):
        keys.superlink("127.0.0.1")


def make_expired(keys, monkeypatch):
    """Makes the server's certificate as it was made three years ago; the authority is new."""

    class Then(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.datetime.now(zone) - datetime.timedelta(days=3 * 365)

    with monkeypatch.context() as patch:
        patch.setattr(keys_module, "datetime", SimpleNamespace(**{**vars(datetime), "datetime": Then}))
        keys.make_server(["127.0.0.1"])


def test_a_nodes_owner_is_told_that_the_servers_certificate_has_expired(tmp_path, monkeypatch):
    keys = Keys(tmp_path / "keys")
    keys.make_server(["127.0.0.1"])
    key = keys.make_node("clinic")
    make_expired(keys, monkeypatch)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "keys" / "server.crt", tmp_path / "keys" / "server.key")
    with Address("127.0.0.1", free_port()).listen() as listening:
        threading.Thread(target=shake_hands, args=(listening, context), daemon=True).start()
        address = Address(*listening.getsockname())
        told = until_told(tmp_path, address, {"key": key, "ca": keys.ca})
    assert told[1] == f"waiting for the server at {address}: its certificate is not valid: certificate has expired"


def shake_hands(listening, context):
    with suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection, suppress(ssl.SSLError):
                context.wrap_socket(connection, server_side=True).close()


def until_told(folder, address, keys, count=2):
    """The first lines that a node says to its owner."""
    told = []

    def say(line):
        told.append(line)
        if len(told) == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supernode.run(folder, address, keys, say)
    return told


def test_a_nodes_owner_is_told_that_the_server_is_not_there(tmp_path):
    address = Address("127.0.0.1", free_port())
    first, then = until_told(tmp_path, address, None)
    assert first == f"waiting for the server at {address}"
    assert then.startswith(f"{first}: ") and "refused" in then


def test_nothing_is_sent_to_another_process_that_listens_on_the_servers_port(tmp_path):
    with Address("127.0.0.1", free_port()).listen() as other:
        other.settimeout(0.5)
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
            SuperLink.start(tmp_path / "home", Address(*other.getsockname()), None)
        with pytest.raises(TimeoutError):
            other.accept()


@pytest.mark.parametrize(
    ("listens", "here"),
    [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:1", "[::1]:1"), ("[::1]:1", "[::1]:1"), ("192.0.2.1:1", "192.0.2.1:1")],
)
def test_the_servers_own_processes_reach_it_where_it_listens(listens, here):
    assert str(Address.parse(listens).here) == here


def test_a_renewed_certificate_is_signed_by_the_same_authority(tmp_path):
    keys = Keys(tmp_path / "keys")
    keys.make_server(["a.org"])
    authority = keys.ca.read_bytes()
    keys.make_server(["b.org"])
    certificate = x509.load_pem_x509_certificate((keys.folder / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert keys.ca.read_bytes() == authority
    assert names.get_values_for_type(x509.DNSName) == ["b.org", "localhost"]
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))


def test_a_server_must_know_for_how_many_clients_to_wait(tmp_path):
    what = build(problem(tmp_path, clients={"partition": "natural"}, data={"source": "x", "user": "u"}))
    with pytest.raises(UserError, match=r"clients\.count"):
        deploy.prepare(what, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_flower_stays_offline(tmp_path):
    set_ = environment(tmp_path)
    off = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION")
    assert [set_[name] for name in off] == ["0", "1", "1"]


def test_a_run_that_finishes_while_its_status_is_asked_for_is_finished(tmp_path, monkeypatch):
    (tmp_path / "deploy").mkdir()
    event_log, reader = EventLog(tmp_path), Reader(tmp_path, NullProgress(), print)

    def finished(*_):
        event_log.ended("done")
        return {"runs": [{"status": "finished:completed"}]}

    monkeypatch.setattr(link, "flwr", finished)
    monkeypatch.setattr(link, "_STATUS_SECONDS", 0.0)
    assert SuperLink(tmp_path, None)._follow("1", tmp_path, reader) == ("done", "")
