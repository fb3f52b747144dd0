"""Measures the conversion of LUPerson on this machine, against copying the files.

    python -m data_prep.benchmark --folder=/tmp/bench --images=200000

renders a few hundred pedestrians, writes as many different crops of them as asked for (about 4 kB each, in folders of
country, city and video), copies them, and converts them. Prints a table of seconds, CPU seconds, images/s and peak
memory of all processes together (their proportional shares; Linux). Everything but the table is removed again.
"""

import io
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from data_prep import command
from data_prep.synthetic import pedestrians
from data_prep.synthetic.pedestrians import Scene, Studio
from dmosnet_jax.core.command import guarded
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
        video, image = divmod(number, _VIDEO)
        city = folder / f"country{video // _CITY // 5:03d}" / f"city{video // _CITY % 5}" / f"video{video % _CITY:04d}"
        if not image:
            city.mkdir(parents=True)
        light = np.int16(number // len(people) % 40 - 20)
        crop = np.roll(people[number % len(people)] + noise[rng.integers(64)] + light, number // 16_000, axis=1)
        out = io.BytesIO()
        Image.fromarray(crop.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=80)
        (city / f"{image:08d}_0000.jpg").write_bytes(out.getvalue())
        total += out.tell()
    return total


def measure(words: Sequence[str]) -> Measured:
    """Runs a command.

    Raises:
      DataError: it failed.
    """
    begin, before, peak = time.monotonic(), os.times(), 0.0
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(_SAMPLE)
    if process.returncode:
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
    rows = {
        "copy (cp -r)": measure(["cp", "-r", str(folder / "raw"), str(folder / "copy")]),
        "convert": measure([sys.executable, "-m", "data_prep.convert", *options, f"--data_dir={folder / 'data'}"]),
    }
    lines = [f"{images:,} images of {size / images:,.0f} bytes, {os.cpu_count()} CPU cores"]
    lines.append(f"{'':<14}{'seconds':>9}{'CPU s':>8}{'images/s':>10}{'GB':>7}")
    for name, row in rows.items():
        lines.append(f"{name:<14}{row.seconds:>9.1f}{row.cpu:>8.1f}{images / row.seconds:>10,.0f}{row.memory:>7.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status."""
    return guarded(lambda: _run(argv))


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
