"""The table of answers before and after training."""

import io
import json

import pytest
from rich.console import Console

from fedlora.report.before_after import summary
from fedlora.runs.result import Result

from rows import round_row

SENTENCE = "Return a shallow copy of the list of all names that are exported by the documentation of this module."


def made_up(folder, count=9):
    """A run after which the answer to each of the prompts, named by number, is the reference."""
    (folder / "samples").mkdir()
    for number, answer in ((0, "I do not know\nwhat\x1b[2J it [bold] does"), (2, SENTENCE)):
        rows = [{"prompt": f"def f{i}(x):\n", "answer": answer, "references": [SENTENCE]} for i in range(count)]
        (folder / "samples" / f"round-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [round_row(0, global_={"loss": 4.5}), round_row(1), round_row(2, global_={"loss": 3.25})]
    return Result(folder, "fedit", scores, {})


def printed(found, width):
    console = Console(width=width, file=io.StringIO())
    console.print(found)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width, tmp_path):
    text = printed(summary(made_up(tmp_path)), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    letters = "".join(text.split())
    assert all(f"deff{i}(x):" in letters for i in (0, 2, 4, 6)) and "deff1(x):" not in letters
    for word in (*SENTENCE.split()[:3], "reference", "before", "after"):
        assert text.count(word) >= 4


def test_answers_are_on_one_line_and_their_control_characters_are_escaped(tmp_path):
    text = printed(summary(made_up(tmp_path)), 200)
    assert "I do not know what\\x1b[2J it [bold] does" in text and "\x1b" not in text


def test_loss_and_rouge_are_those_of_all_examples_with_the_interval_of_the_gain(tmp_path):
    lines = [line.split() for line in printed(summary(made_up(tmp_path)), 80).splitlines()]
    assert ["test", "loss", "4.50", "3.25", "-1.25"] in lines
    assert ["ROUGE-L", "0.0", "100.0", "+100.0", "+100.0", "to", "+100.0"] in lines


def test_a_run_without_answers_has_no_summary(tmp_path):
    assert summary(Result(tmp_path, "fedit", [], {})) is None
