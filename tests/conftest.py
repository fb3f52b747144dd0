"""Strict numerics, eight CPU devices, the shared reference files, a tiny data set and the command line."""

import os

# Must be set before jax starts its backends: sharded code is tested on eight devices wherever the tests run.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import gc
import io
import json
import pathlib
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import google_crc32c
import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

from tests.array_types import check_arrays

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = pathlib.Path(os.environ.get("DMOSNET_SHARED", ROOT.parent / "shared"))
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))

# Tracing makes many objects that stay: looking through them for garbage again and again is a tenth of its time.
gc.set_threshold(100_000)

# A shell starts background jobs with SIGINT ignored, and commands started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compilation dominates the suite on CPU; the cache is safe because its keys hold the program and the compiler version.
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Must stand before the first import of these packages: calls of their functions check the annotated array shapes.
CHECKED_PACKAGES = [
    *("data_prep.check", "data_prep.sources", "data_prep.synthetic"),
    *("dmosnet_jax.data", "dmosnet_jax.evaluation", "dmosnet_jax.losses", "dmosnet_jax.memory"),
]
jaxtyping.install_import_hook(CHECKED_PACKAGES, f"{check_arrays.__module__}.{check_arrays.__name__}")

# The test extra brings these: where continuous integration lacks one, a test that needs it must not just be skipped.
_EXTRAS = ("tensorflow", "tensorflow_datasets", "sklearn", "onnx", "onnxruntime", "cv2", "starlette", "playwright")


