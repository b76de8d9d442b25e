"""Names that others chose do nothing to a terminal, wherever they are printed."""

import io
import json
import sys

import pytest
import tomli_w
from rich.console import Console

from fedlora.cli.main import main
from fedlora.cli.progress import note
from fedlora.messages import ClientInfo
from fedlora.printable import printable, quoted
from fedlora.report.terminal import Live

HOSTILE = "[red]x[/] :smile: \x1b[2J\x9b31m\r\n\u202e\u2066\x07é"
ESCAPED = r"[red]x[/] :smile: \x1b[2J\x9b31m\r\n\u202e\u2066\x07é"


def assert_harmless(printed: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in printed)


def test_a_printable_text_is_its_repr_without_quotes_and_stays_so():
    assert printable(HOSTILE) == repr(HOSTILE)[1:-1] == ESCAPED
    assert printable(ESCAPED) == ESCAPED


def test_a_quoted_name_is_short_and_printable():
    assert quoted("label") == "'label'"
    assert_harmless(quoted(HOSTILE))
    assert len(quoted("x" * 10_000)) == 42


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `fedlora` in this process; its exit code, and all that it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
            sys.exit(0)
        return stopped.value.code or 0, "".join(capsys.readouterr())

    return call


@pytest.mark.parametrize("labels", [2, 30])
def test_a_check_prints_hostile_clients_and_labels_escaped(command, tmp_path, labels):
    rows = [
        {"text": "a", "label": f"{HOSTILE}{label}", "user": f"{HOSTILE}{user}"}
        for user in (1, 2)
        for label in range(labels)
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    clients = {"partition": "natural", "min_size": 1}
    (tmp_path / "e.toml").write_text(
        tomli_w.dumps({"data": {"source": str(tmp_path / "d.json"), "user": "user"}, "clients": clients})
    )
    code, printed = command("check", tmp_path / "e.toml")
    assert code == 0
    assert_harmless(printed)
    assert {f"{ESCAPED}1 ", f"{ESCAPED}2 "} <= {row[: len(ESCAPED) + 2] for row in printed.splitlines()}
    assert printed.replace("\n", "").count(ESCAPED) > 3  # the labels too


def test_an_error_prints_hostile_file_names_escaped_on_one_line(command, tmp_path):
    code, printed = command("check", tmp_path / HOSTILE.replace("/", ""))
    assert code == 2 and printed.count("\n") == 1 and ESCAPED.replace("/", "") in printed
    assert_harmless(printed)


def test_the_live_output_prints_hostile_clients_and_reasons_escaped():
    printed = io.StringIO()
    live = Live(Console(file=printed, width=300), rounds=1)
    live.answered(ClientInfo(HOSTILE, 1, 1), f"the reason {HOSTILE}")
    assert printed.getvalue() == f"client {ESCAPED} rejected: the reason {ESCAPED}\n"


def test_a_note_of_the_server_is_printed_escaped(capsys):
    note(f"client {HOSTILE} joins")
    assert capsys.readouterr().out == f"client {ESCAPED} joins\n"
