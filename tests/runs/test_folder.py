import errno
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from fedlora.errors import RunStopped, UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.rounds.codec import encode_state
from fedlora.runs.client_folder import client_folder
from fedlora.runs.folder import RunFolder

from forks import ended, pipe, started
from rows import round_row

ANN = ClientInfo("ann", rank=2, examples=5)
ODD_IDS = ["a/b", "a%2Fb", "..", ".", "/", "../../up", "Ä", "con.txt", "a b", "~", "-", "*", "a\nb", "x" * 150, "\\", "名"]


def state(number):
    return {"w": torch.full((7, 3), float(number)), "n": number}


def big(number):
    return {"w": torch.full((40, 1000), float(number))}


def folder_with(path, rounds):
    folder = RunFolder.create(path)
    for done in range(1, rounds + 1):
        folder.commit(done, state(done), round_row(done))
    return folder


def names_below(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def names(path):
    return {file.name for file in path.rglob("*") if file.is_file()} - {"lock"}


def hold(path, ready):
    """Has the folder until it is killed."""
    folder = RunFolder(path)
    ready.send(folder.path)
    signal.pause()


def go_on(path, ready):
    """Commits round after round, each with a client's state, until it is killed; tells after each."""
    folder = RunFolder(path)
    done, _ = folder.restore()
    while True:
        folder.save_client(ANN, done, big(done))
        done += 1
        folder.commit(done, big(done), round_row(done, diverged="x" * 5000))
        ready.send(done)


def commit_and_die(path, at_sync):
    """Commits round 3, dies in the middle of its n-th write to the disk."""
    folder, real, count = RunFolder(path), os.fsync, 0

    def dying(descriptor):
        nonlocal count
        count += 1
        if count == at_sync:
            if os.path.isfile(f"/proc/self/fd/{descriptor}"):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - 5)
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    folder.restore()
    os.fsync = dying
    folder.save_client(ANN, 2, state(2))
    folder.commit(3, state(3), round_row(3))


def fill_the_disk(path, what, limit):
    """Writes more than any file may hold here, and checks what is said about it."""
    folder = RunFolder(path)
    folder.restore()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    writes = {
        "row": lambda: folder.commit(3, state(3), round_row(3, diverged="x" * 100_000)),
        "checkpoint": lambda: folder.commit(3, big(3), round_row(3)),
        "client": lambda: folder.save_client(ANN, 2, big(2)),
    }
    with pytest.raises(RunStopped, match=rf"cannot write .*{os.strerror(errno.EFBIG)}.*last complete round is intact"):
        writes[what]()


def test_a_folder_that_was_used_before_is_refused(tmp_path):
    folder_with(tmp_path / "run", 1).release()
    with pytest.raises(UserError, match=r"is not empty; resume with --resume .*run, or choose another"):
        RunFolder.create(tmp_path / "run")


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        RunFolder.create(tmp_path)
    assert names(tmp_path) == {"notes.txt"}


def test_a_folder_that_is_not_there_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no such run directory"):
        RunFolder(tmp_path / "nothing")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be created"):
            RunFolder.create(path)


def test_a_folder_in_which_nothing_was_written_is_removed_and_can_be_made_again(tmp_path):
    RunFolder.create(tmp_path / "a" / "run").release()
    assert not (tmp_path / "a" / "run").exists()
    RunFolder.create(tmp_path / "a" / "run").release()


def test_a_folder_in_use_is_refused_to_others_in_this_process_until_it_is_released(tmp_path):
    folder = folder_with(tmp_path / "run", 1)
    with pytest.raises(UserError, match="locked by another process"):
        RunFolder(tmp_path / "run")
    folder.release()
    RunFolder(tmp_path / "run").release()


def test_a_folder_in_use_by_another_process_is_refused_until_that_is_killed(tmp_path):
    folder_with(tmp_path / "run", 1).release()
    receiving, sending = pipe()
    holder = started(hold, tmp_path / "run", sending)
    assert receiving.recv() == tmp_path / "run"
    with pytest.raises(UserError, match="locked by another process"):
        RunFolder(tmp_path / "run")
    holder.kill()
    holder.join()
    RunFolder(tmp_path / "run").release()


