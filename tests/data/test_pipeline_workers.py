"""The pipeline's worker processes, in programs of their own."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Workers are spawned: they import the main module again, which a test run under pytest does not have.
JOB = '''
    import contextlib
    import gc
    import os
    import sys
    import time
    import numpy as np
    from absl import app, flags
    from dmosnet_jax.core.errors import DataError
    from dmosnet_jax.data import pipeline
    from split_under_test import MemorySplit, make_split

    MODE = flags.DEFINE_string("mode", None, "what to do")

    def shared_memory():
        """Open shared memory blocks of this process; nothing where there is no /proc."""
        found = []
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        return [path for path in found if "/psm_" in path]

    def work(mode):
        # Shared memory must not wait for a collection that may never come.
        gc.disable()
        split = make_split()
        if mode == "damaged":
            split.source[25] = split.source[25][:200]
        plan = np.arange(40, dtype=np.int32).reshape(20, 2)
        images = lambda stream: [batch["image"] for batch in stream]
        read = lambda **options: contextlib.closing(pipeline.train_batches(split, plan, image_size=(16, 8), **options))
        first = []
        with read(threads=1, workers=2) as stream:
            if mode == "hang":
                next(stream)
                print("ready", flush=True)
                time.sleep(600)
            if mode == "killed":
                next(stream)
                print("ready", flush=True)
                while not os.path.exists("go"):
                    time.sleep(0.05)
            try:
                for _ in range(20 if mode == "damaged" else 7):
                    first.append(next(stream))
            except DataError as error:
                print("DataError", error, len(first), flush=True)
                return
            assert all(type(batch["image"]) is np.ndarray for batch in first)
        with read(threads=0) as stream:
            expected = images(stream)
        with read(start=7, workers=2) as stream:
            rest = images(stream)
        np.testing.assert_array_equal([batch["image"] for batch in first] + rest, expected)
        for _ in range(200):
            if not shared_memory():
                break
            time.sleep(0.05)
        print("equal", len(rest), shared_memory(), flush=True)

    if __name__ == "__main__":
        if sys.argv[1:] == ["damaged"]:
            work("damaged")
        else:
            app.run(lambda _: work(MODE.value))
'''


@pytest.fixture
def job(tmp_path):
    """Command and environment that run the job above as `python -m`, with the split importable by the workers."""
    (tmp_path / "worker_job.py").write_text(textwrap.dedent(JOB))
    (tmp_path / "split_under_test.py").write_text((HERE / "test_pipeline.py").read_text())
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}

    def start(argument):
        command = [sys.executable, "-W", "error::UserWarning", "-m", "worker_job", argument]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def test_worker_processes_give_the_same_batches_under_absl(job):
    process = job("--mode=equal")
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert output == "equal 13 []\n"
    # Python's own tracker may come too late to shared memory that was released already, and says so.
    assert "worker_job" not in errors
    assert "dmosnet_jax" not in errors
    assert "leaked" not in errors


def test_error_in_a_worker_process_is_the_same_one_line_without_absl(job):
    process = job("damaged")
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert output.startswith("DataError market1501 image 25 (train/0025.jpg): damaged image")
    assert output.endswith(" 12\n")
    assert output.count("\n") == 1


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_ends_the_run_with_one_line(job, tmp_path):
    process = job("--mode=killed")
    assert process.stdout.readline() == "ready\n"
    for worker in children(process.pid):
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in pathlib.Path(f"/proc/{worker}/cmdline").read_bytes():
                os.kill(worker, signal.SIGKILL)
    (tmp_path / "go").touch()
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert output.startswith("DataError one of 2 decoding processes was killed, perhaps for want of memory")
    assert output.count("\n") == 1


def children(pid):
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def wait_until(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_training_process(job):
    process = job("--mode=hang")
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    process.kill()
    process.wait()

    def running(pid):
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    assert wait_until(lambda: not any(running(worker) for worker in workers))
    process.stdout.close()
    process.stderr.close()
