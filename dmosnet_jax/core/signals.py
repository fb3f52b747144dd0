"""SIGINT and SIGTERM: a command stops at the first one within a second, or says what it finishes first.

Python runs a signal's handler in the main thread, when that is back from compiled code (a compilation of XLA takes half
a minute), and loses the handler's exception where it interrupts a callback of the garbage collector, such as JAX's. So
a thread watches too: it repeats a signal that was lost, and ends the process where the main thread does not come back.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from dmosnet_jax.core import files

_STOPPING = (signal.SIGINT, signal.SIGTERM)
# Seconds: between two looks of the thread, until it ends the process, and that clean-up may take.
_LOOK, _AT_ONCE, _CLEAN_UP = 0.1, 1.0, 60.0
# Functions whose exceptions their callers print and drop; and the pipe of `startup`, whose caller would take
# what was written for not written, and write it again.
_CALLBACKS = {"_xla_gc_callback", "__del__"}
_WRITING = "_Lasting.write"


class StoppedExit(SystemExit):
    """SIGTERM, where nothing is finished first."""


class _State:
    """What handler and thread know of each other."""

    def __init__(self) -> None:
        self.message = "interrupted"
        self.raised = False
        # What is done before a noted signal acts; empty where signals act at once.
        self.finishing = ""
        # What was finished first is done, and the command ends by an error of its own.
        self.heeded = False
        # Signals of our own that are still to be seen by the thread.
        self.repeats = 0
        self.installed = False
        # What `uninstall` undoes: earlier handlers, the thread, and the end of its pipe that signals write to.
        self.handlers: dict[int, Any] = {}
        self.thread: threading.Thread | None = None
        self.sink = -1


_state = _State()


def install(message: str) -> None:
    """Begins to watch; only in a command's main thread.

    Args:
      message: what is printed where the process is ended without coming back.
    """
    _state.message = message
    if _state.installed or threading.current_thread() is not threading.main_thread():
        return
    _state.installed = True
    for number in _STOPPING:
        # A shell starts background jobs with SIGINT ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            _state.handlers[number] = signal.signal(number, _interrupt)
    source, _state.sink = os.pipe()
    os.set_blocking(_state.sink, False)
    signal.set_wakeup_fd(_state.sink, warn_on_full_buffer=False)
    _state.thread = threading.Thread(target=_watch, args=(source,), name="signals", daemon=True)
    _state.thread.start()


def uninstall() -> None:
    """Ends the watch, so that the process can be forked: the child would have no thread, and share its pipe."""
    if not _state.installed:
        return
    signal.set_wakeup_fd(-1)
    for number, handler in _state.handlers.items():
        signal.signal(number, handler)
    os.close(_state.sink)
    assert _state.thread is not None
    _state.thread.join()
    vars(_state).update(vars(_State()))


def end_with_parent(end: Callable[[], Any] = lambda: os._exit(1)) -> None:
    """In a worker process: `end` ends it once the process that started it is gone, however that one ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        end()

    threading.Thread(target=follow, daemon=True).start()


def finish_first(what: str) -> None:
    """From now on somebody else's handler notes signals, and `what` is done before they act; empty: no more."""
    _state.finishing = what


def heeded() -> None:
    """What is finished first is done, and the caller ends the command by an error that says so."""
    _state.heeded = True


def leave(status: int) -> None:
    """Ends a command that a signal has stopped; the threads of libraries may not survive an orderly end."""
    if not _state.installed:
        sys.exit(status)
    files.discard_unfinished()
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_name in _CALLBACKS or frame.f_code.co_qualname == _WRITING:
            # The thread repeats it.
            return
        frame = frame.f_back
    if _state.raised:
        return
    _state.raised = True
    if number == signal.SIGTERM:
        raise StoppedExit(128 + number)
    raise KeyboardInterrupt


def _watch(source: int) -> None:
    first, since, told = 0, 0.0, False
    while True:
        ready, _, _ = select.select([source], [], [], _LOOK if first else None)
        numbers = os.read(source, 64) if ready else b""
        if ready and not numbers:
            os.close(source)
            return
        for number in numbers:
            if number not in _STOPPING or signal.getsignal(number) is signal.SIG_IGN:
                continue
            if _state.repeats:
                _state.repeats -= 1
            elif first:
                _end(first)
            else:
                first, since = number, time.monotonic()
        waited = time.monotonic() - since
        if not first:
            continue
        if _state.heeded:
            if waited > _CLEAN_UP:
                _end(first)
        elif _state.finishing:
            if waited >= _AT_ONCE and not told:
                told = True
                _say(1, f"{signal.Signals(first).name}: finishes {_state.finishing}; a second signal stops it at once")
        elif not _state.raised and waited < _AT_ONCE:
            _state.repeats += 1
            # A real one, which also ends a wait of the main thread.
            signal.pthread_kill(threading.main_thread().ident or 0, first)
        elif not _state.raised or waited > _CLEAN_UP:
            _end(first)
        elif waited >= _AT_ONCE and not told:
            told = True
            _say(2, f"{signal.Signals(first).name}: cleans up first; a second signal stops it at once")


def _end(number: int) -> None:
    _say(2, f"error: {_state.message}")
    files.discard_unfinished()
    os._exit(128 + number)


def _say(handle: int, text: str) -> None:
    # Not by `print`: the main thread may hold the stream's lock.
    with contextlib.suppress(OSError):
        os.write(handle, f"{text}\n".encode())