def pytest_collection_modifyitems(items):
    """Whole runs first, the longest file before them: at the end no process is left alone with one."""
    whole_runs = ROOT / "tests" / "recipes"
    items.sort(key=lambda item: (item.path.parent != whole_runs, item.path != whole_runs / "test_runs.py"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fails a test that was skipped in CI for want of a package of the test extra."""
    report = yield
    if os.environ.get("CI") and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if "import" in reason and any(name in reason for name in _EXTRAS):
            report.outcome, report.longrepr = "failed", f"not to be skipped in CI: {reason}"
    return report


def shared_file(relative: str) -> pathlib.Path:
    """Path of a reference file, or skips the calling test with the reason."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference file {relative} not found (set DMOSNET_SHARED to the folder that holds it)")
    return path


@pytest.fixture
def shared():
    """The function `shared(relative_path)`: skips with a reason where the reference files are absent."""
    return shared_file


@pytest.fixture
def no_array_checks():
    """Lets arrays of wrong shapes through, to test what a user of the package is told about them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator, the same for every test."""
    return np.random.default_rng(0)


# A data set small enough for whole runs, written byte by byte: nothing of the package or of TensorFlow takes part.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _example(image: bytes, pid: int, camid: int, filename: str) -> bytes:
    """A serialised `tf.train.Example`; field numbers as in tensorflow/core/example/feature.proto."""
    features = {
        "image": _field(1, _field(1, image)),
        "pid": _field(3, _field(1, _varint(pid % 2**64))),
        "camid": _field(3, _field(1, _varint(camid))),
        "filename": _field(1, _field(1, filename.encode())),
    }
    return _field(1, b"".join(_field(1, _field(1, name.encode()) + _field(2, f)) for name, f in features.items()))


def _framed(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def _picture(rng: np.random.Generator, pid: int, camid: int) -> bytes:
    """A JPEG whose three bands have the identity's colours, shifted by the camera, under noise."""
    colours = np.random.default_rng(1000 + pid).integers(0, 256, (3, 1, 1, 3)) + 12 * camid
    bands = np.broadcast_to(colours, (3, 16, 24, 3)).reshape(48, 24, 3) + rng.normal(0, 24, (48, 24, 3))
    out = io.BytesIO()
    Image.fromarray(bands.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
    return out.getvalue()


def write_tiny(
    data_dir: pathlib.Path,
    name: str = "tiny",
    *,
    splits: tuple[str, ...] = ("train", "query", "gallery"),
    ids: int = 8,
    cameras: int = 2,
    images: int = 3,
    labelled: bool = True,
    picture: Callable[[np.random.Generator, int, int], bytes] = _picture,
) -> pathlib.Path:
    """Writes a converted data set in two shards a split and returns its folder."""
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(name))
    described = []
    for number, split in enumerate(splits):
        first = 1 + (0 if split == "train" else 100)
        rows = [(first + i, c, k) for i in range(ids) for c in range(1, cameras + 1) for k in range(images)]
        framed = [
            _framed(
                _example(
                    picture(rng, pid, camid), pid if labelled else -1, camid, f"{split}/{pid:04d}_c{camid}_{k}.jpg"
                )
            )
            for pid, camid, k in rows
        ]
        shards = [framed[: len(framed) // 2], framed[len(framed) // 2 :]]
        for shard, records in enumerate(shards):
            (folder / f"{name}-{split}.tfrecord-{shard:05d}-of-00002").write_bytes(b"".join(records))
        described.append({"name": split, "shardLengths": [str(len(s)) for s in shards]})
        assert number < 4
    info = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def tiny_writer():
    """See `write_tiny`."""
    return write_tiny


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> pathlib.Path:
    """A data_dir with the data set `tiny`: 8 identities x 2 cameras x 3 images in each of train, query and gallery.

    And `elsewhere`, six identities under three cameras to train on.
    """
    data_dir = tmp_path_factory.mktemp("data")
    write_tiny(data_dir)
    write_tiny(data_dir, "elsewhere", splits=("train",), ids=6, cameras=3)
    return data_dir


# The command line, as a user runs it.


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a command left behind; `errors` are the lines on stderr that are not a progress bar's."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        lines = self.err.replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip("\x1b[A ") and not re.search(r"\d+%\|.*\d/\d", line)]


class CommandLine:
    """Runs `python -m dmosnet_jax.main` in processes of their own, outside of the checkout."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._server: subprocess.Popen | None = None
        self._jobs = 0

    def start(
        self, *args: str, devices: int = 1, script: str | None = None, before: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen:
        """Starts a command; `script` runs instead of the module, and `before` is put in front."""
        what = ["-m", "dmosnet_jax.main"] if script is None else ["-c", script]
        return subprocess.Popen(
            [*before, sys.executable, *what, *args],
            cwd=self.folder,
            env=_environment(devices) | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args: str, timeout: float = 1800, **options: Any) -> Finished:
        """Runs a command to its end."""
        process = self.start(*args, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Finished(process.returncode, out, err)

    def forked(self, *args: str, devices: int = 1, script: str | None = None) -> Finished:
        """Runs a command in a fork of a process that has imported the libraries; the network `small` is known there."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                cwd=self.folder,
                env=_environment(1),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._jobs += 1
        out, err = (self.folder / f"{self._jobs}.{name}" for name in ("out", "err"))
        flags = _environment(devices)["XLA_FLAGS"]
        self._server.stdin.write(json.dumps([str(out), str(err), flags, script or _MODULE, *args]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Finished(status, out.read_text(), err.read_text())

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            self._server.communicate()


_MODULE = """
import runpy
from tests.recipes import small

small.register()
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""

# The libraries take seconds to import; nothing of them has threads or devices before the fork.
_SERVER = """
import gc, importlib, json, os, sys
for recipe in ("spcl", "spcl_uda", "supervised", "evaluate", "compare", "extract", "activation_maps", "index",
               "search", "export", "cfs"):
    importlib.import_module("dmosnet_jax.recipes." + recipe)
gc.freeze()
gc.set_threshold(100_000)
answers = os.dup(1)
for line in sys.stdin:
    out, err, flags, script, *args = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ["XLA_FLAGS"] = flags
        sys.argv = ["dmosnet_jax.main", *args]
        exec(script, {"__name__": "__main__"})
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(answers, f"{status}\\n".encode())
"""


def _environment(devices: int) -> dict[str, str]:
    # Whole runs are compared with each other only: code that is compiled in two thirds of the time does as well.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    """See `CommandLine`."""
    line = CommandLine(tmp_path_factory.mktemp("cli"))
    yield line
    line.close()


@pytest.fixture(scope="session")
def tiny_flags(tiny_data):
    """The function `tiny_flags(recipe, **fields)`: flags of a run of `recipe` on the tiny data, two epochs of ten."""

    def flags(recipe: str, **fields: Any) -> list[str]:
        config = {
            "dataset": "tiny",
            "data_dir": str(tiny_data),
            "image_size": "(64, 32)",
            "model.name": "osnet_x0_25",
            "eval.batch_size": 16,
            "eval.report": False,
            "data.threads": 1,
        }
        if recipe in ("finetune", "spcl_market1501", "spcl_uda"):
            config |= {
                "batch_size": 16,
                "model.bn_group_size": 8,
                "train.epochs": 2,
                "train.steps_per_epoch": 10,
                "train.log_every_steps": 1,
                "train.checkpoint_every_steps": 4,
                "train.eval_every_epochs": 1,
            }
        if recipe in ("spcl_market1501", "spcl_uda"):
            config |= {"spcl.k1": 8, "spcl.k2": 3}
        if recipe == "spcl_uda":
            config |= {"source": "elsewhere", "batch_size": 32}
        return [f"--config={ROOT}/configs/{recipe}.py", *(f"--config.{k}={v}" for k, v in (config | fields).items())]

    return flags
