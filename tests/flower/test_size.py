"""Large uploads over a real SuperLink, and what Flower carries against what the log says."""

import re
from contextlib import ExitStack

import pytest

from fedlora.config import build
from fedlora.rounds.flower import deploy
from fedlora.rounds.flower.address import Address
from fedlora.rounds.flower.join import start_node
from fedlora.rounds.flower.link import SuperLink
from fedlora.rounds.flower.processes import free_port
from fedlora.rounds.flower.settings import Settings
from fedlora.rounds.watch import Silent

from tiny import tiny_bert, tiny_rows
from wired import CLIENTS, problem, rows_of

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]
MB = 1_000_000
SAID = re.compile(r"^(\d+) bytes answered with (\d+) in", re.MULTILINE)


def test_four_clients_upload_64_mb_each_and_the_log_says_what_was_carried(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_bert(tmp_path / "bert", hidden=2048)
    tiny_rows(tmp_path / "rows.jsonl", 40)
    more = {"rounds": 1, "evaluate": {"clients": "none"}, "deploy": {"deadline": 200.0, "wait": 200.0}}
    what = build(problem(tmp_path, "ffa-lora", **more), ["method.rank=2048", "clients.held_out=0", "train.batch_size=16"])
    path, address = tmp_path / "run", Address("127.0.0.1", free_port())
    deploy.prepare(what, path)
    with ExitStack() as stack:
        link = SuperLink.start(tmp_path / "link", address, None)
        stack.callback(link.stop)
        for client in CLIENTS:
            Settings(clients=[client]).write(tmp_path / client)
            stack.callback(start_node(tmp_path / client, address, None).stop)
        link.run(path, Silent(), print)
    row = rows_of(path)[0]
    assert row["accepted"] == list(CLIENTS) and row["bytes_up"] >= 4 * 64 * MB
    for which, key in ((0, "bytes_down"), (1, "bytes_up")):
        carried = sum(int(SAID.findall((tmp_path / client / "worker.log").read_text())[1][which]) for client in CLIENTS)
        assert 0 < carried - row[key] < 4 * 2000  # the headers
