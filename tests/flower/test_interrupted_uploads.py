"""A node whose uploads are slow, and then do not end."""

from contextlib import ExitStack
from datetime import datetime, timedelta
from threading import Thread

import pytest

from fedlora.config.experiment import build
from fedlora.deploy import launch as deploy
from fedlora.deploy.address import Address
from fedlora.deploy.join import start_node
from fedlora.deploy.processes import Process, free_port
from fedlora.deploy.settings import Settings
from fedlora.deploy.superlink_client import SuperLink
from fedlora.errors import RunStopped
from fedlora.rounds.progress import NullProgress

from lives import rows_in, table, until
from wired import furnish

pytestmark = [pytest.mark.flower, pytest.mark.timeout(300)]
SLOW = """
import pathlib, sys, time
from fedlora.deploy import supernode

upload, interrupted = supernode.push_objects, pathlib.Path(sys.argv[3])

def slow(*given, **more):
    time.sleep(1.0)
    if not interrupted.exists():
        upload(*given, **more)

supernode.push_objects = slow
supernode.run(pathlib.Path(sys.argv[1]), supernode.Address.parse(sys.argv[2]), None, print)
"""


def test_a_slow_upload_is_awaited_and_an_interrupted_one_delays_no_other(tmp_path):
    what = table(
        furnish(tmp_path), 3, rounds=500, deploy={"deadline": 10.0, "wait": 200.0, "poll": 0.2}, evaluate={"every": 999}
    )
    path, address, flag = tmp_path / "run", Address("127.0.0.1", free_port()), tmp_path / "interrupted"
    experiment = build(what)
    deploy.prepare(experiment, path)
    with ExitStack() as stack:
        link = SuperLink.start(tmp_path / "link", address, None)
        stack.callback(link.stop)
        for client in ("000", "001", "002"):
            Settings.trusting(experiment, [client]).write(tmp_path / client)
        for client in ("000", "002"):
            stack.callback(start_node(tmp_path / client, address, None).stop)
        command = ["python", "-c", SLOW, str(tmp_path / "001"), str(address), str(flag)]
        stack.callback(Process(command, tmp_path / "001" / "flower", tmp_path / "001" / "supernode.log").stop)

        def follow_it():
            with pytest.raises(RunStopped, match="the SuperLink ended"):
                link.run(path, NullProgress(), print)

        follow = Thread(target=follow_it)
        follow.start()
        assert until(lambda: len(rows_in(path)) > 1) and not any(row["rejected"] for row in rows_in(path))
        flag.touch()
        missing = until(lambda: [row for row in rows_in(path) if row["rejected"]])
        flag.unlink()
        back = until(
            lambda: missing and [r for r in rows_in(path) if r["round"] > missing[0]["round"] and not r["rejected"]]
        )
        link.stop()
        follow.join()
    assert missing[0]["accepted"] == ["000", "002"], missing[0]["rejected"]
    assert list(missing[0]["rejected"]) == ["001"] and back
    started, ended = (datetime.fromisoformat(missing[0][name]) for name in ("started", "ended"))
    assert ended - started < timedelta(seconds=90)  # the SuperLink expects an upload to end for 180
