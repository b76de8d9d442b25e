"""A place with a model, data and experiments, and the command."""

import json
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import CLIENTS, Command, write
from transformers import BertConfig

from fedlora import Experiment, run
from fedlora.cli.main import main

from tiny import WORDS, tiny_bert, tiny_model, tiny_rows


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a model, data, an experiment for them, and things that cannot be used."""
    place = tmp_path_factory.mktemp("cli")
    tiny_bert(place / "model")
    (place / "pickled").mkdir()
    (place / "pickled" / "config.json").write_text((place / "model" / "config.json").read_text())
    tiny_model(place / "no-tokenizer", BertConfig.from_pretrained(place / "model"))
    (place / "cut").mkdir()
    (place / "cut" / "config.json").write_text((place / "model" / "config.json").read_text())
    (place / "cut" / "model.safetensors").write_bytes((place / "model" / "model.safetensors").read_bytes()[:-9])
    tiny_bert(place / "five")
    tiny_model(place / "five", BertConfig.from_pretrained(place / "model", num_labels=5), head=True)
    tiny_rows(place / "rows.jsonl", 45)
    (place / "foreign.jsonl").write_text('{"text": "bab", "label": 3}\n')
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for name, text in (("long", " ".join(WORDS)), ("unknown", "qqq")):
        (place / f"{name}.jsonl").write_text("".join(json.dumps({**row, "text": text}) + "\n" for row in rows))
    (place / "empty.jsonl").write_text("")
    table = {"model": str(place / "model"), "data": str(place / "rows.jsonl"), "rounds": 2, "clients": CLIENTS}
    write(place / "good.toml", table)
    (place / "broken.toml").write_text("rounds = = 2\n")
    return place


@pytest.fixture(scope="session")
def by_python(place) -> Path:
    """The folder of a run that a program started with the same file."""
    return run(Experiment.model_validate(tomllib.loads((place / "good.toml").read_text())), place / "by python").folder


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[Command]:
    """Runs `fedlora` in this process; its exit code, what it printed, and its errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
            sys.exit(0)
        return (stopped.value.code or 0, *capsys.readouterr())

    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in signals.items():
        signal.signal(number, handler)  # after an interrupt they stay ignored
