"""Kills commands by SIGKILL at random moments, and compares what the same command makes of the rest.

    python -m tests.kill --runs=100

Training, SpCL over its epochs, conversion, extraction, CFS and export are run once without interruption. Then each is
started, killed one to three times at moments drawn over its length, and run to its end: its results must be the same
bytes (of checkpoints the same arrays, of metrics the same rows without times), with nothing beside them. Commands run
in forks of this process, which has the libraries loaded. The exit status is 1 where a run ended otherwise.
"""

import argparse
import collections
import contextlib
import gc
import hashlib
import importlib
import io
import json
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
# How often each kind comes in turn: the longer ones have more to be killed in.
TURNS = ("train", "spcl", "convert", "train", "spcl", "extract", "cfs", "convert", "spcl", "cfs", "train", "export")


def _main(*flags: str) -> Callable[[], None]:
    """The command line with these flags, to be run in a fork."""

    def run() -> None:
        from tests.recipes import small

        small.register()
        sys.argv = ["dmosnet_jax.main", *flags]
        runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)

    return run


def _convert(source: pathlib.Path, data_dir: pathlib.Path) -> Callable[[], None]:
    def run() -> None:
        sys.argv = ["convert", "--dataset=luperson", f"--source={source}", f"--data_dir={data_dir}"]
        sys.argv += ["--shard_mib=0.05", "--workers=1"]
        runpy.run_module("data_prep.convert", run_name="__main__", alter_sys=True)

    return run


