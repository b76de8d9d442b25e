"""What a command prints about a run, and how it is interrupted."""

import os
import re
import shlex
import signal

import pytest
from commands import assert_refused

from fedlora import api
from fedlora.errors import UserError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_compiled_code_took_for_a_bad_file_is_still_an_interrupt(number, by_python, command, monkeypatch):
    def resume(path, watch):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise UserError("the run is damaged") from None

    monkeypatch.setattr(api, "resume", resume)
    code, _, errors = command("run", "--resume", by_python)
    assert (code, errors) == (130, f"interrupted; resume with: fedlora run --resume {shlex.quote(str(by_python))}\n")


def test_of_five_interrupts_the_first_counts_and_the_others_disturb_nothing(by_python, command, monkeypatch):
    request = []

    def resume(path, watch):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            request.append("went on")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                os.kill(os.getpid(), number)
            request.append("put in order")

    monkeypatch.setattr(api, "resume", resume)
    code, _, errors = command("run", "--resume", by_python)
    assert (code, errors) == (130, f"interrupted; resume with: fedlora run --resume {shlex.quote(str(by_python))}\n")
    assert request == ["put in order"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "until the process has ended"


def test_a_run_prints_each_round_and_the_paths_and_equals_a_run_by_python(place, by_python, command, tmp_path):
    code, printed, errors = command("run", place / "good.toml", "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert re.findall(r"^ +(\d+) +3 ", printed, re.MULTILINE) == ["1", "2"]
    assert f"run directory  {tmp_path / 'run'}\n" in printed
    assert f"PEFT adapter   {tmp_path / 'run' / 'adapter'}\n" in printed
    one, other = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", by_python))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_without_an_adapter_that_peft_can_hold_says_why(place, command, tmp_path):
    code, printed, errors = command("run", place / "good.toml", "--out", tmp_path / "run", "--set", "method.name=fedlease")
    assert (code, errors) == (0, "")
    assert "PEFT adapters  3 of 3 not written: input-dependent mixtures of experts" in printed
    assert_refused(command("export", tmp_path / "run", tmp_path / "out"), "input-dependent mixtures of experts")


def test_a_run_of_a_personal_method_prints_the_folder_of_its_adapters(place, command, tmp_path):
    path, personal = tmp_path / "run", ["--set", "method.name=fedsa-lora", "--set", "rounds=1"]
    code, printed, errors = command("run", place / "good.toml", "--out", path, *personal)
    assert (code, errors) == (0, "")
    assert f"PEFT adapters  {path / 'adapter'}, one for each of 3 clients\n" in printed
    assert len([folder for folder in (path / "adapter").iterdir() if folder.is_dir()]) == 3
