import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from fedlora import api
from fedlora.cli.main import main
from fedlora.config.experiment import build
from fedlora.exporting import write as export
from fedlora.rounds.codec import decode_state, encode_state
from fedlora.rounds.row import from_json
from fedlora.tasks.classification import Classification
from fedlora.train import local
from tiers import fast, slow

from forks import ended, started
from rows import untimed
from tiny import tiny_bert, tiny_rows

METHODS = ["fedit", "fedsa-lora"]
KINDS = ["fedit", "flora", "fedsa-lora", "ravan", "fl-tac"]
"""A mean, changes of the base, client states, three factors, clusters."""
BEGIN = 8
"""Syncs until a run has begun: experiment.toml, environment.json, the first checkpoint and the manifest (2 each)."""
STATES = {"fedit": 0, "fedsa-lora": 6}
"""Syncs of a round's client states: three of them (2 each). Then come the row (1) and the checkpoint (2)."""


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """The table of an experiment, but for its method: every source of chance is in it."""
    home = tmp_path_factory.mktemp("problem")
    return {
        "model": str(tiny_bert(home / "bert")),
        "data": {"source": str(tiny_rows(home / "rows.jsonl", 60))},
        "rounds": 3,
        "clients": {"count": 4, "partition": "iid"},
        "lora": {"dropout": 0.1},
        "train": {"batch_size": 4, "max_length": 16, "lr": 1e-2, "device": "cpu", "clients_per_step": 2},
        "sampling": {"fraction": 0.75},
        "evaluate": {"every": 2},
    }


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory):
    """A run of the method that nothing interrupted."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = tmp_path_factory.mktemp("whole") / "run"
            assert ended(live, found[name], {**problem, "method": method(name)}) == 0
        return found[name]

    return of


def method(name):
    return {"name": name, "rank": 2}


def live(path, table, at_sync=0, at_loss=0, at_export=0, after_loading=None):
    """Begins a run or resumes it, and dies in the n-th write to the disk, training step or export, or so many seconds after
    the model is loaded, where one is given."""
    torch.set_num_threads(1)
    torch.seed()  # two lives never have the same global generators
    np.random.seed(os.getpid())
    os.fsync = deadly(os.fsync, at_sync, cut_short)
    local.train_together = with_deadly_steps(local.train_together, at_loss)
    export.save_file = deadly(export.save_file, at_export)
    if after_loading is not None:
        timer, rounds = threading.Timer(after_loading, os.kill, (os.getpid(), signal.SIGKILL)), api.rounds
        timer.daemon = True
        api.rounds = lambda *given: (timer.start(), rounds(*given))[1]
    if (path / "experiment.toml").exists():
        api.resume(path)
    else:
        api.run(build(table), path)


def deadly(function: Callable[..., Any], at: int, before: Callable[..., None] = lambda *_: None) -> Callable[..., Any]:
    """The function, whose n-th call kills the process."""
    count = 0

    def counted(*arguments, **named):
        nonlocal count
        count += 1
        if count == at:
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return counted


def with_deadly_steps(train: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, in which the n-th step of all its calls kills the process; trial steps at load do not count."""
    losses = Classification.losses
    step = deadly(losses, at)

    def counted(*arguments, **named):
        Classification.losses = step
        try:
            return train(*arguments, **named)
        finally:
            Classification.losses = losses

    return counted


def cut_short(descriptor):
    """Leaves half of a file, or of the last row of a log, as if the rest had not reached the disk; nothing of a folder.

    The rows before were synchronized with the disk, and are safe.
    """
    path = f"/proc/self/fd/{descriptor}"
    if os.path.isfile(path):
        size, safe = os.fstat(descriptor).st_size, 0
        if os.readlink(path).endswith(".jsonl"):
            safe = Path(path).read_bytes()[:-1].rfind(b"\n") + 1
        os.ftruncate(descriptor, (safe + size) // 2)


def content(path):
    """All that a run left, but for the machine's versions, the times and what depends on those."""
    files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.parent.name != ".cache"}
    rows = [json.loads(line) for line in files.pop("rounds.jsonl").splitlines()]
    configs = {name: json.loads(files.pop(name)) for name in list(files) if name.endswith("adapter_config.json")}
    for config in configs.values():
        config["target_modules"].sort()
    server, notes = decode_state(str(path / "checkpoint.safetensors"))
    manifest = json.loads(files.pop("manifest.json"))
    dropped = {"lock", "environment.json", "checkpoint.safetensors"}
    return {
        "checkpoint": encode_state(server, **{**notes, "run": "", "rows": notes["rows"][0] > 0}),
        "manifest": {key: value for key, value in manifest.items() if key not in ("id", "sha256", "environment")},
        "rows": [untimed(from_json(row)) for row in rows],
        **configs,
        **{name: found for name, found in files.items() if name not in dropped},
    }


