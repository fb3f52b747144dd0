"""Pickle files of plain data, such as lists of names, read as data: see `inert_pickle`."""

import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.inert_pickle import Global, interpret, printable

# Two for each of LUPerson's 4.18 million names, and as much again.
MAX_PLAIN_OPCODES = 20_000_000
_ENCODE = "_codecs.encode"


class PlainVocabulary:
    """Nothing but containers, numbers and text: what a list of names is made of. Every name is refused.

    The one call understood is the spelling of bytes by protocols below 3, `_codecs.encode(text, "latin1")`.
    """

    def __init__(self, where: str):
        self.where = where

    def resolve(self, name: str) -> Global:
        """Refuses every name but that of the spelling of bytes."""
        if name == _ENCODE:
            return Global(name)
        raise DataError(
            f"{self.where}: refused, nothing was run: the pickle refers to '{printable(name)}', which has no place in "
            "plain data; save the names as a text file, one a line"
        )

    def call(self, function: Global, arguments: Sequence[Any]) -> bytes:
        """Returns the bytes that are spelled as text."""
        if len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1"):
            try:
                return arguments[0].encode("latin1")
            except UnicodeEncodeError:
                pass
        raise DataError(
            f"{self.where}: damaged pickle (a call of {function.name} that spells no bytes); copy the file again"
        )

    def persistent(self, identifier: Any) -> Any:
        """Refuses references to things outside of the pickle."""
        raise DataError(f"{self.where}: refused: the pickle refers to '{printable(identifier)}' outside of itself")


def read_plain(path: str | os.PathLike[str], *, max_opcodes: int = MAX_PLAIN_OPCODES) -> Any:
    """Reads a pickle file of plain data, such as a list of names or a dict of lists; nothing in it is ever run.

    Args:
        path: the file.
        max_opcodes: a longer pickle is refused; a name takes two.

    Returns:
        None, bool, int, float, str, bytes, list (also for sets), tuple and dict, nested.

    Raises:
        DataError: the file can't be read, is no pickle, is damaged, or holds anything else than plain data.
    """
    where = os.fspath(path)
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{where}: can't be read ({error.strerror}): give the path of a pickle file") from error
    vocabulary = PlainVocabulary(where)
    return interpret(io.BytesIO(content), vocabulary, where, kind="a file of plain data", max_opcodes=max_opcodes)
