"""Files that a command writes to start from."""

from pathlib import Path

from fedlora.errors import UserError
from fedlora.printable import printable


def write_new(file: Path, text: str, command: str) -> None:
    """Writes a file and prints its name; `command` followed by a name is the command that writes it.

    Raises:
        UserError: it exists, or cannot be written.
    """
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise UserError(f"{file}: already exists; give the name of a new file: {command} FILE") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    print(printable(str(file)))
