"""What a server tells about a run while it goes on: lines of a file, which whoever shows the progress reads."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.messages import ClientInfo, Round
from fedlora.rounds.progress import Progress
from fedlora.runs.folder import DEPLOY

NAME = "journal.jsonl"


class EventLog:
    """Writes the lines. The last one says how the run ended: done, stopped or unusable."""

    def __init__(self, run: Path) -> None:
        self._file = run / DEPLOY / NAME
        self._file.parent.mkdir(exist_ok=True)

    def write(self, **line: Any) -> None:
        """Adds a line."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def notify(self, message: str) -> None:
        """A line for a person."""
        self.write(notified=message)

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """The cohort."""
        self.write(round=asdict(rnd), chosen=[asdict(client) for client in chosen])

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """One client's answer."""
        self.write(answered=asdict(client), rejected=rejected)

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """The round's row."""
        self.write(row=dict(row))

    def ended(self, how: str, why: str = "") -> None:
        """The end."""
        self.write(ended=how, why=why)


class Reader:
    """Reads what a journal has had since it was opened, and shows it."""

    def __init__(self, run: Path, progress: Progress, say: Any) -> None:
        self._file, self._watch, self._say = run / DEPLOY / NAME, progress, say
        self._at = self._file.stat().st_size if self._file.exists() else 0
        self.changed = time.monotonic()
        self._end: tuple[str, str] | None = None

    def show(self) -> tuple[str, str] | None:
        """Shows the new lines; how and why the run ended, if it has, also when it is asked again."""
        for line in self._lines():
            self.changed = time.monotonic()
            match line:
                case {"notified": message}:
                    self._say(message)
                case {"round": rnd, "chosen": chosen}:
                    self._watch.round_started(Round(**rnd), [ClientInfo(**client) for client in chosen])
                case {"answered": client, "rejected": rejected}:
                    self._watch.answered(ClientInfo(**client), rejected)
                case {"row": row}:
                    self._watch.round_ended(row)
                case {"ended": how, "why": why}:
                    self._end = how, why
        return self._end

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if line.endswith(b"\n"):
                    self._at += len(line)
                    yield json.loads(line)
