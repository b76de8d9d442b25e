"""The command for sweeps."""

import os
import signal
import tomllib

import pytest
from commands import assert_refused, write

from fedlora import sweeping


@pytest.fixture
def sweep_file(place, tmp_path):
    base = {**tomllib.loads((place / "good.toml").read_text()), "rounds": 1}
    write(tmp_path / "sweep.toml", {"base": base, "axes": {"method": {"rank": [2, 33]}}, "seeds": [0, 1]})
    return tmp_path / "sweep.toml"


@pytest.mark.slow
def test_a_sweep_prints_each_run_and_names_failures_at_the_end(sweep_file, command, tmp_path):
    code, printed, errors = command("sweep", sweep_file, "--out", tmp_path / "out")
    assert code == 1
    assert [line.partition(" ")[0] for line in printed.splitlines()[:-2]] == ["1/4", "2/4", "3/4", "4/4"]
    assert "4/4 runs  method.rank=33 seed=1: failed: method.rank = 33" in printed
    assert f"sweep directory  {tmp_path / 'out'}\n" in printed
    assert f"fedlora compare {tmp_path / 'out'}\n" in printed
    for seed in (0, 1):
        assert f"failed: method.rank=33, seed {seed}: method.rank = 33" in errors
    assert f"2 runs failed; to repeat them, resume with: fedlora sweep --resume {tmp_path / 'out'}" in errors


def test_a_dry_run_lists_the_runs_and_writes_nothing(sweep_file, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, printed, errors = command("sweep", sweep_file, "--dry-run", "--set", "rounds=3")
    titles = [f"method.rank={rank} seed={seed}" for seed in (0, 1) for rank in (2, 33)]
    assert (code, printed.splitlines(), errors) == (0, [*titles, "4 runs"], "")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_sweep_says_how_to_resume_it(sweep_file, command, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "execute", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, _, errors = command("sweep", sweep_file, "--out", tmp_path / "out")
    assert (code, errors) == (130, f"interrupted; resume with: fedlora sweep --resume {tmp_path / 'out'}\n")


def test_an_interrupt_that_compiled_code_took_for_an_error_ends_the_sweep(sweep_file, command, tmp_path, monkeypatch):
    def finish_run(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("a kernel failed") from None

    monkeypatch.setattr(sweeping, "finish_run", finish_run)
    code, printed, _ = command("sweep", sweep_file, "--out", tmp_path / "out")
    assert code == 130 and "runs" not in printed


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{file}", "--set", "round=1"], ["sweep.toml: base: unknown key 'round'", "'rounds'"]),
        (["{file}", "--devices", "0"], ["devices = 0"]),
        (["{file}", "--resume", "out"], ["--resume: expected no sweep file"]),
        (["--resume", "{file}"], ["not a sweep directory"]),
        ([], ["expected a sweep file or --resume"]),
    ],
)
def test_an_invalid_command_is_refused_in_one_line(words, parts, sweep_file, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(command("sweep", *(word.format(file=sweep_file) for word in words)), *parts)
