"""The state of a run that another process continues while it is read."""

from dataclasses import replace

import pytest
import torch

from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.rounds.plan import RunState
from fedlora.runs import saved_state
from fedlora.runs.folder import RunFolder
from fedlora.runs.saved_state import SavedState

from rows import round_row


def finish_round(folder: RunFolder, number: int) -> None:
    """Completes a round, which is the best one."""
    folder.save_best(number, {"": {"q": LowRank(torch.full((3, 1), float(number)), torch.ones(1, 2))}})
    folder.commit(number, RunState(None), replace(round_row(number), best_round=number))


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    finish_round(folder, 1)
    yield folder
    folder.release()


def test_a_round_that_ends_while_the_state_is_read_gives_the_state_after_it(folder, monkeypatch):
    read, late = saved_state.read_state, iter([lambda: finish_round(folder, 2)])

    def read_late(path):
        if path.parent.name == "best":
            next(late, lambda: None)()  # removes the best adapters of round 1 just before they are read
        return read(path)

    monkeypatch.setattr(saved_state, "read_state", read_late)
    found = SavedState.read(folder.path, None)
    assert found.done == 2 and found.best[""]["q"].b[0].item() == 2.0


def test_a_file_that_is_missing_without_a_new_round_is_reported(folder):
    (folder.path / "best" / "1.safetensors").unlink()
    with pytest.raises(UserError, match=r"the run is damaged: .*best/1\.safetensors is missing"):
        SavedState.read(folder.path, None)
