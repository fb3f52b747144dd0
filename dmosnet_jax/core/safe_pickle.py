"""Pickles from anywhere, read as data: an interpreter that can run nothing.

`pickle.Unpickler` imports and calls what a stream names, and allocates what it declares (a memo index of 2**31 is
gigabytes in its C implementation), so filtering its `find_class` is not enough for files of strangers. Here the
standard library only splits the stream into opcodes (`pickletools.genops`, which executes nothing), and the opcodes are
carried out on plain lists and dicts. A name in the stream becomes a `Global`, a call becomes whatever the `Vocabulary`
makes of it, and nothing is imported or called on the stream's behalf. Memory and time are linear in its length, and
containers, which cost the most for a byte, may only be so many of it.
"""

import dataclasses
import io
import os
import pickletools
import struct
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError, printable

# The largest public re-ID checkpoints (a ResNet50 trainer state with its optimiser) have about 30,000 opcodes.
MAX_OPCODES = 5_000_000
# Two for each of LUPerson's 4.18 million names, and as much again.
MAX_PLAIN_OPCODES = 20_000_000
# An empty container takes one byte in the stream and 64 in memory; a tensor has seven of them in fifty bytes.
_FREE_CONTAINERS, _BYTES_PER_CONTAINER = 100_000, 4
# LUPerson's names with their scores take some 200 MB.
_MAX_PLAIN_BYTES = 2**30
# Torch's magic number, the longest integer that a checkpoint needs, has 77 bits; huge ones make hashing slow.
_MAX_INTEGER_BITS = 256
_MAX_TUPLE_KEY = 16
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_VALUES = {*_INTEGERS, *_TEXTS, "FLOAT", "BINFLOAT"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
_CONTAINERS = {
    *("EMPTY_LIST", "EMPTY_SET", "EMPTY_DICT", "MARK", "LIST", "DICT", "FROZENSET"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
_ENCODE = "_codecs.encode"
# What `genops` and a stack machine fed with nonsense raise; anything else is a defect of ours.
_MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError, struct.error)


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the stream names, as `module.name`; never the thing itself."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """What the stream would have built by calling `name`: kept as a mark that something stood there."""

    name: str


class Vocabulary(Protocol):
    """What the names in a stream mean; every method returns data or raises `DataError`."""

    def resolve(self, name: str) -> Global:
        """Returns the inert stand-in for `module.name`, or refuses it."""

    def call(self, function: Global, arguments: Sequence[Any]) -> Any:
        """Returns what calling `function` stands for."""

    def persistent(self, identifier: Any) -> Any:
        """Returns what a persistent identifier stands for."""


def interpret(
    stream: BinaryIO,
    vocabulary: Vocabulary,
    where: str,
    *,
    kind: str = "a weights file",
    max_opcodes: int | None = None,
) -> Any:
    """Reads one pickle (any protocol up to 5) and leaves the stream behind its end.

    Args:
        stream: seekable bytes in memory; a pickle starts at its position.
        vocabulary: the meaning of globals, calls and persistent identifiers.
        where: the file, for messages.
        kind: what the file should be, for messages.
        max_opcodes: a longer pickle is refused; None: `MAX_OPCODES`.

    Returns:
        None, bool, int, float, str, bytes, list (also for sets), tuple, dict, `Global`, `Opaque` and what `vocabulary`
        returns, nested; objects that occur more than once are shared. Dict entries whose key is not a scalar, a short
        flat tuple or a global are dropped.

    Raises:
        DataError: not a pickle, damaged, too long, or refused by the vocabulary.
    """
    machine = _Machine(vocabulary, where)
    limit = MAX_OPCODES if max_opcodes is None else max_opcodes
    begin, containers = stream.tell(), 0
    most = _FREE_CONTAINERS + (stream.seek(0, io.SEEK_END) - begin) // _BYTES_PER_CONTAINER
    stream.seek(begin)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            containers += opcode.name in _CONTAINERS
            if count >= limit:
                raise DataError(f"{where}: the pickle has more than {limit:,} opcodes; this is not {kind}")
            if containers > most:
                raise DataError(f"{where}: the pickle is made of containers alone; this is not {kind}")
            if opcode.name == "STOP":
                return machine.pop()
            if not machine.carry_out(opcode.name, argument):
                raise DataError(f"{where}: pickle opcode {opcode.name} at byte {position} has no place in {kind}")
    except _MALFORMED as error:
        raise DataError(f"{where}: damaged pickle ({printable(error)}); copy or download the file again") from error
    raise DataError(f"{where}: damaged pickle (no end mark); copy or download the file again")


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
        content = files.read(path, most=_MAX_PLAIN_BYTES)
    except OSError as error:
        raise DataError(f"{where}: can't be read ({error.strerror}): give the path of a pickle file") from error
    vocabulary = PlainVocabulary(where)
    return interpret(io.BytesIO(content), vocabulary, where, kind="a file of plain data", max_opcodes=max_opcodes)


class _Machine:
    """The stack, the marks and the memo of the pickle virtual machine."""

    def __init__(self, vocabulary: Vocabulary, where: str):
        self._vocabulary, self._where = vocabulary, where
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """Takes the topmost value."""
        return self._stack.pop()

    def carry_out(self, opcode: str, argument: Any) -> bool:
        """Carries out an opcode; False where it has no place in data."""
        if opcode in _INTEGERS and argument.bit_length() > _MAX_INTEGER_BITS:
            raise self._damaged(f"an integer of {argument.bit_length()} bits")
        match opcode:
            case _ if opcode in _VALUES:
                self._push(argument)
            case _ if opcode in _BYTES:
                self._push(bytes(argument))
            case _ if opcode in _EMPTY:
                self._push(_EMPTY[opcode]())
            case "PROTO" | "FRAME":
                pass

            # Stack, marks and memo.
            case "MEMOIZE" | "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self._push(self._memo[argument])
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "POP" if self._stack:
                self.pop()
            case "POP" | "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                self._push(self._stack[-1])

            # Containers.
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(opcode[-1]))]
                self._push(tuple(reversed(items)))
            case "TUPLE" | "FROZENSET":
                self._push(tuple(self._pop_to_mark()))
            case "LIST":
                self._push(self._pop_to_mark())
            case "DICT":
                items = self._pop_to_mark()
                self._push({})
                self._set_items(items)
            case "APPEND":
                self._extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())

            # Names, and calls of what was named.
            case "GLOBAL":
                self._push(self._resolve(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self._push(self._resolve(module, name))
            case "INST":
                arguments = self._pop_to_mark()
                self._call(self._resolve(*argument.split(" ", 1)), arguments)
            case "OBJ":
                function, *arguments = self._pop_to_mark()
                self._call(function, arguments)
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                self._call(function, arguments)
            case "NEWOBJ_EX":
                _keywords, arguments, function = self.pop(), self.pop(), self.pop()
                self._call(function, arguments)
            case "BUILD":
                # The state would go to __setstate__ or __dict__: neither exists here, and no tensor lives there.
                self.pop()
                if not self._stack:
                    raise self._damaged("sets the state of nothing")
            case "BINPERSID":
                self._push(self._vocabulary.persistent(self.pop()))
            case _:
                return False
        return True

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _damaged(self, problem: str) -> DataError:
        return DataError(f"{self._where}: damaged pickle ({problem}); copy or download the file again")

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global):
            raise self._damaged(f"calls a {type(function).__name__}")
        if not isinstance(arguments, (list, tuple)):
            raise self._damaged(f"calls {printable(function.name)} without an argument tuple")
        self._push(self._vocabulary.call(function, arguments))

    def _resolve(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise self._damaged("names a global by something else than text")
        return self._vocabulary.resolve(f"{module}.{name}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise self._damaged(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _is_key(key):
                target[key] = value

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Opaque):
            return
        if not isinstance(target, list):
            raise self._damaged(f"appends to a {type(target).__name__}")
        target.extend(items)


def _is_key(key: Any) -> bool:
    """Whether hashing `key` is cheap and safe: hashing a deep tuple recurses on the C stack without a limit."""
    if isinstance(key, tuple):
        return (
            len(key) <= _MAX_TUPLE_KEY and not any(isinstance(item, tuple) for item in key) and all(map(_is_key, key))
        )
    return key is None or isinstance(key, (str, bytes, bool, int, float, Global, Opaque))
