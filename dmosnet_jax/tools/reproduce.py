"""A table of experiments in one command: the runs that are missing, their official scores, the table.

    python -m dmosnet_jax.tools.reproduce paper --workdir=runs/paper --data_dir=data --weights=weights

Tables are declared in `dmosnet_jax/tools/experiments.py`: `market_x0_25` (fine-tuning from ImageNet, beside figures of
torchreid's zoo), `paper_small` (the paper's comparison at x0.25 and 128x64, for CPUs), `adaptation` (MSMT17 to
Market-1501 without labels) and `paper` (rows of the paper's Table 2; for accelerators). `--dry_run` prints the runs,
how far each is and its commands. `--only=ROW` or `--only=ROW/SEED` does some of them, and those that they start from.

Every run is commands of `dmosnet_jax.main` in processes of their own, with its logs and workdirs in `ROW/seedN` below
the workdir. The same command goes on with what was interrupted; on SIGTERM or Ctrl-C the run under way saves its state.
A run that fails is told in one line, the others go on. After each, `table.md` and `table.csv` are written. Exit status:
0 all done, 1 a run failed, 2 a bad command, 143 stopped.
"""

import argparse
import contextlib
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dmosnet_jax
from dmosnet_jax.core import command, files
from dmosnet_jax.core.errors import ConfigError, DataError, UserError, one_line
from dmosnet_jax.tools import outcome
from dmosnet_jax.tools.experiments import TABLES
from dmosnet_jax.tools.runs import SCORE, TRAIN, Places, Run, chosen, parse_overrides, runs_of

# Between two notes of the time spent.
_NOTE_SECONDS = 60.0
_DEVICES = "import jax; print(len(jax.devices()), jax.devices()[0].device_kind)"


class _StoppedError(UserError):
    exit_status = 143


class _RunFailedError(UserError):
    pass


class _Children:
    """Starts commands; a signal to this process reaches the one under way, which saves its state and ends."""

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        numbers = [signal.SIGTERM, signal.SIGINT]
        # Under `nohup` a terminal that closes is none of our business.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: Any) -> None:
        del frame
        self.stopped = signal.Signals(number)
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def run(self, command: Sequence[str], log: pathlib.Path) -> Iterator[float]:
        """Runs a command to its end, its output appended to the log.

        Yields:
            Seconds since the value before, about every minute and at the end.

        Raises:
            _RunFailedError: it failed; the message has its last line.
            _StoppedError: a signal came.
        """
        if self.stopped:
            raise _StoppedError(f"stopped by {self.stopped.name}")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            begin, since = file.tell(), time.monotonic()
            # In a session of its own: the terminal's Ctrl-C would reach it a second time, and that acts at once.
            self._child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                if self.stopped:
                    self._child.send_signal(signal.SIGTERM)
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._child.wait(_NOTE_SECONDS)
                    now = time.monotonic()
                    yield now - since
                    since = now
                    if self._child.returncode is not None:
                        break
            finally:
                # An error of ours must not leave it behind.
                if self._child.poll() is None:
                    self._child.terminate()
                    self._child.wait()
        status, self._child = self._child.returncode, None
        if self.stopped and status:
            raise _StoppedError(f"stopped by {self.stopped.name}")
        if status:
            raise _RunFailedError(f"exit status {status}: {_last_line(log, begin)} (all of it: {log})")


