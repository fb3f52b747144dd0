"""Vectors of sixteen floats for Numba, and Numba functions as calls of XLA's CPU programs.

LLVM does not vectorise a loop over many arrays, as it can't know that they do not overlap; so the kernels say the
vectors themselves. Addresses are int64 numbers of bytes, places behind them are counted in floats.

XLA hands a call one C struct (`xla/ffi/api/c_api.h`, a binary interface that it keeps stable), from which the kernel
reads the addresses and shapes of its arrays.
"""

# Numba reads the number of arguments off an intrinsic's own signature.
import contextlib
import contextvars
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from llvmlite import ir
from numba import cfunc, extending, types
from numba.core import cgutils
from numba.core.caching import FunctionCache

from dmosnet_jax.core.kernels import jit, thread_count

# Numba calls the decorated functions with a context that their callers do not give.
intrinsic: Any = extending.intrinsic

WIDTH = 16
SWITCH = "DMOSNET_CPU_KERNELS"
# More threads than this, or for less than this much of an array, cost more than they save.
_MOST_THREADS, _LEAST_FLOATS = 16, 1 << 15
# Pieces of a call's work for each thread.
_PIECES = 4
_FLOAT, _INT64, _INT32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_FLOAT, WIDTH)
_ZEROS = ir.Constant(_VECTOR, [0.0] * WIDTH)
# Offsets, in bytes, in XLA_FFI_CallFrame, in XLA_FFI_Buffer, and in XLA_FFI_Metadata_Extension and XLA_FFI_Metadata.
_EXTENSION, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 8, 72, 112, 160
_DATA, _RANK, _DIMENSIONS = 24, 32, 40
_METADATA, _MAJOR, _MINOR = 24, 24, 28
_IS_METADATA = 1  # XLA_FFI_Extension_Metadata, a kind of extension
_API_MAJOR, _API_MINOR = 0, 1


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _Vector()


@extending.register_model(_Vector)
class _VectorModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _pointer(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(address, builder.shl(index, ir.Constant(_INT64, 2))), kind.as_pointer())


@intrinsic
def load(typing, address, index):
    """The sixteen floats from `index` on."""

    def code(context, builder, signature, values):
        return builder.load(_pointer(builder, values[0], values[1], _VECTOR), align=4)

    return vector(types.int64, types.int64), code


@intrinsic
def spread(typing, address, index):
    """One float, sixteen times."""

    def code(context, builder, signature, values):
        one = builder.insert_element(
            _ZEROS, builder.load(_pointer(builder, values[0], values[1], _FLOAT), align=4), _INT32(0)
        )
        return builder.shuffle_vector(one, _ZEROS, ir.Constant(ir.VectorType(_INT32, WIDTH), [0] * WIDTH))

    return vector(types.int64, types.int64), code


@intrinsic
def store(typing, address, index, value):
    """Writes sixteen floats from `index` on."""

    def code(context, builder, signature, values):
        builder.store(values[2], _pointer(builder, values[0], values[1], _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), code


@intrinsic
def load_one(typing, address, index):
    """One float."""

    def code(context, builder, signature, values):
        return builder.load(_pointer(builder, values[0], values[1], _FLOAT), align=4)

    return types.float32(types.int64, types.int64), code


@intrinsic
def store_one(typing, address, index, value):
    """Writes one float."""

    def code(context, builder, signature, values):
        builder.store(values[2], _pointer(builder, values[0], values[1], _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), code


@intrinsic
def zeros(typing):
    """Sixteen zeros."""

    def code(context, builder, signature, values):
        return _ZEROS

    return vector(), code


@intrinsic
def add(typing, x, y):
    """`x + y`."""

    def code(context, builder, signature, values):
        return builder.fadd(*values)

    return vector(vector, vector), code


@intrinsic
def sub(typing, x, y):
    """`x - y`."""

    def code(context, builder, signature, values):
        return builder.fsub(*values)

    return vector(vector, vector), code


@intrinsic
def mul(typing, x, y):
    """`x * y`."""

    def code(context, builder, signature, values):
        return builder.fmul(*values)

    return vector(vector, vector), code


@intrinsic
def muladd(typing, x, y, z):
    """`x * y + z`, rounded once where the processor can."""

    def code(context, builder, signature, values):
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), values)

    return vector(vector, vector, vector), code


@intrinsic
def where_positive(typing, x, y):
    """`y` where `x > 0`, else 0; also `y` where x is not a number, so that it is seen."""

    def code(context, builder, signature, values):
        return builder.select(builder.fcmp_unordered(">", values[0], _ZEROS), values[1], _ZEROS)

    return vector(vector, vector), code


