"""The command predict."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.cli.arguments import Client, Trained, UsageOverrides
from fedlora.cli.progress import warn
from fedlora.errors import UserError


def predict(
    path: Trained,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts, for a task that reads one column.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The examples, in place of TEXT; they need no targets.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write to this file instead of the terminal.")] = None,
    client: Client = None,
    overrides: UsageOverrides = None,
) -> None:
    """Predict labels, scores, tags, options or answers with a run's current adapter, an exported one or a merged model.

    The output has a JSON object in each line, in the order of the examples.
    """
    from fedlora.predicting import predict as predictions_of

    if bool(texts) == (data is not None):
        raise UserError(f"expected TEXT or --data FILE, found {'both' if texts else 'neither'}")
    rows: Any = texts if data is None else str(data)
    notify: Callable[[str], None] = lambda note: warn(note, "yellow")  # noqa: E731
    found = predictions_of(path, rows, client=client, overrides=overrides or (), notify=notify)
    lines = "".join(f"{_line(one)}\n" for one in found)
    if out is None:
        print(lines, end="")
        return
    try:
        out.write_text(lines, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another file with --out") from error


def _line(prediction: Mapping[str, Any]) -> str:
    """The prediction as JSON, in ASCII if it has characters that a terminal would interpret."""
    line = json.dumps(prediction, ensure_ascii=False)
    return line if line.isprintable() else json.dumps(prediction)