def _last_line(log: pathlib.Path, begin: int) -> str:
    """The last line that a command printed, an error of its own before others."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


def _version() -> str:
    """The commit of the checkout that runs, with + where files differ from it, or the version of the package."""
    root = pathlib.Path(dmosnet_jax.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return f"version {dmosnet_jax.__version__}"


def _device() -> str:
    """What a run computes on; asked of another process, since this one must not hold an accelerator."""
    done = subprocess.run([sys.executable, "-c", _DEVICES], check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise DataError(f"JAX finds no device: {lines[-1]}")
    count, _, kind = done.stdout.strip().splitlines()[-1].partition(" ")
    return f"{count} {kind}" if kind != "cpu" else f"CPU ({_processor()})"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _train_and_score(run: Run, children: _Children, on: Mapping[str, str]) -> None:
    """Does what is missing of a run.

    Raises:
        UserError: something is missing or failed, or a signal came.
    """
    run.check()
    note = run.note() or {"settings": run.settings, "trained": not run.row.config, "scored": None, "seconds": 0.0}
    for name, value in on.items():
        note[name] = list(dict.fromkeys([*note.get(name, ()), value]))
    run.write_note(note)
    if not run.is_trained:
        for seconds in children.run(run.train_command(), run.folder / f"{TRAIN}.log"):
            note["seconds"] += seconds
            run.write_note(note)
        note["trained"] = True
        run.write_note(note)
    if run.row.scored_on and run.results() is None:
        for _ in children.run(run.score_command(), run.folder / f"{SCORE}.log"):
            pass
        note["scored"] = run.scoring
        run.write_note(note)


def _print_plan(runs: Sequence[Run]) -> None:
    for run in runs:
        print(f"{run.name}: {run.status()}  ({run.row.about})")
        for words in (run.train_command(), run.score_command()):
            if words:
                print(f"  {shlex.join(words)}")


def _outcome(run: Run) -> str:
    found = run.results()
    if found is None:
        return "trained"
    return f"mAP {100 * found['mAP']:.2f}  rank-1 {100 * found['rank1']:.2f}"


def _do(runs: Sequence[Run], children: _Children, publish: Any) -> list[str]:
    """Does all runs, one after the other; returns the names of those that failed."""
    failed: list[str] = []
    on: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        where = f"[{number}/{len(runs)}] {run.name}"
        if run.start is not None and run.start.name in failed:
            print(f"error: {where}: left out, since {run.start.name}, which it starts from, failed", file=sys.stderr)
            failed.append(run.name)
            continue
        try:
            if not run.is_done:
                on = on or {"devices": _device(), "versions": _version()}
                print(f"{where}: {run.status()}, runs now; what it prints is in {run.folder}", flush=True)
                _train_and_score(run, children, on)
                publish()
            print(f"{where}: {_outcome(run)}", flush=True)
        except _StoppedError as error:
            raise _StoppedError(f"{where}: {error}; the same command goes on") from None
        except UserError as error:
            print(f"error: {where}: {one_line(error)}", file=sys.stderr, flush=True)
            failed.append(run.name)
        if children.stopped:
            raise _StoppedError(f"stopped by {children.stopped.name} after {run.name}; the same command goes on")
    return failed


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("dmosnet_jax.tools.reproduce", __doc__)
    parser.add_argument("table", choices=tuple(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--workdir", default="", help="folder of the table (default: runs/TABLE)")
    parser.add_argument("--data_dir", default="data", help="folder or URL of converted data sets (default: data)")
    parser.add_argument("--weights", default="", help="folder of weight files that rows start from")
    parser.add_argument("--only", action="append", default=[], metavar="ROW[/SEED]", help="may be given several times")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="[ROW:]FIELD=VALUE",
        help="a field of the rows' configs, e.g. train.epochs=2; the table names it; may be given several times",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the runs, how far they are, and their commands")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
        UserError: a bad argument, a failed run, or a signal.
    """
    given = _arguments(arguments)
    table = TABLES[given.table]
    if files.is_remote(given.workdir):
        raise ConfigError(f"--workdir={given.workdir}: runs are in local folders: give a path")
    weights = pathlib.Path(files.tidy(given.weights)) if given.weights else None
    if weights is not None and not weights.is_dir():
        raise ConfigError(f"--weights={given.weights}: no such folder")
    workdir = pathlib.Path(files.tidy(given.workdir or f"runs/{given.table}"))
    places = Places(workdir, files.tidy(given.data_dir), weights)
    runs = runs_of(table, places, parse_overrides(given.override, table))
    wanted = chosen(runs, given.only)
    if given.dry_run:
        _print_plan(wanted)
        return

    def publish() -> list[pathlib.Path]:
        return outcome.write(table, given.table, runs, workdir)

    children = _Children()
    with children.listening():
        failed = _do(wanted, children, publish)
    written = publish()
    print(f"\n{written[0].read_text(encoding='utf-8')}\nwritten: {', '.join(map(str, written))}")
    if failed:
        raise _RunFailedError(f"{len(failed)} of {len(wanted)} runs failed: {', '.join(failed)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command.guarded(lambda: run(arguments))


if __name__ == "__main__":
    # Signals are the runs': see `_Children`.
    command.run_program(main, watch=False)
