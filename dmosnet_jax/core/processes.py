"""The processes of a job: how they meet, that they share one workdir, and that they end together.

They speak through the key-value store of JAX's coordination service, which process 0 serves. `parallel` is for arrays;
this is for what must also work while a collective operation is stuck.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from dmosnet_jax.core import supervisor
from dmosnet_jax.core.errors import ConfigError, DataError, LostProcessError, UserError, printable, refusal

# A process that sends no sign of life for so long is lost; native threads send them, whatever Python does.
SILENCE_SECONDS = 60
# Waiting for the others is told at such intervals.
_TELL_SECONDS = 10.0
# Files of another host appear after its network file system's caches are outdated.
_SHARED_SECONDS = 10.0
_END, _SEEN, _SHARED, _TOKEN = (f"dmosnet/{name}" for name in ("end", "seen", "shared", "token"))
_DONE = "done"
_HELLO_BYTES = 4096
_say = functools.partial(print, flush=True)
# What XLA and its libraries call a failure of the connection, in exceptions of several kinds.
_CONNECTION = re.compile(r"gloo|nccl|^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ", re.IGNORECASE)


@dataclasses.dataclass
class _Job:
    """This process's place in the job."""

    client: Any
    index: int
    count: int
    hosts: list[str]
    ending: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    watch: threading.Thread | None = None


_job: _Job | None = None


def local_devices(variables: Mapping[str, str]) -> list[int] | None:
    """Numbers of the GPUs that this process drives where SLURM started it; None leaves them to JAX.

    JAX takes one GPU for each process under SLURM. Here a task takes all that SLURM gave to it alone, and where the
    tasks of a node see the same GPUs, its share of them.

    Args:
        variables: of the environment.
    """
    if variables.get("JAX_LOCAL_DEVICE_IDS") or "SLURM_PROCID" not in variables or "SLURM_LOCALID" not in variables:
        return None
    on_node = _count(variables.get("SLURM_GPUS_ON_NODE"))
    visible = variables.get("CUDA_VISIBLE_DEVICES", variables.get("ROCR_VISIBLE_DEVICES"))
    seen = on_node if visible is None else len([name for name in visible.split(",") if name and name != "NoDevFiles"])
    tasks = _tasks_on_this_node(variables)
    if not seen:
        return None
    if tasks == 1 or seen < on_node:
        return list(range(seen))
    share, place = seen // tasks, int(variables["SLURM_LOCALID"])
    return list(range(place * share, (place + 1) * share)) if share else None


def _count(text: str | None) -> int:
    """A number of GPUs, as `8` or `gpu:8` or `gpu:a100:8`."""
    last = (text or "").rpartition(":")[2]
    return int(last) if last.isdigit() else 0


def _tasks_on_this_node(variables: Mapping[str, str]) -> int:
    """From SLURM_STEP_TASKS_PER_NODE, `2(x3),1`: two tasks on each of three nodes, and one on a fourth."""
    counts: list[int] = []
    for group in variables.get("SLURM_STEP_TASKS_PER_NODE", variables.get("SLURM_TASKS_PER_NODE", "")).split(","):
        tasks, _, nodes = group.partition("(x")
        if tasks.isdigit():
            counts += [int(tasks)] * int(nodes.rstrip(")") or 1)
    node = variables.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else max(counts, default=1)


