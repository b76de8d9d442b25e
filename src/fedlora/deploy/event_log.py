"""Events of a run in progress, as lines of a file that the server writes and the progress display reads."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.messages import ClientInfo, Round
from fedlora.rounds.progress import Progress
from fedlora.rounds.row import RoundRow, from_json, to_json
from fedlora.runs.folder import DEPLOY

NAME = "events.jsonl"


class EventLog:
    """Writes the events. The last one has the result of the run: done, stopped or unusable."""

    def __init__(self, run: Path) -> None:
        self._file = run / DEPLOY / NAME
        self._file.parent.mkdir(exist_ok=True)

    def write(self, **line: Any) -> None:
        """Appends an event."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def notify(self, message: str) -> None:
        """Appends a message for the user."""
        self.write(notified=message)

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Appends the cohort."""
        self.write(
            round={"index": rnd.index, "seed": rnd.seed, "attempt": rnd.attempt},
            chosen=[asdict(client) for client in chosen],
        )

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """Appends that a client's result arrived."""
        self.write(answered=asdict(client), rejected=rejected)

    def round_ended(self, row: RoundRow) -> None:
        """Appends the round's row."""
        self.write(row=to_json(row))

    def ended(self, how: str, why: str = "") -> None:
        """Appends the end of the run."""
        self.write(ended=how, why=why)


class Reader:
    """Reads the events written since the log was opened, and shows them."""

    def __init__(self, run: Path, progress: Progress, notify: Callable[[str], None]) -> None:
        self._file, self._progress, self._notify = run / DEPLOY / NAME, progress, notify
        self._offset = self._file.stat().st_size if self._file.exists() else 0
        self.changed = time.monotonic()
        self._end: tuple[str, str] | None = None

    def show(self) -> tuple[str, str] | None:
        """Shows the new events; returns the run's result and reason, also on later calls; None while the run continues."""
        for line in self._lines():
            self.changed = time.monotonic()
            match line:
                case {"notified": message}:
                    self._notify(message)
                case {"round": rnd, "chosen": chosen}:
                    self._progress.round_started(Round(**rnd), [ClientInfo(**client) for client in chosen])
                case {"answered": client, "rejected": rejected}:
                    self._progress.answered(ClientInfo(**client), rejected)
                case {"row": row}:
                    self._progress.round_ended(from_json(row))
                case {"ended": how, "why": why}:
                    self._end = how, why
        return self._end

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if line.endswith(b"\n"):
                    self._offset += len(line)
                    yield json.loads(line)