class Bench:
    """What the commands need, and each command for a new place."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        # In a process of its own: what the tests import makes JAX stricter than it is for users.
        script = "import sys, pathlib, tests.conftest as c; c.write_tiny(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", script, str(folder / "data")], cwd=ROOT, check=True)
        rng = np.random.default_rng(0)
        for number in range(150):
            path = folder / "LUP" / "c" / f"city{number % 3}" / f"v{number % 5}" / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_photo(rng))
            if number < 40:
                (folder / "photos").mkdir(exist_ok=True)
                (folder / "photos" / path.name).write_bytes(path.read_bytes())

    def command(self, kind: str, place: pathlib.Path) -> Callable[[], None]:
        """The command of a kind that writes below a place."""
        common = {"data_dir": self.folder / "data", "dataset": "tiny", "data.threads": 1, "eval.batch_size": 16}
        trained, other = self.folder / "train" / "run", self.folder / "spcl" / "run"
        network = {"image_size": "(64, 32)", "model.name": "small"}
        training = {"batch_size": 16, "model.bn_group_size": 8, "train.epochs": 3, "train.steps_per_epoch": 6}
        training |= {"train.log_every_steps": 1, "train.checkpoint_every_steps": 2, "model.neck": "bnneck"}
        fields: dict[str, Any]
        if kind == "convert":
            return _convert(self.folder / "LUP", place / "out")
        if kind == "train":
            file, fields = "finetune", common | network | training | {"eval.report": False}
        elif kind == "spcl":
            file, fields = "spcl_market1501", common | network | training | {"spcl.k1": 8, "spcl.k2": 3}
            fields |= {"eval.report": False, "pretrained": trained}
        elif kind == "extract":
            file, fields = "extract", {"images": self.folder / "photos", "checkpoint": trained, "data.threads": 1}
            fields |= {"output": place / "out" / "features.npz", "eval.batch_size": 4}
        elif kind == "cfs":
            file, fields = "cfs_luperson", common | {"split": "train", "cfs.chunk_images": 5, "eval.batch_size": 5}
            fields |= {"checkpoint_pretrained": trained, "checkpoint_finetuned": other}
        else:
            file, fields = "export", {"checkpoint": trained, "output": place / "out" / "network"}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return _main(f"--config={ROOT}/configs/{file}.py", f"--workdir={place / 'run'}", *flags)


def _photo(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(out, "jpeg")
    return out.getvalue()


def results(place: pathlib.Path) -> dict[str, str]:
    """A digest of each thing that a command leaves, without what depends on the clock."""
    import orbax.checkpoint as ocp

    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if not path.is_file() or "checkpoints/" in name or ".tfevents." in name or name.endswith(".lock"):
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in content.decode().splitlines()]
            timed = ("images_per_second", "seconds_")
            content = json.dumps([{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]).encode()
        found[name] = hashlib.sha256(content.replace(str(place).encode(), b"")).hexdigest()
    for step in sorted(place.glob("run/checkpoints/*")):
        name = str(step.relative_to(place))
        found[name] = ""
        if not step.name.isdigit():
            continue
        with ocp.StandardCheckpointer() as reader:
            for item in ("model", "train"):
                tree = reader.restore(step.absolute() / item)
                found[f"{name}/{item}"] = hashlib.sha256(repr(_leaves(tree)).encode()).hexdigest()
    return found


def _leaves(tree: Any) -> list[tuple[str, bytes]]:
    import jax

    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in pairs]


def in_fork(function: Callable[[], Any], log: pathlib.Path, kill_after: float | None = None) -> tuple[int, float]:
    """Runs a function in a fork: its exit status (-9 where it was killed), and the seconds that it took."""
    since = time.monotonic()
    child = os.fork()
    if not child:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        status = 0
        try:
            function()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 70
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        took = time.monotonic() - since
        if done:
            return os.waitstatus_to_exitcode(status), took
        if kill_after is not None and took >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.005)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kinds", default="", help="of " + ", ".join(dict.fromkeys(TURNS)) + "; all by default")
    parser.add_argument("--minutes", type=float, default=0, help="begin no more runs after so many; 0 for no limit")
    given = parser.parse_args()
    for recipe in ("spcl", "supervised", "evaluate", "extract", "export", "cfs"):
        importlib.import_module(f"dmosnet_jax.recipes.{recipe}")
    importlib.import_module("data_prep.builders.luperson")
    gc.freeze()
    turns = [kind for kind in TURNS if kind in (given.kinds or kind).split(",")]
    draw, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(pathlib.Path(scratch))
        log = pathlib.Path(scratch, "log")
        expected, length = {}, {}
        # The other commands need a trained network.
        for kind in dict.fromkeys(TURNS if set(turns) - {"convert"} else turns):
            place = bench.folder / kind
            # Twice: the first run compiles.
            for _ in range(2):
                shutil.rmtree(place, ignore_errors=True)
                status, length[kind] = in_fork(bench.command(kind, place), log)
                if status:
                    raise RuntimeError(f"{kind}: {log.read_text()[-2000:]}")
            expected[kind] = _results_in_fork(place, bench.folder)
            print(f"{kind}: {length[kind]:.1f} s, {len(expected[kind])} results", flush=True)
        counts: collections.Counter[str] = collections.Counter()
        kills, wrong = collections.Counter[str](), []
        for number in range(given.runs):
            if given.minutes and time.monotonic() - began > 60 * given.minutes:
                break
            kind = turns[number % len(turns)]
            problem, killed = _try(bench, kind, expected[kind], length[kind], draw, log)
            counts[kind] += 1
            kills[kind] += killed
            if problem:
                wrong.append(f"run {number}: {kind}: {problem}")
                print(wrong[-1], flush=True)
        for kind, count in counts.items():
            print(f"{kind:10}{count:>5} runs killed {kills[kind]:>4} times")
        print(f"{sum(counts.values())} runs killed {sum(kills.values())} times, {len(wrong)} ended otherwise")
    return int(bool(wrong))


def _results_in_fork(place: pathlib.Path, folder: pathlib.Path) -> dict[str, str]:
    # Orbax starts threads, which forks do not have.
    answer = folder / "answer.json"
    status, _ = in_fork(lambda: answer.write_text(json.dumps(results(place))), folder / "answer.log")
    if status:
        raise RuntimeError((folder / "answer.log").read_text()[-2000:])
    return json.loads(answer.read_text())


def _try(
    bench: Bench, kind: str, expected: dict[str, str], seconds: float, draw: random.Random, log: pathlib.Path
) -> tuple[str, int]:
    """Kills a command and lets it end: what is wrong with the results, and how often it was killed."""
    place, killed = bench.folder / "killed", 0
    shutil.rmtree(place, ignore_errors=True)
    for _ in range(draw.choice([1, 1, 2, 3])):
        status, _ = in_fork(bench.command(kind, place), log, kill_after=draw.uniform(0.02, seconds))
        killed += status == -signal.SIGKILL
        if status not in (0, -signal.SIGKILL):
            return f"ended with {status}: {log.read_text()[-1500:]}", killed
        if not status:
            break
    else:
        status, _ = in_fork(bench.command(kind, place), log)
        if status and "exists already" not in log.read_text():
            return f"went on and ended with {status}: {log.read_text()[-1500:]}", killed
    found = _results_in_fork(place, bench.folder)
    other = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    # What a killed writer left aside is told by its name, and no result.
    other = [name for name in other if not name.endswith(".part") or name in expected]
    return (f"differs in {other[:8]}" if other else ""), killed


if __name__ == "__main__":
    sys.exit(main())
