"""What holds for every command: readers may leave, and failures and interrupts end in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from dmosnet_jax.benchmarks import command as benchmark
from dmosnet_jax.core.command import guarded
from dmosnet_jax.core.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGES = ("data_prep", "dmosnet_jax")
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in _PACKAGES
    for path in (ROOT / package).glob("**/*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8").rpartition("\n\n\n")[2]
)

# Forks of one process that has imported JAX, each with a pipe that nobody reads as its output.
_CLOSED = """
import json, os, runpy, sys
import dmosnet_jax.evaluation.gallery, dmosnet_jax.export.serve, dmosnet_jax.memory.hybrid
reader, pipe = os.pipe()
os.close(reader)
found = {}
for name in sys.argv[1:]:
    errors, sink = os.pipe()
    child = os.fork()
    if not child:
        os.close(errors)
        os.dup2(pipe, 1)
        os.dup2(sink, 2)
        sys.argv = [name, "--help"]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        sys.exit(0)
    os.close(sink)
    with open(errors) as file:
        text = file.read()
    found[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps():
    """Status and errors of each command's help, printed to a reader that has left."""
    # With unbuffered output a library would drop the error, and a user has buffered output.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CLOSED, *COMMANDS],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_all_commands_are_found():
    assert {"data_prep.convert", "data_prep.lint", "dmosnet_jax.main", "dmosnet_jax.demo"} <= set(COMMANDS)
    assert {"dmosnet_jax.tools.reproduce", "dmosnet_jax.benchmarks.speed"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_has_left_is_no_failure(helps, name):
    # The status of help is that of absl where its own parser is at work.
    assert helps[name] == [1 if name == "dmosnet_jax.main" else 0, ""]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("a=1\nis wrong"), 2, "error: a=1\\nis wrong\n"),
        (PermissionError(13, "Permission denied", "f.csv"), 1, "error: f.csv: Permission denied: give another place"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_and_interrupts_are_one_line(capsys, error, status, text):
    def run():
        raise error

    assert guarded(run) == status
    assert capsys.readouterr().err.startswith(text)
    assert guarded(lambda: None) == 0


def test_a_benchmark_stops_at_the_first_signal(tmp_path):
    program = (
        "from dmosnet_jax.benchmarks import command\n"
        "from dmosnet_jax.core.command import guarded, run_program\n"
        "if __name__ == '__main__':\n"
        "    measure = 'import time; print(\"measures\", flush=True); time.sleep(60)'\n"
        "    run_program(lambda: guarded(lambda: command.in_fresh_process(exec, measure)))\n"
    )
    path = tmp_path / "measured.py"
    path.write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "measures\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_fresh_process_gives_its_result():
    assert benchmark.in_fresh_process(divmod, 7, 2) == (3, 1)