def join(coordinator: str | None, processes: int | None, process: int | None, *, seconds: int) -> None:
    """Connects the processes of a job; on TPU slices, SLURM and GKE JAX finds the addresses by itself.

    Each process prints its host and devices. From now on the failure of one of them ends all: see `end`.

    Args:
        coordinator: HOST:PORT of process 0, or None where the cluster tells.
        processes: how many there are, likewise.
        process: number of this one, likewise.
        seconds: how long to wait for the others.

    Raises:
        ConfigError: an address is missing, or a process did not come in time: the message names it.
    """
    import jax

    devices = local_devices(os.environ)
    coordinator, processes, process, devices = _detect(coordinator, processes, process, devices, seconds)
    hosts: list[str] = []
    if coordinator is not None and processes is not None and process is not None and processes > 1:
        hosts = call_roll(coordinator, processes, process, seconds=seconds)
        supervisor.tell_hosts(hosts)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=devices,
            initialization_timeout=seconds,
            shutdown_timeout_seconds=SILENCE_SECONDS,
            heartbeat_timeout_seconds=SILENCE_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--distributed: the processes did not connect ({reason}): give --coordinator=HOST:PORT, --num_processes "
            "and --process_id where the cluster does not tell them"
        ) from error
    # JAX's service for preemptions has taken SIGTERM to itself, and nobody asks it.
    for number in (signal.SIGTERM, signal.SIGINT):
        if (handler := signal.getsignal(number)) is not None and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)
    _start_watch(hosts)
    kinds = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    numbers = ", ".join(str(device.id) for device in jax.local_devices())
    _say(
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices ({kinds}; {numbers})"
    )


def _detect(coordinator: str | None, processes: int | None, process: int | None, devices: Any, seconds: int) -> Any:
    """The four with what the cluster tells filled in, where this version of JAX can be asked for it."""
    if None in (coordinator, processes, process):
        with contextlib.suppress(ImportError, AttributeError, TypeError):
            from jax._src.clusters import ClusterEnv

            found = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, processes, process, devices, None, seconds
            )
            return *found[:3], devices
    return coordinator, processes, process, devices


def call_roll(
    coordinator: str, count: int, index: int, *, seconds: float, say: Callable[[str], None] = _say
) -> list[str]:
    """Waits until all processes have come, before JAX does; says for whom it waits.

    Process 0 listens at the port that JAX's service takes afterwards.

    Args:
        coordinator: HOST:PORT of process 0.
        count: of processes.
        index: of this one.
        seconds: how long to wait.
        say: prints a line.

    Returns:
        Names of the hosts, by process.

    Raises:
        ConfigError: somebody did not come in time, or came twice.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT of process 0")
    deadline = time.monotonic() + seconds
    if index:
        return _answer(host.strip("[]"), int(port), count, index, seconds, deadline, say)
    return _call(int(port), count, seconds, deadline, say)


def _call(port: int, count: int, seconds: float, deadline: float, say: Callable[[str], None]) -> list[str]:
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count)
    except OSError as error:
        raise ConfigError(
            f"--coordinator: port {port} of this host can't be opened ({error.strerror}): give a free port"
        ) from error
    here: dict[int, tuple[socket.socket, str]] = {}
    begun, told = time.monotonic(), time.monotonic()
    with listener, contextlib.ExitStack() as connections:
        listener.settimeout(0.2)
        while len(here) < count - 1:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                connection, _ = listener.accept()
                connections.enter_context(connection)
                connection.settimeout(2)
                hello = json.loads(connection.makefile("rb").readline(_HELLO_BYTES))
                number, name = int(hello["process"]), printable(hello["host"], 80)
                if number in here and _is_gone(here[number][0]):
                    del here[number]
                problem = _problem(number, name, int(hello["count"]), count, here)
                if problem:
                    _tell_all([connection, *(there for there, _ in here.values())], {"error": problem})
                    raise ConfigError(problem)
                here[number] = connection, name
            for number in [n for n, (there, _) in here.items() if _is_gone(there)]:
                del here[number]
            missing = ", ".join(str(n) for n in range(1, count) if n not in here)
            now = time.monotonic()
            if missing and now > deadline:
                problem = (
                    f"--distributed: of {count} processes number {missing} did not come within {seconds:g} s: start "
                    f"it, see that port {port} of process 0's host is open to it, or give a higher --join_seconds"
                )
                _tell_all([there for there, _ in here.values()], {"error": problem})
                raise ConfigError(problem)
            if missing and now - told > _TELL_SECONDS:
                told = now
                say(f"waits for process {missing} of {count} ({now - begun:.0f} s of {seconds:g} s)")
        hosts = [socket.gethostname(), *(here[number][1] for number in range(1, count))]
        _tell_all([there for there, _ in here.values()], {"hosts": hosts})
        # The side that closes first keeps the port for a while; JAX needs it here, now.
        for there, _ in here.values():
            with contextlib.suppress(OSError):
                there.settimeout(2)
                there.recv(1)
    return hosts


def _problem(
    number: int, name: str, their_count: int, count: int, here: Mapping[int, tuple[socket.socket, str]]
) -> str | None:
    if their_count != count:
        return f"--num_processes={count} on process 0, {their_count} on {name}: give the same everywhere"
    if not 0 < number < count:
        return f"--process_id={number} on {name}: numbers of {count} processes are 0 to {count - 1}, each once"
    if number in here:
        return f"--process_id={number} on {here[number][1]} and on {name}: give each process a number of its own"
    return None


def _tell_all(connections: list[socket.socket], message: Mapping[str, Any]) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection on which it has nothing more to say."""
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            connection.settimeout(2)