def rounds_done(path):
    """How many rounds the run's checkpoint counts; -1 if there is none."""
    if not (path / "checkpoint.safetensors").exists():
        return -1
    return decode_state(str(path / "checkpoint.safetensors"))[1]["rounds_done"]


def differing(path, other):
    """The names of what differs between two runs."""
    one, two = content(path), content(other)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


@pytest.mark.slow
def test_a_run_killed_in_each_write_of_its_beginning_ends_as_if_nothing_had_happened(tmp_path, problem, whole):
    table, path = {**problem, "method": method("fedit")}, tmp_path / "run"
    for write in range(1, BEGIN + 1):
        assert not (path / "manifest.json").exists()
        assert ended(live, path, table, at_sync=write) == -signal.SIGKILL
    assert (path / "manifest.json").exists()
    assert ended(live, path, table) == 0
    assert differing(path, whole("fedit")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_in_each_of_its_writes_ends_as_if_nothing_had_happened(tmp_path, problem, whole, name):
    table, path = {**problem, "method": method(name)}, tmp_path / "run"
    assert ended(live, path, table, at_loss=1) == -signal.SIGKILL
    states = STATES[name]
    row, cut = states + 1, 2  # a row that was half written is cut off by the next life (2 writes)
    for write in [*range(1, row), row, 1, cut, row, cut + row + 1, cut + row + 2]:
        assert rounds_done(path) == 0
        assert ended(live, path, table, at_sync=write) == -signal.SIGKILL
    assert rounds_done(path) == 1
    assert ended(live, path, table) == 0
    assert differing(path, whole(name)) == []


@pytest.mark.slow
def test_a_run_killed_while_it_records_the_model_before_training_records_it_once(tmp_path, problem, whole):
    table, path = {**problem, "method": method("fedit")}, tmp_path / "run"
    cut = 2  # as above
    for write in (BEGIN + 1, 1, cut + 2, cut + 3):
        assert ended(live, path, table, at_sync=write) == -signal.SIGKILL
        assert rounds_done(path) == 0
    assert ended(live, path, table) == 0
    assert [row.round for row in content(path)["rows"]] == [0, 1, 2, 3]
    assert differing(path, whole("fedit")) == []


@pytest.mark.parametrize("name", fast(METHODS, "fedsa-lora"))
def test_a_run_killed_while_it_trains_and_exports_ends_as_if_nothing_had_happened(tmp_path, problem, whole, name):
    table, path = {**problem, "method": method(name)}, tmp_path / "run"
    deaths = [
        {"at_loss": 13},
        {"at_loss": 6},
        {"at_loss": 13},
        {"at_export": 1},
        {"at_export": 3 if name == "fedsa-lora" else 1},
    ]
    assert [ended(live, path, table, **death) for death in deaths] == [-signal.SIGKILL] * len(deaths)
    assert ended(live, path, table) == 0
    assert differing(path, whole(name)) == []


def test_only_the_personal_method_has_states_and_adapters_for_each_client(whole):
    states = {name: {f.parent.name for f in whole(name).glob("clients/*/*.safetensors")} for name in METHODS}
    adapters = {name: {f.parent.name for f in whole(name).glob("adapter/**/adapter_model.safetensors")} for name in METHODS}
    assert states == {"fedit": set(), "fedsa-lora": {"000", "001", "002", "003"}}
    assert adapters == {"fedit": {"adapter"}, "fedsa-lora": {"000", "001", "002", "003"}}


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"seed": 1}, {"lora": {}}], ids=["another seed", "no dropout"])
def test_seed_and_dropout_each_change_the_result(tmp_path, problem, whole, change):
    assert ended(live, tmp_path / "run", {**problem, "method": method("fedit"), **change}) == 0
    assert {"checkpoint", "adapter/adapter_model.safetensors"} < set(differing(tmp_path / "run", whole("fedit")))