@intrinsic
def _word(typing, address):
    def code(context, builder, signature, values):
        return builder.load(builder.inttoptr(values[0], _INT64.as_pointer()))

    return types.int64(types.int64), code


@intrinsic
def _set_word(typing, address, value):
    def code(context, builder, signature, values):
        builder.store(values[1], builder.inttoptr(values[0], _INT64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _set_int32(typing, address, value):
    def code(context, builder, signature, values):
        builder.store(builder.trunc(values[1], _INT32), builder.inttoptr(values[0], _INT32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _start_thread(typing, handle, attributes, routine, task):
    def code(context, builder, signature, values):
        create = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_INT32, [_BYTES] * 4), "pthread_create")
        return builder.sext(builder.call(create, [builder.inttoptr(value, _BYTES) for value in values]), _INT64)

    return types.int64(*[types.int64] * 4), code


@intrinsic
def _take(typing, address):
    """The number there, and one more from now on, for one thread at a time."""

    def code(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_INT64, 1), "monotonic")

    return types.int64(types.int64), code


def _external(name: str, count: int) -> Any:
    """A function of the C library, of numbers and addresses, as one that kernels can call."""

    def code(context, builder, signature, values):
        kind = ir.FunctionType(_INT32, [_INT64] * count)
        return builder.sext(builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values), _INT64)

    kinds = types.int64(*[types.int64] * count)
    if count == 0:
        return extending.intrinsic(lambda typing: (kinds, code))
    if count == 1:
        return extending.intrinsic(lambda typing, a: (kinds, code))
    return extending.intrinsic(lambda typing, a, b, c: (kinds, code))


_this_core = _external("sched_getcpu", 0)
_allowed_cores = _external("sched_getaffinity", 3)
_make_attributes = _external("pthread_attr_init", 1)
_set_cores = _external("pthread_attr_setaffinity_np", 3)
_drop_attributes = _external("pthread_attr_destroy", 1)


@intrinsic
def _join_thread(typing, handle):
    def code(context, builder, signature, values):
        kind = ir.FunctionType(_INT32, [_INT64, _BYTES])
        join = cgutils.get_or_insert_function(builder.module, kind, "pthread_join")
        return builder.sext(builder.call(join, [values[0], ir.Constant(_BYTES, None)]), _INT64)

    return types.int64(types.int64), code


F = 4  # bytes of a float
# For functions that kernels call.
inlined = jit(error_model="numpy")


@inlined
def keep(memory):
    """Holds on to an array until here, of which a kernel knows the address alone."""
    return memory.size


@inlined
def clear(out, floats):
    """Zeros, by whole vectors."""
    for i in range(0, floats, WIDTH):
        store(out, i, zeros())


@jit()
def argument(frame: int, which: int) -> int:
    """Address of the description of a call's argument."""
    return _word(_word(frame + _ARGUMENTS) + 8 * which)


@jit()
def result(frame: int, which: int) -> int:
    """Address of the description of a call's result."""
    return _word(_word(frame + _RESULTS) + 8 * which)


@jit()
def length(array: int, axis: int) -> int:
    """Length of an axis of a described array."""
    return _word(_word(array + _DIMENSIONS) + 8 * axis)


@jit()
def data(array: int) -> int:
    """Address of the first element of a described array."""
    return _word(array + _DATA)


@intrinsic
def _run(typing, kernel, frame, start, stop):
    def code(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [_INT64] * 3)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


