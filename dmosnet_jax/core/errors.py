"""Errors that a user can act on.

`main` and the command-line tools print such an error as one line and exit with its status; anything else is a defect of
ours and keeps its traceback.
"""


class UserError(Exception):
    """A problem with what the user gave: the message says what, where, the value and the fix, in one line."""

    exit_status = 1


class ConfigError(UserError):
    """A command, flag or config field is wrong (exit status 2)."""

    exit_status = 2


class DataError(UserError):
    """A file, record, image or checkpoint is missing, damaged or of another kind (exit status 1)."""

    exit_status = 1