def _answer(
    host: str, port: int, count: int, index: int, seconds: float, deadline: float, say: Callable[[str], None]
) -> list[str]:
    begun, told = time.monotonic(), time.monotonic()
    reason = "no answer"
    while time.monotonic() < deadline + 5:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                hello = {"process": index, "count": count, "host": socket.gethostname()}
                connection.sendall(json.dumps(hello).encode() + b"\n")
                connection.settimeout(max(1.0, deadline + 5 - time.monotonic()))
                answer = json.loads(connection.makefile("rb").readline(1 << 20))
            if "error" in answer:
                raise ConfigError(printable(answer["error"], 1000))
            return [str(name) for name in answer["hosts"]]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            say(f"waits for process 0 at {host}:{port} ({told - begun:.0f} s of {seconds:g} s: {reason})")
        time.sleep(0.3)
    raise ConfigError(
        f"--distributed: process 0 at {host}:{port} did not come within {seconds:g} s ({reason}): start it, see that "
        "the port is open, or give a higher --join_seconds"
    )


def _start_watch(hosts: list[str]) -> None:
    global _job
    try:
        from jax._src.distributed import global_state

        client, index, count = global_state.client, global_state.process_id, global_state.num_processes
    except (ImportError, AttributeError):
        # Without it a failure is told by each process for itself.
        return
    if client is None or count == 1:
        return
    _job = _Job(client, index, count, hosts or ["?"] * count)
    _job.watch = threading.Thread(target=_watch, args=(_job,), daemon=True)
    _job.watch.start()


def _watch(job: _Job) -> None:
    """Ends this process when another one has failed, even where its main thread is blocked."""
    while True:
        try:
            told = job.client.blocking_key_value_get(_END, 3_600_000)
        except Exception:
            # Where the connection is gone, JAX ends the process.
            time.sleep(1)
            continue
        with job.lock:
            if job.ending or told == _DONE:
                return
            job.ending = True
        line, status = json.loads(told)
        supervisor.tell_end(line, status)
        with contextlib.suppress(Exception):
            job.client.key_value_set(f"{_SEEN}/{job.index}", "yes")
        _let_others_see(job)
        supervisor.leave(line, status)


def _let_others_see(job: _Job) -> None:
    """Process 0 goes last: the others learn of the end from its service."""
    deadline = time.monotonic() + 15
    with contextlib.suppress(Exception):
        while job.index == 0 and time.monotonic() < deadline:
            # All but the one that failed: where that is process 0, the others; where it is not, process 0 is counted.
            if len(job.client.key_value_dir_get(f"{_SEEN}/")) >= job.count - 1:
                return
            time.sleep(0.1)


