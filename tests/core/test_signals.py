"""Signals, sent to programs that are busy in Python, in compiled code, or in a callback that loses exceptions."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time, zlib
from dmosnet_jax.core import files, signals, startup
startup.outlast_readers()
signals.install("interrupted; go on")
def ready():
    print("ready", flush=True)
mode = sys.argv[1]
try:
    if mode == "python":
        ready()
        while True:
            sum(range(100))
    if mode == "compiled":
        data = b"ab" * 10**9
        ready()
        zlib.compress(data, 9)
    if mode == "callback":
        class Dropped:
            def __del__(self):
                ready()
                end = time.monotonic() + 0.5
                while time.monotonic() < end:
                    pass
        Dropped()
        while True:
            time.sleep(0.01)
    if mode == "cleaning":
        try:
            ready()
            time.sleep(60)
        finally:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                time.sleep(0.05)
            print("cleaned", flush=True)
    if mode == "finishing":
        import signal
        noted = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: noted.append(number))
        signals.finish_first("the step")
        ready()
        while not noted:
            time.sleep(0.01)
        time.sleep(1.5)
        print("saved", flush=True)
        sys.exit(143)
    if mode == "heeded":
        import signal
        noted, acts = [], signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
        signals.finish_first("the step")
        ready()
        while not noted:
            time.sleep(0.01)
        # Done at once; closing files then takes longer than a signal may.
        signals.heeded()
        signals.finish_first("")
        signal.signal(signal.SIGTERM, acts)
        time.sleep(1.5)
        print("error: stopped, saved", file=sys.stderr)
        signals.leave(143)
    if mode == "writing":
        with files.create("result") as file:
            data = b"ab" * 10**9
            file.write(b"half")
            ready()
            zlib.compress(data, 9)
except KeyboardInterrupt:
    print("error: interrupted; go on", file=sys.stderr)
    signals.leave(130)
except signals.StoppedExit as stopped:
    signals.leave(stopped.code)
"""


@pytest.fixture
def start(tmp_path):
    """The function `start(mode)`: a program that is ready for a signal."""
    started = []

    def begin(mode, **options):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path} | options
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, mode], env=environment, **pipes)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def stopped(process, number, within=10.0):
    since = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    # A second, and what a busy machine adds.
    assert time.monotonic() - since < within
    return process.returncode, out, err


@pytest.mark.parametrize("mode", ["python", "compiled", "callback"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_stops_whatever_it_is_doing(start, mode, number, status):
    found, _, err = stopped(start(mode), number)
    assert found == status
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.strip().splitlines()[-1] == "error: interrupted; go on"


def test_what_is_half_written_goes(start, tmp_path):
    assert stopped(start("writing"), signal.SIGINT)[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_a_command_says_what_it_finishes_first(start):
    status, out, err = stopped(start("finishing"), signal.SIGTERM)
    assert (status, err) == (143, "")
    assert out == "SIGTERM: finishes the step; a second signal stops it at once\nsaved\n"
    status, out, err = stopped(start("cleaning"), signal.SIGINT)
    assert (status, out) == (130, "cleaned\n")
    assert err.startswith("SIGINT: cleans up first; a second signal stops it at once\n")


def test_an_error_of_its_own_is_not_lost_while_files_are_closed(start):
    assert stopped(start("heeded"), signal.SIGTERM) == (143, "", "error: stopped, saved\n")


@pytest.mark.parametrize("mode", ["finishing", "cleaning"])
def test_a_second_signal_stops_it_at_once(start, mode):
    process = start(mode)
    process.send_signal(signal.SIGINT)
    told = process.stdout if mode == "finishing" else process.stderr
    assert told.readline().startswith("SIGINT: ")
    status, out, err = stopped(process, signal.SIGINT)
    assert (status, out) == (130, "")
    assert err == "error: interrupted; go on\n"


def test_ignored_signals_stay_ignored(start):
    process = start("python", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None


def test_readers_that_leave_do_not_end_a_program(tmp_path):
    program = "from dmosnet_jax.core import startup\nstartup.outlast_readers()\nimport sys\nfor i in range(20000):\n"
    program += "    print(i)\nprint('to stderr', file=sys.stderr)\nopen('done', 'w').close()\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "to stderr\n"
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "done").exists()


def test_the_watch_ends_and_begins_again():
    program = (
        "import os, signal, sys, threading, time\n"
        "from dmosnet_jax.core import signals\n"
        "signals.install('first')\n"
        "signals.uninstall()\n"
        "assert threading.active_count() == 1\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "if os.fork():\n"
        "    os.wait()\n"
        "    sys.exit('the parent goes on')\n"
        "signals.install('second')\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    (child,) = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (1, "", "the parent goes on\n")
