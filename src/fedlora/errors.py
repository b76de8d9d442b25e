"""The errors that a user meets."""


class UserError(Exception):
    """Something the user gave cannot be used. The message is one line: what was expected, what came, what to do."""


class RunStopped(Exception):
    """A run cannot go on; all complete rounds are on disk. The message says why and what to do."""
