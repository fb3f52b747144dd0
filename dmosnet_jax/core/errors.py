"""Errors that a user can act on.

`main` and the command-line tools print such an error as one line and exit with its status; anything else is a defect of
ours and keeps its traceback.
"""

import errno
import reprlib
from collections.abc import Sequence

# What a system may refuse to any program; other codes, as a file that is not there, mean that we did not look.
_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


class UserError(Exception):
    """A problem with what the user gave: the message says what, where, the value and the fix, in one line."""

    exit_status = 1
    # Whether all processes of a job raise it together; elsewhere the one that does tells the others.
    everywhere = False


class ConfigError(UserError):
    """A command, flag or config field is wrong (exit status 2)."""

    exit_status = 2


class ArgumentError(ConfigError, ValueError):
    """A function was called with what it does not take; a ValueError too, as Python's own functions raise."""


class DataError(UserError):
    """A file, record, image or checkpoint is missing, damaged or of another kind (exit status 1)."""

    exit_status = 1


class LostProcessError(UserError):
    """Another process of the job failed, ended or can't be reached; the same command goes on (exit status 75)."""

    # EX_TEMPFAIL of <sysexits.h>.
    exit_status = 75


def refusal(error: OSError) -> DataError | None:
    """What to tell a user whose system refused to write or read a file; None where the error is not of that kind."""
    if error.errno not in _REFUSALS or error.filename is None:
        return None
    return DataError(f"{error.filename}: {error.strerror}: give another place, or make room there")


# Of names in one message, and characters of one that is shown.
_MOST_NAMES = 30
_MOST_CHARACTERS = 4_000


def first(parts: Sequence[str], *, join: str = "; ", most: int = _MOST_NAMES) -> str:
    """The first of many parts of a message, and how many there are more."""
    more = f"{join}and {len(parts) - most:,} more" if len(parts) > most else ""
    return join.join(parts[:most]) + more


def one_line(error: object) -> str:
    """A message as one line that a terminal can show: no control characters, and of a long one its two ends."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(error))
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"
    return text


def printable(text: object, limit: int = 120) -> str:
    """Text from an untrusted file as one short line of visible ASCII, fit for an error message."""
    # Containers may be nested deeper than Python recurses, or share parts so often that no memory holds their text.
    shown = reprlib.repr(text) if isinstance(text, (list, tuple, dict)) else str(text)
    # Only a slice is escaped: the text may be as long as the file.
    escaped = shown[:limit].encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."
