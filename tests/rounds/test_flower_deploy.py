import stat

import pytest
from cryptography import x509

from fedlora.config import build
from fedlora.errors import UserError
from fedlora.rounds.flower import deploy
from fedlora.rounds.flower.address import Address
from fedlora.rounds.flower.join import credentials
from fedlora.rounds.flower.keys import Keys
from fedlora.rounds.flower.processes import environment

from wired import problem


@pytest.mark.parametrize(
    ("text", "loopback"),
    [("127.0.0.1:9092", True), ("localhost:1", True), ("[::1]:9092", True), ("0.0.0.0:9092", False), ("a.org:443", False)],
)
def test_an_address_is_read_and_written(text, loopback):
    address = Address.parse(text)
    assert str(address) == text and address.loopback == loopback


@pytest.mark.parametrize("text", ["", "9092", "host", "host:", "host:0", "host:70000", ":9092", "host:x"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(UserError, match="HOST:PORT"):
        Address.parse(text)


def test_tasks_of_one_data_set_are_refused(tmp_path):
    table = problem(tmp_path)
    with pytest.raises(UserError, match=r"data\.task .* once for each task"):
        deploy.prepare(build({**table, "data": {**table["data"], "task": "user"}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_keys_nothing_listens_or_joins_beyond_this_machine(tmp_path):
    with pytest.raises(UserError, match="needs --keys"):
        deploy.needed(Address("0.0.0.0", 1), None)
    with pytest.raises(UserError, match="needs --key"):
        credentials(Address("example.org", 1), None, None)
    assert deploy.needed(Address("127.0.0.1", 1), None) is None
    assert credentials(Address("127.0.0.1", 1), None, None) is None


def test_half_of_the_credentials_is_refused_also_on_the_loopback(tmp_path):
    with pytest.raises(UserError, match="needs --key"):
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
    with pytest.raises(UserError, match="no name"):
        keys.make_node("../x")


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
