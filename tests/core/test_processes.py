"""Processes of a job meet, share a workdir, and end together: by one line, with one status, within a bounded time."""

import concurrent.futures
import io
import os
import pathlib
import signal
import socket
import sys
import time

import pytest

from dmosnet_jax.core import processes, supervisor
from dmosnet_jax.core.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The command line with a recipe of its own: argv[1] is the process that does argv[2], while the others are in a
# collective operation or asleep, as argv[3] says.
JOB = """
import os, runpy, signal, sys, time, types
from dmosnet_jax.core import processes

processes.SILENCE_SECONDS = 10
actor, action, others = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)

def run(config, workdir):
    import jax, numpy as np
    from dmosnet_jax.core import parallel
    from dmosnet_jax.core.errors import DataError, UserError
    class Stopped(UserError):
        exit_status, everywhere = 143, True
    parallel.by_process(np.int32(1))
    if action == "deaf" and str(jax.process_index()) == actor:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("at work", flush=True)
    if actor == "all":
        raise Stopped("all stopped together")
    if action == "agree":
        parallel.agree(lambda: 1 / 0)
    if str(jax.process_index()) != actor:
        if others == "asleep":
            time.sleep(300)
        parallel.by_process(np.int32(2))
        time.sleep(300)
    if action == "damage":
        raise DataError("image 3 is damaged")
    if action == "defect":
        raise TypeError("a defect\\nin two lines")
    if action == "deaf":
        time.sleep(300)
    os.kill(os.getpid(), getattr(signal, action))
    time.sleep(300)

recipe = types.ModuleType("dmosnet_jax.recipes.supervised")
recipe.run = run
sys.modules[recipe.__name__] = recipe
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def job(cli, tmp_path):
    """The function `job(actor, action, others)`: starts two processes of the command line."""
    started = []

    def start(actor, action="", others="asleep", *flags, workdirs=("run", "run")):
        port = free_port()
        for number in range(2):
            command = [actor, action, others, f"--config={ROOT}/configs/finetune.py", "--distributed"]
            command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}"]
            command += [f"--workdir={tmp_path / workdirs[number]}", *flags]
            started.append(cli.start(*command, script=JOB))
        return started

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            process.communicate()


def ends(started, seconds):
    """Status, printed lines and error lines of each process; all of them ended within so many seconds."""
    until, found = time.monotonic() + seconds, []
    for process in started:
        out, err = process.communicate(timeout=max(0.1, until - time.monotonic()))
        found.append((process.returncode, out.splitlines(), [line for line in err.splitlines() if line]))
    return found


@pytest.mark.parametrize(
    ("actor", "action", "others", "status", "line"),
    [
        ("1", "damage", "asleep", 1, "error: image 3 is damaged (process 1 on "),
        ("0", "damage", "in a collective", 1, "error: image 3 is damaged"),
        ("1", "defect", "in a collective", 1, "failed: TypeError: a defect\\nin two lines"),
        ("0", "agree", "in a collective", 1, "failed: ZeroDivisionError: division by zero"),
        ("all", "", "", 143, "error: all stopped together"),
    ],
)
def test_a_failure_of_one_ends_both_by_the_same_line_and_status(job, actor, action, others, status, line):
    first, second = ends(job(actor, action, others), 120)
    assert (first[0], second[0]) == (status, status), (first, second)
    told = {errors[-1] for _, _, errors in (first, second)}
    assert len(told) == 1
    assert line in told.pop()
    for number, (_, _, errors) in enumerate((first, second)):
        # Only who has the defect shows where it is.
        assert len(errors) == 1 or (action in ("defect", "agree") and str(number) == actor), errors
    for number, (_, out, _) in enumerate((first, second)):
        assert out[0].startswith(f"process {number} of 2 on {socket.gethostname()}: 1 of 2 devices (cpu; ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("actor", "others", "line"),
    [
        ("1", "asleep", "process 1 on HOST gave no sign of life any more"),
        ("1", "in a collective", "process 1 on HOST gave no sign of life any more"),
        ("0", "in a collective", "process 0 on HOST can't be reached any more"),
    ],
)
def test_a_killed_process_ends_the_other_by_one_line(job, actor, others, line):
    found = ends(job(actor, "SIGKILL", others), 120)
    killed, other = found[int(actor)], found[1 - int(actor)]
    assert killed[0] == 128 + signal.SIGKILL
    assert killed[2] == [
        "error: the run was ended by SIGKILL, often for want of memory: the same command on all hosts goes on from the "
        "last checkpoint"
    ]
    assert other[0] == 75, found
    assert len(other[2]) == 1, other[2]
    assert line.replace("HOST", socket.gethostname()) in other[2][0]


def test_what_does_not_stop_when_it_is_told_to_is_ended(job):
    started = job("1", "deaf", "asleep", "--save_seconds=3")
    while started[1].stdout.readline() != "at work\n":
        assert started[1].poll() is None
    started[1].send_signal(signal.SIGTERM)
    first, second = ends(started, 60)
    assert second[0] == 75
    assert "told to stop by SIGTERM, it did not save its state within 3 s (--save_seconds)" in second[2][0]
    assert first[0] == 75
    assert "process 1 on" in first[2][0]


def test_a_signal_outside_of_training_ends_both(job):
    started = job("1", "SIGCONT", "asleep")
    while started[1].stdout.readline() != "at work\n":
        assert started[1].poll() is None
    started[1].send_signal(signal.SIGTERM)
    first, second = ends(started, 60)
    assert (first[0], second[0]) == (143, 143)
    assert first[2][0].startswith(f"error: process 1 on {socket.gethostname()} was stopped by a signal: ")


def test_a_workdir_that_is_not_shared_is_refused_by_all(job, tmp_path):
    first, second = ends(job("1", "damage", workdirs=("here", "there")), 90)
    assert (first[0], second[0]) == (2, 2)
    assert first[2] == second[2]
    (line,) = first[2]
    host = socket.gethostname()
    assert line.startswith(f"error: --workdir={tmp_path}/")
    assert f"process 1 on {host} does not see what process 0 on {host} writes there: give a folder that all" in line
    assert not list(tmp_path.iterdir())


def roll(count, calls, seconds=20.0):
    """What each caller, (number, count), gets from the roll call, and all that was said."""
    address, said = f"127.0.0.1:{free_port()}", []

    def call(number, their_count):
        try:
            return processes.call_roll(address, their_count, number, seconds=seconds, say=said.append)
        except ConfigError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, *zip(*calls, strict=True))), said


def test_the_roll_call_gives_everybody_the_hosts():
    found, said = roll(3, [(2, 3), (0, 3), (1, 3)])
    assert found == [[socket.gethostname()] * 3] * 3
    assert said == []


def test_the_roll_call_says_for_whom_it_waits_and_for_how_long(monkeypatch):
    monkeypatch.setattr(processes, "_TELL_SECONDS", 0.5)
    found, said = roll(4, [(0, 4), (2, 4)], seconds=2.0)
    assert said[0] == "waits for process 1, 3 of 4 (1 s of 2 s)"
    assert found[0] == found[1]
    assert found[0].startswith("--distributed: of 4 processes number 1, 3 did not come within 2 s: start it")
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3)))
    (found,), said = roll(2, [(1, 2)], seconds=-4.0)
    assert "process 0 at 127.0.0.1:" in found
    assert "did not come within" in found


@pytest.mark.parametrize(
    ("calls", "line"),
    [
        ([(0, 3), (1, 3), (1, 3)], "--process_id=1 on HOST and on HOST: give each process a number of its own"),
        ([(0, 2), (1, 3)], "--num_processes=2 on process 0, 3 on HOST: give the same everywhere"),
        ([(0, 2), (5, 2)], "--process_id=5 on HOST: numbers of 2 processes are 0 to 1, each once"),
    ],
)
def test_the_roll_call_refuses_wrong_numbers_everywhere(calls, line):
    found, _ = roll(2, calls)
    assert found == [line.replace("HOST", socket.gethostname())] * len(calls)


def test_the_roll_call_outlives_strangers_and_those_who_come_again():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        zero = pool.submit(processes.call_roll, f"127.0.0.1:{port}", 3, 0, seconds=60)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"process": 1, "count": 3, "host": "died"}\n'):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                        stranger.sendall(words)
                        time.sleep(0.4)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
        others = [pool.submit(processes.call_roll, f"127.0.0.1:{port}", 3, n, seconds=60) for n in (1, 2)]
        assert zero.result() == others[0].result() == others[1].result() == [socket.gethostname()] * 3


NODE = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        # One task on a node of eight: with and without the list that SLURM sets.
        (NODE | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, list(range(8))),
        (NODE | {"SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        (NODE | {"SLURM_GPUS_ON_NODE": "gpu:a100:4"}, [0, 1, 2, 3]),
        # A part of a node: numbers are those of what is visible.
        (NODE | {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "GPU-1f,GPU-2e"}, [0, 1]),
        # Two tasks that see the same eight share them; bound by SLURM, each takes all that it sees.
        (
            NODE | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "8"},
            [4, 5, 6, 7],
        ),
        (
            NODE
            | {
                "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
                "SLURM_LOCALID": "5",
                "SLURM_GPUS_ON_NODE": "8",
                "CUDA_VISIBLE_DEVICES": "5",
            },
            [0],
        ),
        (NODE | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        # Not ours to choose.
        (NODE, None),
        (NODE | {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "0"}, None),
        (NODE | {"SLURM_GPUS_ON_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_a_task_of_slurm_takes_the_gpus_that_are_its_own(variables, devices):
    assert processes.local_devices(variables) == devices


def test_slurm_variables_alone_give_jax_its_addresses_and_all_eight(monkeypatch):
    import jax

    given = {}
    step = {
        "SLURM_JOB_ID": "5000",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
    }
    for name, value in (NODE | step | {"SLURM_GPUS_ON_NODE": "8"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "call_roll", lambda *who, **options: given.update(roll=who) or ["gpu07", "gpu08"])
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **options: given.update(options, where=where))
    processes.join(None, None, None, seconds=30)
    port = 5000 % 2**12 + 65535 - 2**12 + 1
    assert given["where"] == given["roll"] == (f"gpu07:{port}", 2, 1)
    assert given["local_device_ids"] == list(range(8))
    # Addresses that are given change nothing about that.
    processes.join("gpu07:1234", 2, 1, seconds=30)
    assert (given["where"], given["local_device_ids"]) == (("gpu07:1234", 2, 1), list(range(8)))


FATAL = """E1127 18:51:28.068165   31962 coordination_service.cc:1549] [1059] Use error polling to propagate the error
1
The tasks have crashed.
F1127 18:51:28.068864   31974 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
/job:jax_worker/replica:0/task:2
1
The tasks have crashed. Check the task logs for an earlier error.
*** Check failure stack trace: ***
    @     0x7f50cd840634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def test_messages_of_native_code_pass_but_for_those_about_the_job():
    shown = io.StringIO()
    other = "W1127 18:51:20.0 31974 gemm.cc:12] slow\n  in two lines\n"
    raw = ("a line\n" + FATAL + other + '\0{"hosts": ["a", "b", "c"]}\n').encode()
    relay = supervisor.Relay(io.BytesIO(raw), shown)
    relay.run()
    assert shown.getvalue() == "a line\n" + other
    assert relay.about_job == FATAL
    line = supervisor.describe_loss(relay.about_job, relay.hosts)
    assert line.startswith("process 1 on b, process 2 on c gave no sign of life any more: it ended, or its host or")
    assert supervisor.describe_loss("nothing of the kind", []) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the supervisor is Linux's")
@pytest.mark.parametrize(
    ("told", "status", "line"),
    [("supervisor.tell_end('image 3 is damaged', 7)", 7, "image 3 is damaged"), ("None", 134, "ended by SIGABRT")],
)
def test_a_run_aborted_on_its_way_out_ends_as_it_told(cli, told, status, line):
    script = (
        f"import os; from dmosnet_jax.core import supervisor; supervisor.supervise(save_seconds=5); {told}; os.abort()"
    )
    process = cli.start(script=script)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.count("error: ") == 1
    assert line in errors


@pytest.mark.skipif(sys.platform != "linux", reason="the supervisor is Linux's")
def test_the_run_ends_with_its_supervisor(cli):
    script = (
        "import os, time; from dmosnet_jax.core import supervisor; supervisor.supervise(save_seconds=5)\n"
        "print(os.getpid(), flush=True); time.sleep(300)"
    )
    process = cli.start(script=script)
    child = int(process.stdout.readline())
    assert child != process.pid
    process.kill()
    process.communicate()
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "Z" in pathlib.Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the run outlived its supervisor")
