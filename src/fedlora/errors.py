"""Errors reported to the user."""


class UserError(Exception):
    """Invalid user input. The message is one line: what was expected, what was found, what to do."""


class RunStopped(Exception):
    """A run cannot continue; all complete rounds are on disk. The message states the reason and what to do."""
