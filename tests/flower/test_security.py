"""Other users of the server's machine, apps from elsewhere, and servers and nodes that start at the same time."""

import os
import pwd
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fedlora.deploy.address import Address
from fedlora.deploy.guard import HEADER
from fedlora.deploy.join import start_node
from fedlora.deploy.keys import Keys
from fedlora.deploy.processes import CONNECTION, flwr, free_port, write_connection
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.errors import RunStopped

from lives import alive_in, until

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]
APP = Path(start_node.__code__.co_filename).parent / "app"
STARTS = int(os.environ.get("FEDLORA_STARTS", "3"))
"""How often a server and a node start at the same time."""

FOREIGN = {
    "pyproject.toml": """
[project]
name = "foreign"
version = "1.0.0"
description = "An app of somebody else"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "foreign:server"
clientapp = "foreign:client"
[tool.flwr.app.config]
mark = ""
""",
    "foreign.py": """
import os, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server = ServerApp()
client = ClientApp()

@server.main()
def main(grid, context):
    mark = Path(context.run_config["mark"])
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    sent = Message(RecordDict({"x": ConfigRecord({"mark": str(mark)})}), dst_node_id=nodes[0], message_type="query")
    (answer,) = grid.send_and_receive([sent], timeout=60)
    (mark / "answered").write_text(answer.error.reason if answer.has_error() else "ran")

@client.query()
def query(message, context):
    Path(message.content["x"]["mark"], "ran on the node").touch()
    return Message(RecordDict(), reply_to=message)
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A SuperLink without keys and one node."""
    home, address = tmp_path_factory.mktemp("place"), Address("127.0.0.1", free_port())
    Settings(clients=["000"], accept=True).write(home / "node")
    node = start_node(home / "node", address, None)  # before the server
    link = SuperLink.start(home / "server", address, None)
    yield home, address, link, node
    node.stop()
    link.stop()


def test_an_app_from_elsewhere_is_not_run_by_a_node(place, tmp_path):
    _, _, link, node = place
    for name, text in FOREIGN.items():
        (tmp_path / "app").mkdir(exist_ok=True)
        (tmp_path / "app" / name).write_text(text)
    (tmp_path / "settings.toml").write_text(f'mark = "{tmp_path}"\n')
    flwr(link.home, "run", str(tmp_path / "app"), CONNECTION, "--run-config", str(tmp_path / "settings.toml"))
    assert until(lambda: (tmp_path / "answered").exists(), 120)
    assert (tmp_path / "answered").read_text() == "this node runs fedlora only"
    assert not (tmp_path / "ran on the node").exists()
    assert "is of an app other than fedlora" in node.log.read_text()


def test_without_the_secret_nobody_on_the_servers_machine_starts_a_run_or_takes_a_task(place, tmp_path):
    _, address, _, _ = place
    write_connection(tmp_path / "other", address, None)
    with pytest.raises(RunStopped):
        flwr(tmp_path / "other", "run", str(APP), CONNECTION)
    for path in ("control/start-run", "control/register-node", "runtime/acquire-task", "runtime/pull-messages"):
        for headers in ({}, {HEADER: "guess"}):
            assert httpx.post(f"http://{address}/v1/{path}", headers=headers).status_code == 403


def test_no_secret_and_no_token_is_on_a_command_line(place):
    home, _, link, _ = place
    secret = (link.home / "secret").read_text()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive_in(home)]
    assert len(lines) >= 3  # the SuperLink, its SuperExec, the node
    assert not any(secret.encode() in line or b"--token" in line for line in lines)


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can be another user")
def test_another_user_of_the_servers_machine_reads_nothing_and_starts_nothing(place):
    home, address, link, _ = place
    user = pwd.getpwnam("nobody")
    attempt = f"""
import os, urllib.request, urllib.error
for path in {[str(home / "server" / "superlink.log"), str(link.home / "secret"), str(home / "node" / "node.json")]}:
    try:
        open(path).read(); print("read", path)
    except PermissionError:
        pass
for pid in {sorted(alive_in(home))}:
    try:
        open(f"/proc/{{pid}}/environ", "rb").read(); print("environment", pid)
    except PermissionError:
        pass
try:
    urllib.request.urlopen("http://{address}/v1/control/start-run", b""); print("started")
except urllib.error.HTTPError as error:
    print(error.code)
"""
    command = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "/usr/bin/env", "python3"]
    python = next((p for p in ("/usr/bin/python3", sys.executable) if Path(p).exists()), sys.executable)
    os.chmod(home, 0o755)
    done = subprocess.run([*command[:-2], python, "-c", attempt], capture_output=True, text=True, cwd="/")
    if "ermission denied" in done.stderr and not done.stdout:
        pytest.skip("another user cannot run Python here")
    assert done.stdout.split() == ["403"], done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_server_and_a_node_that_start_at_the_same_time_find_each_other(tmp_path, host):
    try:
        Address(host, free_port()).listen().close()
    except Exception:
        pytest.skip(f"this machine has no {host}")
    keys = Keys(tmp_path / "keys")
    keys.make_server([host])
    key = keys.make_node("clinic")
    for i in range(STARTS if host == "127.0.0.1" else 1):
        address, home = Address(host, free_port()), tmp_path / f"{i}"
        Settings(clients=["clinic"], accept=True).write(home / "node")
        with ThreadPoolExecutor(1) as pool:
            server = pool.submit(SuperLink.start, home / "server", address, keys)
            time.sleep((i % 4) * 0.7)  # before, while and after the server opens its port and answers
            node = start_node(home / "node", address, {"key": key, "ca": keys.ca})
            try:
                found = until(lambda log=node.log: "connected to" in log.read_text(), 120)
            finally:
                node.stop()
                server.result().stop()
        assert found and "rejected" not in node.log.read_text()