@jit()
def _run_pieces(task):
    """Pieces of a task `(kernel, frame, rows, pieces, the next piece)` until none is left."""
    rows, pieces = _word(task + 16), _word(task + 24)
    piece = _take(task + 32)
    while piece < pieces:
        _run(_word(task), _word(task + 8), rows * piece // pieces, rows * (piece + 1) // pieces)
        piece = _take(task + 32)


_KERNEL = types.void(types.int64, types.int64, types.int64)
_addresses = np.zeros(64, np.int64)
_kept: list[Any] = []


def kernel(function: Callable[[int, int, int], Any]) -> Any:
    """Compiles `function(frame, start, stop)` as a kernel, kept on disk where that can be; it must not raise.

    It works on the rows `start..stop` of its call's first argument.
    """
    try:
        return cfunc(_KERNEL, cache=True, error_model="numpy")(function)
    except Exception:
        # There may be no place to keep it, no room, or a damaged file, which must not be there for ever.
        with contextlib.suppress(Exception):
            FunctionCache(function).flush()
        return cfunc(_KERNEL, error_model="numpy")(function)


def place(number: int, compiled: Any) -> None:
    """Makes a compiled kernel the one that calls of this number run."""
    _kept.append(compiled)
    _addresses[number] = compiled.address


# Of a set of cores, and no less than a pthread_attr_t has.
_SET_BYTES = 128


def _knows_cores() -> bool:
    """Whether the C library can say on which cores a thread may run."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    return all(hasattr(library, name) for name in ("sched_getcpu", "sched_getaffinity", "pthread_attr_setaffinity_np"))


@jit()
def _elsewhere(memory):
    """Address of attributes of a thread that may run on the caller's cores but for the one that it is on now, or 0.

    Calls take some milliseconds; a thread that starts on the core of its caller, which is busy, would wait for as long.
    """
    cores, attributes = memory, memory + _SET_BYTES
    core = _this_core()
    if core < 0 or core >= 8 * _SET_BYTES or _allowed_cores(0, _SET_BYTES, cores) < 0:
        return 0
    word = cores + 8 * (core // 64)
    _set_word(word, _word(word) & ~(1 << (core % 64)))
    if _make_attributes(attributes) != 0:
        return 0
    if _set_cores(attributes, _SET_BYTES, cores) != 0:
        _drop_attributes(attributes)
        return 0
    return attributes


@functools.cache
def register(name: str, threads: int | None = None) -> str:
    """Makes a target for `jax.ffi.ffi_call` on CPUs, whose one attribute is the number of a kernel.

    Args:
        name: of the target. XLA keeps compiled programs on disk: another version of the kernels needs another name.
        threads: over which the rows of the first argument are shared out; all cores by default.

    Returns:
        The name.
    """
    most, table = min(thread_count(threads), _MOST_THREADS), _addresses.ctypes.data
    knows_cores = _knows_cores()

    @cfunc(types.int64(types.int64))
    def work(task):
        _run_pieces(task)
        return 0

    routine = work.address

    @cfunc(types.int64(types.int64))
    def call(frame):
        extension = _word(frame + _EXTENSION)
        if extension != 0 and _word(extension + 8) & 0xFFFFFFFF == _IS_METADATA:
            # XLA asks for the version of the interface when the target is registered.
            metadata = _word(extension + _METADATA)
            _set_int32(metadata + _MAJOR, _API_MAJOR)
            _set_int32(metadata + _MINOR, _API_MINOR)
            return 0
        kernel = _word(table + 8 * _word(_word(_word(_word(frame + _ATTRIBUTES)) + 8)))
        array = argument(frame, 0)
        rows, size = length(array, 0), 1
        for axis in range(_word(array + _RANK)):
            size *= length(array, axis)
        parts = max(min(most, rows, size // _LEAST_FLOATS), 1)
        # Threads take pieces until there are none: one that is held up does not hold up the others.
        memory = np.zeros(5 + parts + 2 * _SET_BYTES // 8, np.int64)
        task, handles = memory.ctypes.data, memory.ctypes.data + 40
        memory[0], memory[1], memory[2] = kernel, frame, rows
        memory[3] = min(rows, parts * _PIECES if parts > 1 else 1)
        other = 0
        if knows_cores and parts > 1:
            other = _elsewhere(handles + 8 * parts)
        # Threads of its own for each call: there are some hundred calls in a step that takes seconds.
        started = 1
        while started < parts:
            if _start_thread(handles + 8 * started, other, routine, task) == 0:
                started += 1
            elif other != 0:
                # There may be no other core.
                _drop_attributes(other)
                other = 0
            else:
                break
        if other != 0:
            _drop_attributes(other)
        _run_pieces(task)
        for part in range(1, started):
            _join_thread(memory[5 + part])
        return 0

    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    _kept.extend((work, call))
    jax.ffi.register_ffi_target(name, capsule(call.address, None, None), platform="cpu")
    return name


_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Programs that are traced inside call no kernels of this process, so that they can run elsewhere."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def available() -> bool:
    """Whether programs may call Numba kernels: one CPU device, an LP64 Unix, and `DMOSNET_CPU_KERNELS` is not 0.

    Over several devices XLA could not divide a call.
    """
    if _PORTABLE.get():
        return False
    supported = sys.maxsize > 2**32 and os.name == "posix" and os.environ.get(SWITCH, "1") != "0"
    return supported and jax.default_backend() == "cpu" and jax.device_count() == 1
