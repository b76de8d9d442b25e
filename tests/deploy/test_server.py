"""A server's run over a transport within this process."""

import json

from test_node import Hand, experiment, make_nodes

from fedlora.deploy.event_log import NAME
from fedlora.deploy.launch import prepare
from fedlora.deploy.server import serve
from fedlora.runs.folder import DEPLOY, RunFolder

from wired import furnish


def test_a_resumed_server_reads_the_files_of_the_run_once(tmp_path, monkeypatch):
    what, path, reads, restore = experiment(furnish(tmp_path), rounds=1), tmp_path / "run", [], RunFolder.restore
    prepare(what, path)
    nodes = make_nodes(what, tmp_path)
    serve(path, Hand(nodes))
    monkeypatch.setattr(RunFolder, "restore", lambda folder: (reads.append(folder.path), restore(folder))[1])
    serve(path, Hand(nodes))
    assert reads == [path]


def test_a_run_that_trains_the_whole_model_is_done_and_says_why_it_has_no_adapter(tmp_path):
    what, path = experiment(furnish(tmp_path), "full-ft", "method.scope=all", rounds=1), tmp_path / "run"
    prepare(what, path)
    serve(path, Hand(make_nodes(what, tmp_path)))
    events = [json.loads(line) for line in (path / DEPLOY / NAME).read_text().splitlines()]
    assert events[-1]["ended"] == "done" and not (path / "adapter").exists()
    (said,) = [e["notified"] for e in events if "PEFT" in e.get("notified", "")]
    assert said.startswith("PEFT adapters: 1 of 1 not written: all parameters of the model were trained")
