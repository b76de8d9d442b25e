"""A server's run over a transport within this process."""

from test_node import Hand, experiment, make_nodes

from fedlora.deploy.launch import prepare
from fedlora.deploy.server import serve
from fedlora.runs.folder import RunFolder

from wired import furnish


def test_a_resumed_server_reads_the_files_of_the_run_once(tmp_path, monkeypatch):
    what, path, reads, restore = experiment(furnish(tmp_path), rounds=1), tmp_path / "run", [], RunFolder.restore
    prepare(what, path)
    nodes = make_nodes(what, tmp_path)
    serve(path, Hand(nodes))
    monkeypatch.setattr(RunFolder, "restore", lambda folder: (reads.append(folder.path), restore(folder))[1])
    serve(path, Hand(nodes))
    assert reads == [path]