@pytest.mark.parametrize("name", METHODS)
def test_taking_up_a_finished_run_changes_nothing(problem, whole, name):
    path = whole(name)
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    assert ended(live, path, problem, at_loss=1) == 0
    assert {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} == before


@pytest.mark.slow
def test_a_run_killed_before_its_experiment_is_on_disk_can_be_begun_again_in_the_same_folder(tmp_path, problem, whole):
    table = {**problem, "method": method("fedit")}
    assert ended(live, tmp_path / "run", table, at_sync=1) == -signal.SIGKILL
    assert not (tmp_path / "run" / "experiment.toml").exists()
    assert ended(live, tmp_path / "run", table) == 0
    assert differing(tmp_path / "run", whole("fedit")) == []


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", slow(KINDS, "fedsa-lora"))
def test_a_run_killed_at_random_instants_of_all_its_lives_ends_as_if_nothing_had_happened(tmp_path, problem, whole, name):
    """FEDLORA_KILLS says how many kills: loading, training, evaluating and exporting, of new runs and of resumed ones."""
    table, path, rng = {**problem, "method": method(name)}, tmp_path / "run", random.Random(name)
    whole(name)
    began = time.perf_counter()
    assert ended(live, tmp_path / "timed", table) == 0
    seconds = dict.fromkeys(("from its start", "from the first round"), time.perf_counter() - began)
    kills, killed_after = int(os.environ.get("FEDLORA_KILLS", "4")), []
    while len(killed_after) < kills:
        kind, before = rng.choice(list(seconds)), rounds_done(path)
        instant = seconds[kind] * rng.random()
        process = started(live, path, table, after_loading=instant if kind == "from the first round" else None)
        if kind == "from its start":
            process.join(instant)
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert differing(path, whole(name)) == []
            shutil.rmtree(path)
            seconds[kind] *= 0.7  # so that some lives get further than the one before, and some do not
        else:
            assert process.exitcode == -signal.SIGKILL
            killed_after.append(rounds_done(path))
            seconds[kind] *= 1.3 if killed_after[-1] == before else 0.9
    print(f"{name}: rounds complete when killed {dict(sorted(Counter(killed_after).items()))}")
    assert ended(live, path, table) == 0
    assert differing(path, whole(name)) == []


def fedlora(output, *arguments):
    """The command in a fork; its exit code is the process's, what it says goes to a file."""
    sys.argv = ["fedlora", *map(str, arguments)]
    sys.stdout = sys.stderr = output.open("w")
    main()


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on_and_that_command_finishes_the_run(tmp_path, problem):
    table = {**problem, "method": method("fedsa-lora"), "rounds": 20, "evaluate": {"every": 10}}
    path, file, rows = tmp_path / "run", tmp_path / "experiment.toml", tmp_path / "run" / "rounds.jsonl"
    file.write_text(tomli_w.dumps(table))
    command = [sys.executable, "-m", "fedlora.cli", "run", str(file), "--out", str(path)]
    real = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (rows.exists() and rows.read_bytes()) and real.poll() is None:
        time.sleep(0.005)
    for _ in range(5):
        real.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, said = real.communicate()
    assert real.returncode == 130 and 1 <= len(rows.read_bytes().splitlines()) < 20
    assert said.strip() == f"interrupted; resume with: fedlora run --resume {path}"

    assert ended(fedlora, tmp_path / "said", "run", file, "--out", path) == 2
    assert f"error: {path}: is not empty; resume with --resume {path}" in (tmp_path / "said").read_text()
    assert ended(fedlora, tmp_path / "said", "run", "--resume", path) == 0
    assert "round 20/20" in (tmp_path / "said").read_text()
    assert ended(live, tmp_path / "whole", table) == 0
    assert differing(path, tmp_path / "whole") == []
