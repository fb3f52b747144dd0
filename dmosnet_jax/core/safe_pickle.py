"""Pickles from anywhere, read as data: an interpreter that can run nothing.

`pickle.Unpickler` imports and calls what a stream names, and allocates what it declares (a memo index of 2**31 is
gigabytes in its C implementation), so filtering its `find_class` is not enough for files of strangers. Here the
standard library only splits the stream into opcodes (`pickletools.genops`, which executes nothing), and the opcodes are
carried out on plain lists and dicts. A name in the stream becomes a `Global`, a call becomes whatever the `Vocabulary`
makes of it, and nothing is imported or called on the stream's behalf. Memory and time are linear in its length.
"""

import dataclasses
import io
import os
import pathlib
import pickletools
import struct
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol

from dmosnet_jax.core.errors import DataError, printable

# The largest public re-ID checkpoints (a ResNet50 trainer state with its optimiser) have about 30,000 opcodes.
MAX_OPCODES = 5_000_000
# Two for each of LUPerson's 4.18 million names, and as much again.
MAX_PLAIN_OPCODES = 20_000_000
# Torch's magic number, the longest integer that a checkpoint needs, has 77 bits; huge ones make hashing slow.
_MAX_INTEGER_BITS = 256
_MAX_TUPLE_KEY = 16
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
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count >= limit:
                raise DataError(f"{where}: the pickle has more than {limit:,} opcodes; this is not {kind}")
            if opcode.name == "STOP":
                return machine.pop()
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise DataError(f"{where}: pickle opcode {opcode.name} at byte {position} has no place in {kind}")
            handler(machine, argument)
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
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{where}: can't be read ({error.strerror}): give the path of a pickle file") from error
    vocabulary = PlainVocabulary(where)
    return interpret(io.BytesIO(content), vocabulary, where, kind="a file of plain data", max_opcodes=max_opcodes)


class _Machine:
    """The stack, the marks and the memo of the pickle virtual machine."""

    def __init__(self, vocabulary: Vocabulary, where: str):
        self.vocabulary = vocabulary
        self.where = where
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def fail(self, problem: str) -> DataError:
        return DataError(f"{self.where}: damaged pickle ({problem}); copy or download the file again")

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global):
            raise self.fail(f"calls a {type(function).__name__}")
        if not isinstance(arguments, (list, tuple)):
            raise self.fail(f"calls {printable(function.name)} without an argument tuple")
        self.push(self.vocabulary.call(function, arguments))

    def resolve(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise self.fail("names a global by something else than text")
        return self.vocabulary.resolve(f"{module}.{name}")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise self.fail(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _is_key(key):
                target[key] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Opaque):
            return
        if not isinstance(target, list):
            raise self.fail(f"appends to a {type(target).__name__}")
        target.extend(items)


def _is_key(key: Any) -> bool:
    """Whether hashing `key` is cheap and safe: hashing a deep tuple recurses on the C stack without a limit."""
    if isinstance(key, tuple):
        return (
            len(key) <= _MAX_TUPLE_KEY and not any(isinstance(item, tuple) for item in key) and all(map(_is_key, key))
        )
    return key is None or isinstance(key, (str, bytes, bool, int, float, Global, Opaque))


def _integer(machine: _Machine, value: int) -> None:
    if value.bit_length() > _MAX_INTEGER_BITS:
        raise machine.fail(f"an integer of {value.bit_length()} bits")
    machine.push(value)


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _empty(factory: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(factory())


def _short_tuple(size: int) -> Callable[[_Machine, Any], None]:
    def handler(machine: _Machine, _: Any) -> None:
        items = [machine.pop() for _ in range(size)]
        machine.push(tuple(reversed(items)))

    return handler


def _nothing(machine: _Machine, _: Any) -> None:
    """Framing and protocol numbers carry no data."""


def _mark(machine: _Machine, _: Any) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.pop()
    else:
        machine.pop_to_mark()


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.pop_to_mark()


def _dict(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    result: dict[Any, Any] = {}
    machine.set_items(result, items)
    machine.push(result)


def _append(machine: _Machine, _: Any) -> None:
    item = machine.pop()
    machine.extend(machine.stack[-1], [item])


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    machine.extend(machine.stack[-1], items)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _set_items(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    machine.set_items(machine.stack[-1], items)


def _put(machine: _Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _global(machine: _Machine, argument: str) -> None:
    machine.push(machine.resolve(*argument.split(" ", 1)))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.resolve(module, name))


def _instance(machine: _Machine, argument: str) -> None:
    arguments = machine.pop_to_mark()
    machine.call(machine.resolve(*argument.split(" ", 1)), arguments)


def _object(machine: _Machine, _: Any) -> None:
    function, *arguments = machine.pop_to_mark()
    machine.call(function, arguments)


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, arguments)


def _new_object_with_keywords(machine: _Machine, _: Any) -> None:
    _keywords, arguments, function = machine.pop(), machine.pop(), machine.pop()
    machine.call(function, arguments)


def _build(machine: _Machine, _: Any) -> None:
    # The state would go to __setstate__ or __dict__: neither exists here, and no tensor of a state dict lives there.
    machine.pop()
    if not machine.stack:
        raise machine.fail("sets the state of nothing")


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _integer),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.push),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), lambda m, data: m.push(bytes(data))),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE1": _short_tuple(1),
    "TUPLE2": _short_tuple(2),
    "TUPLE3": _short_tuple(3),
    "EMPTY_LIST": _empty(list),
    "EMPTY_SET": _empty(list),
    "EMPTY_DICT": _empty(dict),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "FROZENSET": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _instance,
    "OBJ": _object,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_keywords,
    "BUILD": _build,
    "BINPERSID": lambda machine, _: machine.push(machine.vocabulary.persistent(machine.pop())),
    "PROTO": _nothing,
    "FRAME": _nothing,
}
