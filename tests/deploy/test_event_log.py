"""How whoever started a run over Flower learns how it ended."""

import shutil

import pytest

from fedlora.deploy import superlink_client as link
from fedlora.deploy.event_log import EventLog, Reader
from fedlora.errors import RunStopped
from fedlora.rounds.progress import NullProgress


@pytest.fixture
def run(tmp_path):
    """A run's folder, its journal and a reader."""
    path = tmp_path / "run"
    path.mkdir()
    event_log = EventLog(path)
    return path, event_log, Reader(path, NullProgress(), print)


def test_the_end_is_told_as_often_as_it_is_asked_for(run):
    _, event_log, reader = run
    assert reader.show() is None
    event_log.ended("stopped", "too few clients")
    assert [reader.show() for _ in range(3)] == [("stopped", "too few clients")] * 3


def test_a_run_that_ends_while_flower_is_asked_about_it_has_ended_as_its_journal_says(run, tmp_path, monkeypatch):
    path, event_log, reader = run
    asked = []

    def flwr(*_):
        asked.append(1)
        if len(asked) == 1:
            event_log.ended("done")
        return {"runs": [{"status": "finished:completed"}]}

    monkeypatch.setattr(link, "flwr", flwr)
    monkeypatch.setattr(link, "_STATUS_SECONDS", -1.0)
    monkeypatch.setattr(link, "_POLL", 0.0)
    assert link.SuperLink(tmp_path, None)._follow("1", path, reader) == ("done", "")
    assert asked == [1]


def test_a_run_whose_folder_disappears_is_stopped(run, tmp_path):
    path, _, reader = run
    shutil.rmtree(path)
    with pytest.raises(RunStopped, match="the run directory was moved or removed"):
        link.SuperLink(tmp_path, None)._follow("1", path, reader)
