"""What is printed of a run."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.messages import ClientInfo, Round
from fedlora.report.terminal import Live, closing, size
from fedlora.rounds.row import PrivacyRow, Seconds
from fedlora.rounds.score_summary import Summary
from fedlora.runs.result import Result

from rows import round_row

ROW = round_row(
    3,
    attempts=1,
    chosen=["a", "b", "c"],
    accepted=["a", "b", "c"],
    train_loss=0.1234,
    global_={"accuracy": 0.25, "examples": 9},
    clients={"accuracy": Summary(mean=0.5, worst_decile=0.125, spread=0.25, each={})},
    bytes_up=1_500,
    bytes_down=2_300_000,
    seconds=Seconds(train=1.25, merge=0.5, evaluate=0.25),
)
UNEVALUATED = replace(ROW, global_=None, clients=None)


def printed(*rows):
    """The cells of the closing table's rows."""
    table = closing(Result(Path("run"), "fedit", rows, {}))
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


def test_every_number_stands_in_its_own_column():
    table = closing(Result(Path("run"), "fedit", [ROW], {}))
    found = {str(column.header).replace("\n", " ").strip(): next(iter(column.cells)) for column in table.columns}
    assert found == {
        "round": "3",
        "clients": "3",
        "train loss": "0.123",
        "test accuracy": "0.250",
        "held-out accuracy": "0.500",
        "worst decile": "0.125",
        "up": "1.5 kB",
        "down": "2.3 MB",
        "seconds": "2.0",
    }


def test_a_round_with_rejected_clients_says_how_many_of_the_cohort_counted():
    assert printed(replace(ROW, accepted=["a"], rejected={"b": "x", "c": "y"}))[0][1] == "1 of 3"


def test_the_model_before_training_has_accuracies_and_no_loss():
    assert printed(replace(ROW, round=0, train_loss=None, chosen=[], accepted=[]))[0][:4] == ["0", "0", "-", "0.250"]


def test_a_round_without_an_evaluation_has_no_accuracies():
    assert printed(UNEVALUATED)[0][3:6] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_000_000, "1.0 MB"),
        (2_500_000_000, "2.5 GB"),
        (10**13, "10000.0 GB"),
    ],
)
def test_bytes_are_counted_in_thousands(count, text):
    assert size(count) == text


def test_live_lines_name_the_round_the_scores_and_the_rejected_client():
    console = Console(file=io.StringIO(), width=200)
    with Live(console, 7) as live:
        live.round_started(Round(2, 0), [ClientInfo("a", 4, 1)])
        live.answered(ClientInfo("a\x1b[2J", 4, 1), "too large")
        live.round_ended(ROW)
        live.round_ended(UNEVALUATED)
        live.round_ended(replace(ROW, round=0, train_loss=None, clients=None))
    lines = console.file.getvalue().splitlines()
    assert "round 3/7  loss 0.123  test accuracy 0.250  held-out accuracy 0.500  2.0 s" in lines
    assert "round 3/7  loss 0.123  2.0 s" in lines
    assert "round 0/7  test accuracy 0.250  2.0 s" in lines
    assert any("too large" in line and "\x1b" not in line for line in lines)


def test_a_round_with_privacy_says_what_it_has_spent():
    out = io.StringIO()
    live = Live(Console(file=out, width=120), 3)
    live.round_ended(replace(ROW, privacy=PrivacyRow(epsilon=1.5, delta=1e-5, clip=1.0)))
    assert "epsilon 1.500" in out.getvalue()