def check_shared(workdir: pathlib.Path) -> None:
    """Sees that the workdir is the same folder in every process.

    Raises:
        ConfigError: in every process, where one of them does not see what process 0 writes there.
    """
    if _job is None:
        return
    job, wait = _job, int(2000 * _SHARED_SECONDS)
    if job.index == 0:
        is_new = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        token = f".shared-{secrets.token_hex(8)}"
        (workdir / token).touch()
        job.client.key_value_set(_TOKEN, token)
    else:
        token = job.client.blocking_key_value_get(_TOKEN, wait)
        job.client.key_value_set(f"{_SHARED}/{job.index}", "yes" if _appears(workdir, token) else "no")
    if job.index:
        # Process 0 cleans up before anybody ends the job.
        job.client.blocking_key_value_get(f"{_SHARED}/0", 2 * wait)
    answers = {n: job.client.blocking_key_value_get(f"{_SHARED}/{n}", wait) for n in range(1, job.count)}
    blind = [n for n, answer in answers.items() if answer != "yes"]
    if job.index == 0:
        (workdir / token).unlink(missing_ok=True)
        if blind and is_new:
            with contextlib.suppress(OSError):
                workdir.rmdir()
        job.client.key_value_set(f"{_SHARED}/0", "yes")
    if blind:
        named = ", ".join(f"process {n} on {job.hosts[n]}" for n in blind)
        raise ConfigError(
            f"--workdir={workdir}: {named} does not see what process 0 on {job.hosts[0]} writes there: give a folder "
            "that all hosts share (NFS, Lustre, Filestore, ...)"
        )


def _appears(workdir: pathlib.Path, token: str) -> bool:
    deadline = time.monotonic() + _SHARED_SECONDS
    while True:
        # Listing the folder makes a network file system ask again.
        with contextlib.suppress(OSError):
            if token in os.listdir(workdir):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def end(error: BaseException) -> NoReturn:
    """Ends this process by an error, and with it all others, by the same line and status.

    Where the error is only what another process's failure did to a collective operation, that process's line is waited
    for; a process that was lost without a word ends this one through JAX within `SILENCE_SECONDS`.
    """
    failure = error if isinstance(error, UserError) else refusal(error) if isinstance(error, OSError) else None
    job = _job
    if job is None:
        if failure is None:
            raise error
        supervisor.leave(str(failure), failure.exit_status)
    if isinstance(failure, LostProcessError) or _is_collective(error):
        time.sleep(SILENCE_SECONDS + 15)
        reason = printable((str(error).splitlines() or [type(error).__name__])[0], 200)
        failure = failure or LostProcessError(
            f"the processes lost each other ({reason}): the same command on all hosts goes on from the last checkpoint"
        )
    if failure is not None and failure.everywhere:
        # All processes raise it: each says its own, and none ends the service of process 0 before the others left it.
        with contextlib.suppress(Exception):
            import jax

            finish(seconds=60)
            jax.distributed.shutdown()
        supervisor.leave(str(failure), failure.exit_status)
    where = here()
    if failure is None:
        traceback.print_exception(error)
        line, status = f"{where} failed: {type(error).__name__}: {printable(error, 300)}", 1
    else:
        line, status = str(failure), failure.exit_status
        if job.index and isinstance(failure, DataError):
            line += f" ({where})"
    if not tell(line, status):
        # The watch has the line of who was first; or the connection is gone.
        time.sleep(SILENCE_SECONDS + 15)
    supervisor.leave(line, status)


def tell(line: str, status: int) -> bool:
    """Ends the other processes, by a line and a status; false where another process's were first, or nobody hears."""
    job = _job
    if job is None:
        return False
    with job.lock:
        if job.ending:
            return False
        supervisor.tell_end(line, status)
        try:
            job.client.key_value_set(_END, json.dumps([line, status]))
        except Exception:
            return False
        job.ending = True
    _let_others_see(job)
    return True


def here() -> str:
    """Number and host of this process, for messages."""
    return "this process" if _job is None else f"process {_job.index} on {_job.hosts[_job.index]}"


def _is_collective(error: BaseException) -> bool:
    """Whether an error, or what led to it, is of what connects the devices."""
    seen: BaseException | None = error
    while seen is not None:
        if _CONNECTION.search(str(seen)[:2000]):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def finish(*, seconds: float = 3600.0) -> None:
    """Waits for the other processes to come to their end too; one that fails there still ends all of them."""
    global _job
    job = _job
    if job is None:
        return
    job.client.wait_at_barrier("dmosnet/finish", int(1000 * seconds))
    with job.lock:
        job.ending = True
    if job.index == 0:
        job.client.key_value_set(_END, _DONE)
    if job.watch is not None:
        job.watch.join(timeout=10)
    _job = None
