"""A parent that does nothing but outlive the run: how one process of a job ends is always one line and a status.

JAX's own answer to a lost process is to abort every other one from a thread of its native code, with pages of text. No
exception handler sees that, but the parent does. It also ends a run that was told to stop and does not come to it.
"""

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from typing import IO, Any, NoReturn

from dmosnet_jax.core.errors import LostProcessError

_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_FROM_KERNEL = 0x80  # <bits/siginfo-consts.h>: SI_KERNEL
# The first line of a message of native code, and the files whose messages are told in our line instead.
_MESSAGE = re.compile(r"[IWEF]\d{4} [\d:.]+\s+\d+ (\S+?):\d+\]")
_OF_THE_JOB = re.compile(r"coordination_service|distributed|^client\.(h|cc)$|preemption|gloo")
_NOTE = "\0"
_supervised = False
_GOES_ON = "the same command on all hosts goes on from the last checkpoint"


def supervise(*, save_seconds: float) -> None:
    """Goes on in a child process; this one waits until it ends, and ends with its status. Nothing happens but on Linux.

    Args:
        save_seconds: how long the child may take to end after it was told to stop.
    """
    if sys.platform != "linux":
        return
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(writing)
        os._exit(_follow(child, reading, save_seconds))
    os.close(reading)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Python's messages and progress bars go where they always went; only what native code writes takes the pipe.
    own = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = os.fdopen(own, "w", buffering=1, errors="backslashreplace")
    global _supervised
    _supervised = True


def tell_hosts(hosts: list[str]) -> None:
    """Tells the parent, where there is one, on which host each process is, for its messages."""
    _tell({"hosts": hosts})


def tell_end(line: str, status: int) -> None:
    """Tells the parent, where there is one, how this process is about to end.

    Once the others know too, the service of process 0 may be gone first, and JAX aborts this process on its way.
    """
    _tell({"end": [line, status]})


def _tell(note: dict[str, Any]) -> None:
    if _supervised:
        os.write(2, f"{_NOTE}{json.dumps(note)}\n".encode())


class Relay(threading.Thread):
    """Passes on what native code writes, and keeps what it says about the job."""

    def __init__(self, source: IO[bytes], target: IO[str]):
        super().__init__(daemon=True)
        self._source, self._target = source, target
        self._held = False
        self.about_job = ""
        self.hosts: list[str] = []
        self.end: tuple[str, int] | None = None

    def run(self) -> None:
        """Reads until nobody can write any more."""
        for raw in self._source:
            self.take(raw.decode(errors="replace"))

    def take(self, line: str) -> None:
        """Passes a line on, unless it belongs to a message about the job."""
        if line.startswith(_NOTE):
            note = json.loads(line[len(_NOTE) :])
            self.hosts = note.get("hosts", self.hosts)
            self.end = note.get("end", self.end)
            return
        message = _MESSAGE.match(line)
        if message:
            self._held = bool(_OF_THE_JOB.search(message[1]))
        if self._held:
            self.about_job += line
        else:
            self._target.write(line)
            self._target.flush()


def _follow(child: int, reading: int, save_seconds: float) -> int:
    """Waits for the child; returns the status to end with, after its reason was printed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [*_FORWARDED, signal.SIGCHLD])
    with os.fdopen(reading, "rb") as source:
        relay = Relay(source, sys.stderr)
        relay.start()
        told: signal.Signals | None = None
        deadline = float("inf")
        while True:
            found = signal.sigtimedwait([*_FORWARDED, signal.SIGCHLD], 1.0)
            # The terminal's signals reach the child by themselves.
            if found is not None and found.si_signo in _FORWARDED and found.si_code != _FROM_KERNEL:
                os.kill(child, found.si_signo)
            if found is not None and found.si_signo in _FORWARDED and told is None:
                told, deadline = signal.Signals(found.si_signo), time.monotonic() + save_seconds
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                _, code = os.waitpid(child, 0)
                late = (
                    f"told to stop by {told.name if told else ''}, it did not save its state within {save_seconds:g} s"
                )
                _say(f"{late} (--save_seconds): {_GOES_ON}")
                return LostProcessError.exit_status
        # Worker processes may live a little longer, and keep the pipe open.
        relay.join(timeout=2)
    status = os.waitstatus_to_exitcode(code)
    if status >= 0:
        return status
    ended_by = signal.Signals(-status)
    if ended_by == signal.SIGABRT and relay.end is not None:
        line, status = relay.end
        _say(line)
        return status
    lost = describe_loss(relay.about_job, relay.hosts)
    if ended_by == signal.SIGABRT and lost:
        _say(lost)
        return LostProcessError.exit_status
    hint = ", often for want of memory" if ended_by == signal.SIGKILL else ""
    _say(f"the run was ended by {ended_by.name}{hint}: {_GOES_ON}")
    return 128 + ended_by


def describe_loss(text: str, hosts: list[str]) -> str | None:
    """One line about what JAX's coordination service says of lost processes; None where it says nothing of them."""
    if "distributed service detected fatal errors" not in text:
        return None
    silent = re.search(r"stopped sending heartbeats\):\s*((?:\S*\d+\s*\n)+)", text)
    numbers = [int(re.findall(r"\d+", task)[-1]) for task in silent[1].split()] if silent else [0]
    named = ", ".join(f"process {n}" + (f" on {hosts[n]}" if n < len(hosts) else "") for n in sorted(set(numbers)))
    said = "gave no sign of life any more" if silent else "can't be reached any more"
    return f"{named} {said}: it ended, or its host or the network did; {_GOES_ON}"


def _say(line: str) -> None:
    # A progress bar may stand unfinished in the last line.
    print(f"\nerror: {line}", file=sys.stderr, flush=True)


def leave(line: str, status: int) -> NoReturn:
    """Prints a line and ends this process at once, whatever its threads are blocked by."""
    _say(line)
    sys.stdout.flush()
    os._exit(status)
