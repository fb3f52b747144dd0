"""The scripts that start jobs: what they check before."""

import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
CHECK = LAUNCH / "check.py"


def check(*arguments):
    done = subprocess.run([sys.executable, CHECK, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_host_that_can_run_the_job_leaves_nothing(tmp_path):
    assert check(f"--workdir={tmp_path}/runs/spcl", "--config=configs/spcl_luperson.py") == (0, "", "")
    assert not list((tmp_path / "runs").iterdir())


def test_a_mark_is_seen_by_hosts_that_share_the_folder(tmp_path):
    status, mark, _ = check("--mark", f"--workdir={tmp_path}/runs/spcl")
    assert status == 0
    assert check(f"--seen={mark.strip()}") == (0, "", "")
    pathlib.Path(mark.strip()).unlink()
    module = runpy.run_path(str(CHECK))
    module["problem"].__globals__["SECONDS"] = 0
    assert "is not seen here: the workdir must be in a folder that all hosts share" in module["problem"](
        [f"--seen={mark.strip()}"]
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [([], "--workdir=DIR is not given"), (["--workdir=/proc/nowhere/run"], "/proc/nowhere: No such file or directory")],
)
def test_what_is_wrong_is_one_line(arguments, line):
    status, _, err = check(*arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_an_old_python_is_named(monkeypatch):
    module = runpy.run_path(str(CHECK))
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    assert "is Python 3.10, and 3.11 or newer is needed" in module["problem"]([])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_scripts_are_whole(script):
    subprocess.run(["bash", "-n", script], check=True)
