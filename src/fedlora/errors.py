"""The error that is the user's to mend."""


class UserError(Exception):
    """Something the user gave cannot be used. The message is one line: what was expected, what came, what to do."""