def test_a_new_folder_has_no_round_no_state_and_no_rows(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    assert folder.restore() == (0, None) and folder.rows() == [] and folder.client_state(ANN, before=9) is None
    folder.release()


def test_what_was_committed_last_is_restored(tmp_path):
    folder_with(tmp_path / "run", 3).release()
    folder = RunFolder(tmp_path / "run")
    done, server = folder.restore()
    assert done == server["n"] == 3 and torch.equal(server["w"], state(3)["w"])
    assert folder.rows() == [round_row(number) for number in (1, 2, 3)]
    folder.release()


@pytest.mark.parametrize("rest", [b'{"round": 3}\n', b'{"round": 3', b'{"round": 3}\n{"rou', b"\xff\xfe\0"])
def test_rows_beyond_the_last_complete_round_are_cut_off(tmp_path, rest):
    folder = folder_with(tmp_path / "run", 2)
    with (tmp_path / "run" / "rounds.jsonl").open("ab") as file:
        file.write(rest)
    assert folder.restore()[0] == 2
    folder.commit(3, state(3), round_row(3, notes={"né\u2028": 0.5}))
    assert folder.rows() == [round_row(1), round_row(2), round_row(3, notes={"né\u2028": 0.5})]
    folder.release()


def test_half_written_files_are_ignored(tmp_path):
    folder = folder_with(tmp_path / "run", 2)
    folder.save_client(ANN, 1, state(1))
    for file in [f for f in (tmp_path / "run").rglob("*") if f.is_file() and f.name != "lock"]:
        file.with_name(file.name + ".partial").write_bytes(b"garbage")
    (tmp_path / "run" / "clients" / "ann" / "7.safetensors.partial").write_bytes(b"garbage")
    assert folder.restore()[0] == 2 and len(folder.rows()) == 2
    assert folder.client_state(ANN, before=9)["n"] == 1
    folder.release()


def whole_run(path):
    """A run of three rounds with every kind of file; those that it needs."""
    folder = RunFolder.create(path)
    folder.record("environment.json", "{}")
    folder.begin({"id": "r", "environment": hashlib.sha256(b"{}").hexdigest()}, state(0))
    for index in range(3):
        if index != 1:
            folder.save_client(ANN, index, state(index))
        folder.save_client(ClientInfo("bob", 1, 1), index, state(index))
        folder.save_base_update(index, {"q": LowRank(torch.ones(3, 1), torch.ones(1, 4))})
        folder.commit(index + 1, state(index + 1), round_row(index + 1))
    folder.release()
    files = ["manifest.json", "environment.json", "checkpoint.safetensors", "rounds.jsonl"]
    return [
        *files,
        "clients/ann/2.safetensors",
        "clients/bob/2.safetensors",
        *(f"base_updates/{i}.safetensors" for i in range(3)),
    ]


DAMAGES = {
    "a bit flipped": lambda content, at: content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :],
    "cut": lambda content, at: content[:at],
    "emptied": lambda content, at: b"",
    "deleted": lambda content, at: None,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_every_file_that_a_run_needs_is_named_when_it_is_damaged(tmp_path, how):
    needed, path = whole_run(tmp_path / "run"), tmp_path / "run"
    superseded = {"clients/ann/0.safetensors", "clients/bob/0.safetensors", "clients/bob/1.safetensors"}
    assert names_below(path) == {*needed, *superseded, "lock"}
    for name in needed:
        before = (path / name).read_bytes()
        for at in range(0, len(before), 1 + len(before) // 9):
            after = DAMAGES[how](before, at)
            (path / name).unlink(missing_ok=True)
            if after is not None:
                (path / name).write_bytes(after)
            folder = RunFolder(path)
            with pytest.raises(UserError, match=rf"the run is damaged: .*{re.escape(name)}"):
                folder.restore()
            folder.release()
        (path / name).write_bytes(before)
    folder = RunFolder(path)
    assert folder.restore()[0] == 3 and len(folder.rows()) == 3
    folder.release()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    whole_run(tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(encode_state(state(3), rounds_done=3, run="other"))
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors belongs to another run"):
        folder.restore()
    folder.release()


def test_a_client_state_that_disappears_while_the_run_goes_on_is_missed(tmp_path):
    whole_run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.restore()
    shutil.rmtree(tmp_path / "run" / "clients" / "ann")
    with pytest.raises(UserError, match=r"ann/2\.safetensors is missing"):
        folder.client_state(ANN, before=3)
    folder.release()


def test_rows_that_are_changed_while_the_run_goes_on_are_not_read(tmp_path):
    whole_run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.restore()
    (tmp_path / "run" / "rounds.jsonl").write_text('{"round": 1}\n{"rou')
    with pytest.raises(UserError, match=r"rounds\.jsonl: the rows of the complete rounds are missing or changed"):
        folder.rows()
    folder.release()


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_run_whose_folder_is_not_there_any_more_stops_and_makes_no_other(tmp_path, how):
    path = tmp_path / "run"
    folder = folder_with(path, 2)
    if how == "removed":
        shutil.rmtree(path)
    else:
        path.rename(tmp_path / "elsewhere")
    if how == "replaced":
        path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for write in (
        lambda: folder.commit(3, state(3), round_row(3)),
        lambda: folder.save_client(ANN, 2, state(2)),
        lambda: folder.save_base_update(2, {}),
        lambda: folder.record("environment.json", "{}"),
    ):
        with pytest.raises(RunStopped, match="run directory was moved or removed"):
            write()
    folder.release()
    assert sorted(tmp_path.rglob("*")) == before
    if how == "moved":
        again = RunFolder(tmp_path / "elsewhere")
        assert again.restore()[0] == 2
        again.release()


@pytest.mark.parametrize("at_sync", [1, 2, 3, 4, 5, 6, 7])
def test_a_commit_killed_at_any_of_its_writes_happened_wholly_or_not_at_all(tmp_path, at_sync):
    folder_with(tmp_path / "run", 2).release()
    assert ended(commit_and_die, tmp_path / "run", at_sync) == -signal.SIGKILL
    folder = RunFolder(tmp_path / "run")
    done, server = folder.restore()
    assert done == server["n"] == (3 if at_sync == 7 else 2)
    assert [row.round for row in folder.rows()] == list(range(1, done + 1))
    assert folder.client_state(ANN, before=2) is None
    folder.release()


def test_the_writes_of_a_commit_are_the_seven_at_which_it_was_killed(tmp_path):
    folder_with(tmp_path / "run", 2).release()
    assert ended(commit_and_die, tmp_path / "run", 8) == 0


def test_a_run_killed_at_random_instants_is_always_restored_whole(tmp_path):
    RunFolder.create(tmp_path / "run").record("experiment.toml", "")
    rng, committed, lives = random.Random(0), 0, 15
    for _ in range(lives):
        receiving, sending = pipe()
        process, began = started(go_on, tmp_path / "run", sending), time.perf_counter()
        sending.close()
        first = receiving.recv()
        second, shared_order_seed = receiving.recv(), time.perf_counter() - began
        assert (first, second) == (committed + 1, committed + 2)
        time.sleep(rng.random() * shared_order_seed)
        process.kill()
        process.join()
        folder = RunFolder(tmp_path / "run")
        committed, server = folder.restore()
        assert committed >= second and torch.equal(server["w"], big(committed)["w"])
        assert [row.round for row in folder.rows()] == list(range(1, committed + 1))
        assert torch.equal(folder.client_state(ANN, before=committed)["w"], big(committed - 1)["w"])
        folder.release()
    assert committed >= 2 * lives


@pytest.mark.parametrize(
    ("what", "limit"), [("row", 20_000), ("checkpoint", 20_000), ("client", 20_000), ("checkpoint", 0)]
)
def test_a_full_disk_stops_the_run_and_leaves_the_last_round_whole(tmp_path, what, limit):
    folder_with(tmp_path / "run", 2).release()
    before = names(tmp_path / "run")
    assert ended(fill_the_disk, tmp_path / "run", what, limit) == 0
    folder = RunFolder(tmp_path / "run")
    done, server = folder.restore()
    assert done == server["n"] == 2 and folder.rows() == [round_row(1), round_row(2)]
    assert names(tmp_path / "run") == before
    folder.commit(3, state(3), round_row(3))
    assert folder.restore()[0] == 3
    folder.release()


def test_a_clients_state_is_the_latest_before_the_round(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.save_client(ANN, 2, state(2))
    folder.save_client(ANN, 10, state(10))
    found = {before: folder.client_state(ANN, before) for before in (0, 2, 3, 10, 11, 99)}
    assert {before: None if s is None else s["n"] for before, s in found.items()} == {
        0: None,
        2: None,
        3: 2,
        10: 2,
        11: 10,
        99: 10,
    }
    folder.release()


def test_only_a_clients_three_latest_states_are_kept(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    for index in (0, 3, 8, 9, 10, 11):
        folder.save_client(ANN, index, state(index))
    assert names(tmp_path / "run" / "clients") == {"9.safetensors", "10.safetensors", "11.safetensors"}
    folder.release()


def test_a_round_done_again_replaces_its_state_and_keeps_the_one_before(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    for index, number in ((4, 4), (5, 99), (5, 5)):
        folder.save_client(ANN, index, state(number))
    assert folder.client_state(ANN, before=5)["n"] == 4 and folder.client_state(ANN, before=6)["n"] == 5
    folder.release()


def test_clients_of_any_name_have_a_folder_each_inside_the_run(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    for number, name in enumerate(ODD_IDS):
        folder.save_client(ClientInfo(name, 1, 1), 0, state(number))
    read = [folder.client_state(ClientInfo(name, 9, 9), before=1)["n"] for name in ODD_IDS]
    assert read == list(range(len(ODD_IDS)))
    homes = {home.name for home in (tmp_path / "run" / "clients").iterdir()}
    assert homes == {client_folder(name) for name in ODD_IDS} and len(homes) == len(ODD_IDS)
    assert {Path(p).name for p in tmp_path.iterdir()} == {"run"}
    folder.release()


def test_a_clients_name_too_long_for_a_folder_stops_the_run_by_name(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(RunStopped, match="File name too long"):
        folder.save_client(ClientInfo("Ä" * 150, 1, 1), 0, state(0))
    folder.release()
