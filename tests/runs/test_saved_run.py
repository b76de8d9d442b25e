"""Reading a run directory that this process does not own."""

import json
import shutil

import pytest

from fedlora import Experiment, Result, UserError, run
from fedlora.runs.folder import RunFolder

from tiny import tiny_bert, tiny_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds."""
    place = tmp_path_factory.mktemp("saved")
    settings = {
        "model": str(tiny_bert(place / "model")),
        "data": str(tiny_rows(place / "rows.jsonl", 45)),
        "rounds": 2,
        "clients": {"count": 3, "partition": "iid"},
        "train": {"max_length": 16},
    }
    return run(Experiment.model_validate(settings), place / "run", False)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of its directory."""
    return shutil.copytree(finished.folder, tmp_path / "run")


def test_a_result_that_is_read_equals_the_one_that_the_run_returned(finished):
    assert Result.read(finished.folder) == finished


def test_a_run_is_read_while_another_process_has_its_lock_and_an_uncommitted_row_is_left_out(folder, finished):
    held = RunFolder(folder)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"version": 1, "round": 3')
    before = (folder / "rounds.jsonl").read_bytes()
    assert Result.read(folder).rows == finished.rows
    assert (folder / "rounds.jsonl").read_bytes() == before
    held.release()


def without_a_row(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_text("".join(lines[:-1]))


def with_an_edited_number(folder):
    lines = (folder / "rounds.jsonl").read_text()
    (folder / "rounds.jsonl").write_text(lines.replace('"accuracy": 0', '"accuracy": 1', 1))


def of_another_run(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "id": "0"}))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (without_a_row, "rounds.jsonl"),
        (with_an_edited_number, "rounds.jsonl"),
        (of_another_run, "manifest.json"),
        (lambda folder: (folder / "checkpoint.safetensors").unlink(), "checkpoint.safetensors is missing"),
        (lambda folder: (folder / "checkpoint.safetensors").write_bytes(b"\x08" + b"\0" * 20), "header is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "the run has not begun"),
        (lambda folder: shutil.rmtree(folder), "not a run directory"),
    ],
)
def test_a_directory_that_cannot_be_trusted_is_rejected_with_the_file(damage, part, folder):
    damage(folder)
    with pytest.raises(UserError) as raised:
        Result.read(folder)
    assert part in str(raised.value) and "\n" not in str(raised.value)
