"""Measures the conversion of LUPerson on this machine, against copying the files.

    python -m data_prep.benchmark --folder=/tmp/bench --images=200000

renders a few hundred pedestrians, writes as many different crops of them as asked for (about 4 kB each, in folders of
country, city and video), copies them, converts them, kills a conversion with SIGKILL when its first shard is finished,
and lets it go on. Prints a table of seconds, CPU seconds, images/s and peak memory of all processes together (their
proportional shares; Linux), and whether both conversions are equal. Everything but the table is removed again.
"""

import filecmp
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from data_prep import command
from data_prep.synthetic import pedestrians
from data_prep.synthetic.pedestrians import Scene, Studio
from dmosnet_jax.core.errors import ConfigError, DataError

# Crops of LUPerson have a few kilobytes.
_SCENE = Scene(train_ids=60, test_ids=10, cameras=5, images=2, distractors=0, junk=0, image_size=(192, 80))
_VIDEO, _CITY = 100, 20
_SAMPLE = 0.5

_FLAGS = command.own_flags()
flags.DEFINE_string("folder", None, "A folder that does not exist yet, where there is room.", _FLAGS)
flags.DEFINE_integer("images", 200_000, "How many crops to write.", flag_values=_FLAGS)
flags.DEFINE_float("shard_mib", 256, "Size of a shard in MiB.", flag_values=_FLAGS)


class Measured(NamedTuple):
    """Of a command: wall and CPU seconds, and peak memory of its processes in GB."""

    seconds: float
    cpu: float
    memory: float


def write_crops(folder: pathlib.Path, count: int) -> int:
    """Writes `count` different JPEG crops in folders like LUPerson's; returns their bytes."""
    studio = Studio(_SCENE)
    shots = pedestrians.plan(_SCENE)
    people = [np.asarray(studio.photograph(shot).convert("RGB"), np.int16) for shot in tqdm(shots, disable=None)]
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 4, (64, *people[0].shape)).astype(np.int16)
    total = 0
    for number in tqdm(range(count), desc="crops", disable=None, leave=False):
        video, place = divmod(number, _VIDEO)
        city = folder / f"country{video // _CITY // 5:03d}" / f"city{video // _CITY % 5}" / f"video{video % _CITY:04d}"
        if not place:
            city.mkdir(parents=True)
        light = np.int16(number // len(people) % 40 - 20)
        crop = np.roll(people[number % len(people)] + noise[rng.integers(64)] + light, number // 16_000, axis=1)
        out = io.BytesIO()
        Image.fromarray(crop.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=80)
        (city / f"{place:08d}_0000.jpg").write_bytes(out.getvalue())
        total += out.tell()
    return total


def measure(words: Sequence[str], until: Callable[[], bool] = lambda: False) -> Measured:
    """Runs a command; kills it as soon as `until` holds.

    Raises:
      DataError: it failed.
    """
    begin, before, peak = time.monotonic(), os.times(), 0.0
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    killed = False
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        if until():
            process.send_signal(signal.SIGKILL)
            killed = True
            break
        time.sleep(_SAMPLE)
    if process.wait() and not killed:
        raise DataError(f"{' '.join(words)} failed with exit status {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(time.monotonic() - begin, cpu, peak)


def _memory(root: int) -> float:
    """Gigabytes of a process and those below it."""
    total, waiting = 0, [root]
    while waiting:
        folder = pathlib.Path("/proc", str(waiting.pop()))
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, StopIteration):
            continue
    return total / 1e6


def run(folder: pathlib.Path, images: int, shard_mib: float) -> str:
    """Does what the module says; returns the table."""
    size = write_crops(folder / "raw", images)
    options = ["--dataset=luperson", f"--source={folder / 'raw'}", f"--shard_mib={shard_mib}"]
    convert = [sys.executable, "-m", "data_prep.convert", *options]
    done = folder / "two" / ".luperson.incomplete" / "done"
    rows = {
        "copy (cp -r)": measure(["cp", "-r", str(folder / "raw"), str(folder / "copy")]),
        "convert": measure([*convert, f"--data_dir={folder / 'one'}"]),
        "convert, killed": measure(
            [*convert, f"--data_dir={folder / 'two'}"], until=lambda: done.is_dir() and any(done.iterdir())
        ),
        "convert, going on": measure([*convert, f"--data_dir={folder / 'two'}"]),
    }
    equal = _equal(folder / "one" / "luperson" / "1.0.0", folder / "two" / "luperson" / "1.0.0")
    lines = [f"{images:,} images of {size / images:,.0f} bytes, {os.cpu_count()} CPU cores"]
    lines.append(f"{'':<18}{'seconds':>9}{'CPU s':>8}{'images/s':>10}{'GB':>7}")
    for name, row in rows.items():
        rate = "" if "," in name else f"{images / row.seconds:,.0f}"
        # Nobody waited for the workers of a killed process, so their time is not known.
        cpu = "" if "killed" in name else f"{row.cpu:.1f}"
        lines.append(f"{name:<18}{row.seconds:>9.1f}{cpu:>8}{rate:>10}{row.memory:>7.2f}")
    lines.append(f"both conversions are {'equal' if equal else 'DIFFERENT'}")
    return "\n".join(lines)


def _equal(one: pathlib.Path, two: pathlib.Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    same = names == sorted(path.name for path in two.iterdir())
    return same and not any(filecmp.cmpfiles(one, two, names, shallow=False)[1:])


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status."""
    return command.guarded(_run, argv)


def _run(argv: Sequence[str]) -> int:
    if command.parse(_FLAGS, argv, __doc__):
        return 0
    if not _FLAGS.folder or _FLAGS.images < 1:
        raise ConfigError("give --folder=NEW_FOLDER, and --images=N for another number than 200000")
    folder = pathlib.Path(_FLAGS.folder).expanduser()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot make {folder} ({error.strerror}): give a folder that does not exist") from error
    try:
        print(run(folder, _FLAGS.images, _FLAGS.shard_mib))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    command.start(main)
