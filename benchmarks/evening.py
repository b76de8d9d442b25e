"""A newcomer's evening: from a CSV file to a LaTeX table of four methods, with the steps and the minutes counted.

    python benchmarks/evening.py [TICKETS.csv] [--rows 300] [--rounds 5] [--clients 5] [--seeds 3] [--out DIR]

The CSV file has the columns `message` and `topic`; without one, invented tickets are written. The steps are those of a
user: commands, and edits of files. The defaults take a few minutes on two free cores.
"""

import argparse
import csv
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOPICS = {
    "billing": ("invoice", "refund", "payment", "price", "charged twice", "receipt"),
    "delivery": ("parcel", "courier", "late", "lost on the way", "tracking number", "wrong address"),
    "account": ("password", "login", "locked out", "e-mail address", "profile", "verification code"),
    "returns": ("broken", "send it back", "exchange", "wrong size", "damaged", "warranty"),
}
SENTENCES = ("my {a} is about the {b}", "please help with {a} and {b}", "the {a} again, and {b}", "{b}: nothing but {a}")
METHODS = ("fedit", "ffa-lora", "flexlora", "fedex-lora")
RATES = (3e-3, 1e-2)


def write_tickets(file: Path, rows: int) -> None:
    """Invented tickets: two words of the topic in a sentence."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(("message", "topic"))
        for _ in range(rows):
            topic = draw.choice(list(TOPICS))
            a, b = draw.sample(TOPICS[topic], 2)
            writer.writerow((draw.choice(SENTENCES).format(a=a, b=b), topic))


def edited(text: str, key: str, value: str) -> str:
    """The text of an experiment file with a new value; the key may be an example that is commented out."""
    changed, count = re.subn(rf"(?m)^#?{key} = .*$", f"{key} = {value}", text, count=1)
    if not count:
        raise SystemExit(f"the file of `fedlora init` has no key {key!r}")
    return changed


class Evening:
    """Steps in a directory, counted and timed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps, self.started = folder, 0, time.monotonic()

    def edit(self, name: str, text: str) -> None:
        """Writes a file."""
        self._step(f"edit {name}")
        (self.folder / name).write_text(text, encoding="utf-8")

    def fedlora(self, *words: str) -> None:
        """Runs a command of fedlora; one that fails ends the evening."""
        self._step(f"$ {shlex.join(['fedlora', *words])}")
        subprocess.run([sys.executable, "-m", "fedlora.cli", *words], cwd=self.folder, check=True)

    def _step(self, title: str) -> None:
        self.steps += 1
        print(f"\nstep {self.steps}, after {self.minutes:.1f} min: {title}", flush=True)

    @property
    def minutes(self) -> float:
        """Since the beginning."""
        return (time.monotonic() - self.started) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?", type=Path, help="tickets with the columns message and topic")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a new directory; by default a temporary one")
    given = parser.parse_args()
    folder = given.out or Path(tempfile.mkdtemp(prefix="evening-"))
    folder.mkdir(parents=True, exist_ok=True)
    tickets = given.csv.resolve() if given.csv else folder.resolve() / "tickets.csv"
    if given.csv is None:
        write_tickets(tickets, given.rows)

    evening = Evening(folder)
    evening.fedlora("init")
    text = (folder / "experiment.toml").read_text(encoding="utf-8")
    values = {"source": f'"{tickets}"', "text": '"message"', "label": '"topic"', "rows": given.rows, "count": given.clients}
    for key, value in {**values, "rounds": given.rounds, "every": given.rounds, "max_length": 32}.items():
        text = edited(text, key, str(value))
    evening.edit("experiment.toml", text)
    evening.fedlora("check", "experiment.toml")
    evening.edit(
        "sweep.toml",
        f"""\
base = "experiment.toml"
seeds = {list(range(given.seeds))}
axes.method.name = {list(METHODS)}
search.values.train.lr = {list(RATES)}
""",
    )
    evening.fedlora("sweep", "sweep.toml", "--dry-run")
    evening.fedlora("sweep", "sweep.toml", "--out", "methods")
    evening.fedlora("compare", "methods")
    evening.fedlora("compare", "methods", "--metric", "accuracy", "--format", "latex", "--out", "table.tex")
    print((folder / "table.tex").read_text(encoding="utf-8"))
    print(f"{evening.steps} steps, {evening.minutes:.1f} minutes; the table is {folder / 'table.tex'}")


if __name__ == "__main__":
    main()
