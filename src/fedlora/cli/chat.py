"""The command chat."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedlora.cli.arguments import Client, Trained, UsageOverrides
from fedlora.cli.progress import warn
from fedlora.errors import UserError
from fedlora.printable import printable

if TYPE_CHECKING:
    from fedlora.chatting import Chat, Turn

_HELP = """\
/base     talk to the model before training
/trained  talk to the trained model
/forget   begin a new conversation
/help     show this list
Ctrl-C stops an answer, Ctrl-D leaves."""
_MODES = {"/base": True, "/trained": False}


def chat(
    path: Trained,
    client: Client = None,
    base: Annotated[bool, typer.Option("--base", help="Begin with the model before training; /trained switches.")] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sample answers with this temperature; with 0 they are greedy.")
    ] = 0.0,
    overrides: UsageOverrides = None,
) -> None:
    """Talk to a fine-tuned language model in the terminal, or answer the lines of standard input.

    Questions have the form in which the model was trained: with the chat template, or as prompts.
    """
    from fedlora.chatting import Chat

    with Console(stderr=True).status("loading the model"):
        opened = Chat.open(path, client, overrides or ())
    for note in opened.notes:
        warn(note, "yellow")
    if base:
        _require_base(opened)
    if sys.stdin.isatty():
        alone = "" if opened.remembers else "each question is answered on its own, as in training; "
        warn(f"{alone}/help lists the commands", "yellow")
    _converse(opened, base, temperature)


def _converse(opened: "Chat", base: bool, temperature: float) -> None:
    """Answers one line after the other, until the input ends."""
    history: list[Turn] = []
    while (line := _next_line("base> " if base else "> ")) is not None:
        try:
            if line in _MODES:
                if _MODES[line]:
                    _require_base(opened)
                base, history = _MODES[line], []
            elif line == "/forget":
                history = []
            elif line == "/help":
                print(_HELP)
            elif line.strip():
                history.append((line, _answer(opened, line, history, base, temperature)))
        except UserError as error:
            warn(f"error: {error}", "red")


def _answer(opened: "Chat", line: str, history: "list[Turn]", base: bool, temperature: float) -> str:
    """Prints the answer as it is generated, up to an interrupt."""
    interrupted = False

    def stop(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    def show(piece: str) -> None:
        sys.stdout.write("\n".join(printable(line.expandtabs(4)) for line in piece.split("\n")))
        sys.stdout.flush()

    with _on_interrupt(stop):
        found = opened.answer(line, history, base=base, temperature=temperature, on_text=show, stopped=lambda: interrupted)
    print()
    return found


def _next_line(prompt: str) -> str | None:
    """The next line, None at the end of the input; an interrupt discards what was typed."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    import readline  # noqa: F401 - gives `input` editing and earlier lines

    while True:
        try:
            with _on_interrupt(signal.default_int_handler):
                return input(prompt)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()


def _require_base(opened: "Chat") -> None:
    if not opened.adapter:
        raise UserError("the model before training is not known: this is a merged model; use the run or the adapter")


@contextmanager
def _on_interrupt(handler: Callable[..., Any]) -> Iterator[None]:
    """Handles Ctrl-C in this way."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
