"""What is said of a compilation: nothing where it is quick, else what compiles, and how long it took."""

import re
import time

import jax
import pytest

from dmosnet_jax.core import progress


@pytest.fixture
def told(monkeypatch):
    """The lines, of what takes any time at all."""
    lines = []
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_write", lines.append)
    return lines


def wait_for(lines):
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        time.sleep(0.01)


def check(lines):
    assert lines[0] == "compiling the step ..."
    assert re.fullmatch(r"compiled in \d+ s", lines[1])
    assert len(lines) == 2


def test_a_long_one_says_what_it_is_and_how_long_it_took(told):
    with progress.compiling("the step"):
        wait_for(told)
        assert len(told) == 1
    check(told)


def test_a_quick_one_says_nothing(told, monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 60.0)
    with progress.compiling("the step"):
        pass
    assert told == []


def test_only_the_first_process_says_it(told, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with progress.compiling("the step"):
        time.sleep(0.2)
    assert told == []


def test_a_failure_is_not_told_as_compiled(told):
    def failing():
        with progress.compiling("the step"):
            wait_for(told)
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        failing()
    assert told == ["compiling the step ..."]


def test_a_program_is_announced_once_and_compiled_once(told):
    traced = []

    @jax.jit
    def program(x):
        traced.append(None)
        wait_for(told)
        return 2 * x

    call = progress.announced(program, "the step")
    assert [int(call(3)), int(call(4))] == [6, 8]
    assert len(traced) == 1
    check(told)


def test_lines_go_to_standard_output(capsys):
    progress._write("compiled in 3 s")
    assert capsys.readouterr().out == "compiled in 3 s\n"
