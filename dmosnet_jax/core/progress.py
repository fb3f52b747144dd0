"""What a program says of a compilation, before a bar can show a rate."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm

# A compilation that is over sooner, as one from the cache is, goes without a word.
_QUIET_SECONDS = 2.0


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says on process 0 that `what` is being compiled, and then how long it took, where it takes more than a moment.

    What it encloses must compile and return, as the first call of a jitted function does: it does not wait for results.
    """
    since, told = time.monotonic(), threading.Event()

    def tell() -> None:
        told.set()
        _write(f"compiling {what} ...")

    timer = threading.Timer(_QUIET_SECONDS, tell)
    timer.daemon = True
    if jax.process_index() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if timer.ident is not None:
            # It may be writing.
            timer.join()
    if told.is_set():
        _write(f"compiled in {time.monotonic() - since:.0f} s")


def announced(program: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A jitted function whose first call, which compiles it, goes through `compiling`."""
    is_compiled = False

    def call(*arguments: Any) -> Any:
        nonlocal is_compiled
        if is_compiled:
            return program(*arguments)
        with compiling(what):
            result = program(*arguments)
        is_compiled = True
        return result

    return call


def _write(text: str) -> None:
    """A line beside the bars that stand in the terminal."""
    tqdm.write(text)
    sys.stdout.flush()
