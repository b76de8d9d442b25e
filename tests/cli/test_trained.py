"""The commands evaluate, predict and chat."""

import io
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from commands import assert_refused

from fedlora import evaluate, predict


def test_the_scores_are_a_table_or_one_json_object(trained, command):
    one = trained("classification")
    scores = evaluate(one.run, one.data)
    code, printed, errors = command("evaluate", one.run, "--data", one.data)
    assert (code, errors) == (0, "")
    rows = dict(line.split() for line in printed.splitlines() if len(line.split()) == 2)
    assert rows.items() >= {"accuracy": f"{scores['accuracy']:.4f}", "examples": "48"}.items()
    code, printed, _ = command("evaluate", one.run, "--json")
    assert code == 0 and json.loads(printed) == one.result.rows[-1].global_


def test_undefined_scores_are_null_in_json(trained, command):
    one = trained("tagging")
    found = json.loads(command("evaluate", one.run, "--data", one.data, "--json")[1])
    expected = evaluate(one.run, one.data)
    assert found == {name: None if math.isnan(value) else value for name, value in expected.items()}


def test_predictions_are_json_lines_on_the_terminal_or_in_a_file(trained, command, tmp_path):
    one = trained("classification")
    code, printed, errors = command("predict", one.adapter, "bab bad", "ceb")
    assert (code, errors) == (0, "")
    assert [json.loads(line) for line in printed.splitlines()] == predict(one.adapter, ["bab bad", "ceb"])
    code, printed, _ = command("predict", one.run, "--data", one.data, "--out", tmp_path / "found.jsonl")
    assert (code, printed) == (0, "")
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 48


def test_predictions_need_texts_or_a_file(trained, command):
    one = trained("classification")
    assert_refused(command("predict", one.run), "expected TEXT or --data FILE, found neither")
    assert_refused(command("predict", one.run, "bab", "--data", one.data), "found both")


def test_lines_of_standard_input_are_answered_one_after_the_other(trained, command, monkeypatch):
    one = trained("causal-lm")
    monkeypatch.setattr(sys, "stdin", io.StringIO("bab bad\n\n/base\nbab bad\n/forget\nbab </s>\n/trained\nbab bad\n"))
    code, printed, errors = command("chat", one.run, "--set", "evaluate.max_new_tokens=4")
    trained_answer, _, again = printed.splitlines()
    (expected,) = predict(one.run, ["bab bad"], overrides=["evaluate.max_new_tokens=4"])
    assert code == 0 and trained_answer == again == expected["answer"]
    assert errors.count("error: ") == 1 and "special tokens" in errors


def test_a_merged_model_has_no_model_before_training(trained, command, monkeypatch):
    one = trained("causal-lm")
    assert_refused(command("chat", one.merged, "--base"), "the model before training is not known")


def test_a_chat_with_a_classifier_names_predict(trained, command):
    assert_refused(command("chat", trained("classification").run), "generates no text; use fedlora predict")


@pytest.mark.slow
def test_in_a_terminal_an_interrupt_stops_the_answer_and_the_end_of_input_leaves(trained):
    one = trained("causal-lm")
    terminal, inner = pty.openpty()
    words = [sys.executable, "-m", "fedlora.cli", "chat", str(one.run), "--set", "evaluate.max_new_tokens=30"]
    process = subprocess.Popen(words, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, close_fds=True)
    os.close(inner)
    shown = b""

    def wait_for(text: bytes, interrupting: bool = False) -> None:
        nonlocal shown
        end = time.monotonic() + 120
        while text not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 5)[0]:
                shown += os.read(terminal, 4096)
            elif interrupting:  # Python misses a signal that arrives just before it waits for a key
                process.send_signal(signal.SIGINT)
        assert text in shown, shown
        shown = shown.partition(text)[2]

    try:
        wait_for(b"> ")
        os.write(terminal, b"not sent")
        wait_for(b"not sent")
        process.send_signal(signal.SIGINT)
        wait_for(b"> ", interrupting=True)
        os.write(terminal, b"/help\n")
        wait_for(b"Ctrl-D leaves.")
        wait_for(b"> ")
        os.write(terminal, b"bab bad\n")
        wait_for(b"> ")
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
