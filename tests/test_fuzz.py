"""A slice of the fuzzing of `tests/fuzz.py`; `DMOSNET_LONG=1` runs it, and the kills of `tests/kill.py`, at length."""

import mmap
import os
import pathlib
import subprocess
import sys

import pytest

from tests import fuzz, kill

LONG = pytest.mark.skipif(os.environ.get("DMOSNET_LONG") != "1", reason="takes minutes: set DMOSNET_LONG=1")
LINUX = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads memory in /proc")


@LINUX
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_read_or_refused(kind):
    outcomes, most, wrong = fuzz.run(kind, 0, 60)
    assert wrong == []
    assert outcomes.total() == 60
    assert outcomes["refused"] > 10
    assert most < fuzz.MEMORY


@LINUX
@LONG
@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_thousands_of_damaged_files(kind):
    outcomes, _, wrong = fuzz.run(kind, 1000, 5000)
    assert wrong == []
    assert outcomes.total() == 5000


@LINUX
@LONG
@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bytes():
    done = subprocess.run([sys.executable, "-m", "tests.kill", "--runs=100"], cwd=fuzz.ROOT, check=False)
    assert done.returncode == 0


def test_what_does_not_behave_is_told(monkeypatch, tmp_path):
    """The scripts see an error of another kind, memory, a left file and other bytes."""

    def case(read):
        place = tmp_path / "place"
        place.mkdir(exist_ok=True)
        (place / "file").write_bytes(b"x" * 100)
        return fuzz._attempt(0, "torch", [([place / "file"], read)], place, tmp_path / "ran")

    def fails():
        raise KeyError("deep inside")

    def takes_memory():
        # Pages of its own: what an earlier test freed may be taken again without any.
        with mmap.mmap(-1, 50_000_000) as pages:
            pages.write(b"x" * 50_000_000)

    assert case(lambda: None)[0] == "accepted"
    assert case(fails) == ("wrong", "KeyError: 'deep inside'")
    assert case((tmp_path / "ran").touch) == ("wrong", "code of the file was run")
    assert case((tmp_path / "place" / "half").touch) == ("wrong", "left ['half']")
    monkeypatch.setattr(fuzz, "MEMORY", 10_000_000)
    assert case(takes_memory)[1].startswith("took ")
    first = kill.results(tmp_path)
    (tmp_path / "place" / "file").write_bytes(b"y")
    assert kill.results(tmp_path) != first
