"""Images per second: training, inference, SpCL's step and decoding, ours and PyTorch's turn about in one run.

    python -m dmosnet_jax.benchmarks.speed --against=torch --models=osnet_x1_0,osnet_x0_25 --batch=64 --output=speed.csv

`train` is our whole step (augmentation, cross-entropy and triplet loss, gradients, Adam) against PyTorch's forward and
backward pass with cross-entropy and Adam; `infer` is features without a classifier; `spcl` is our whole step with the
memory of 12,936 images, against the same with SpCL's own similarities to all images; `decode` is from JPEG bytes to the
network's input on one core, of crops of 128x64, in PyTorch Pillow as torchvision calls it. Only where `--tasks` names
them: `spcl_groups` is `spcl` with 16 images at a time on each device (`--config.spcl.groups_at_once=1`), `onnx` is
`infer` by onnxruntime (`--config.eval.runtime=onnxruntime`), from bytes. PyTorch runs channels-last, eager, with
autocast where the dtype is bfloat16, on a GPU compiled too (the faster counts).

Each round times one call of either side; figures are medians over the rounds after the first calls. `ratio` is our
rate over PyTorch's. CPU ms are processor time for an image; faults are page faults for a call; `GFLOP/s` counts
multiply-adds of convolutions and linear maps twice, and three times that for training; `of peak` is the share of what
one large matrix product reaches on this device in this run. Both sides have the allocator's settings of `main`
(`DMOSNET_MALLOC=0` for the system's).
"""

import argparse
import io
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dmosnet_jax.core import startup

startup.keep_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from PIL import Image  # noqa: E402

from dmosnet_jax import models  # noqa: E402
from dmosnet_jax.benchmarks import command  # noqa: E402
from dmosnet_jax.core import tables  # noqa: E402
from dmosnet_jax.core.command import guarded, run_program  # noqa: E402
from dmosnet_jax.core.errors import ConfigError  # noqa: E402
from dmosnet_jax.core.parallel import make_mesh, replicated, to_devices  # noqa: E402
from dmosnet_jax.data import transforms  # noqa: E402
from dmosnet_jax.export import onnx_runtime  # noqa: E402
from dmosnet_jax.memory import hybrid  # noqa: E402
from dmosnet_jax.models.counting import operations  # noqa: E402
from dmosnet_jax.train import state as train_state  # noqa: E402
from dmosnet_jax.train import steps  # noqa: E402
from dmosnet_jax.train.turns import Turns  # noqa: E402

USUAL = ("train", "infer", "spcl", "decode")
TASKS = (*USUAL, "spcl_groups", "onnx")
CLASSES, MEMORY, RATE, INSTANCES, GROUP = 751, 12_936, 3.5e-4, 4, 16
# The fields of the paper's fine-tuning (configs/finetune.py) that a step reads.
CONFIG = ConfigDict(
    {
        "augment": {"flip": 0.5, "pad": 10, "erase": 0.5, "erasing": "fastreid"},
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
        "loss": {
            "label_smoothing": 0.1,
            "triplet": "hinge",
            "triplet_margin": 0.3,
            "triplet_weight": 1.0,
            "triplet_on": "embedding",
        },
    }
)
Call = Callable[[], Any]


def our_step(
    name: str, batch: int, dtype: str, image_size: tuple[int, int], *, spcl: bool, groups_at_once: int | None = None
) -> tuple[Call, Any]:
    """A call that takes one training step and waits for it; and the model."""
    mesh = make_mesh()
    rng = np.random.default_rng(0)
    sizes: dict[str, Any] = {"image_size": image_size, "dtype": dtype}
    model = models.build(name, num_classes=0 if spcl else CLASSES, bn_group_size=GROUP if spcl else None, **sizes)
    optimiser = optax.adam(RATE)
    state = train_state.create(*model.init(jax.random.key(0)), optimiser, seed=0, mesh=mesh)
    if spcl:
        features = rng.standard_normal((MEMORY, model.feature_dim), np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        labels = rng.integers(0, MEMORY // 2, MEMORY).astype(np.int32)
        memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, capacity=MEMORY, mesh=mesh)
        state = state.replace(memory=memory)
        turns = Turns.of(groups_at_once, GROUP, batch, mesh)
        step = steps.spcl_step(model, optimiser, CONFIG, turns=turns)
    else:
        step = steps.supervised_step(model, optimiser, CONFIG)
    compiled = steps.compile_step(step, state, mesh)
    images = {
        "image": rng.integers(0, 256, (batch, *image_size, 3), np.uint8),
        "pid": (np.arange(batch) // INSTANCES % CLASSES).astype(np.int32),
        "index": rng.permutation(MEMORY)[:batch].astype(np.int32),
    }
    held: list[Any] = [state, to_devices(images, mesh)]

    def call() -> None:
        held[0], metrics = compiled(held[0], held[1])
        jax.block_until_ready(metrics)

    return call, model


def our_inference(name: str, batch: int, dtype: str, image_size: tuple[int, int]) -> tuple[Call, Any]:
    """A call that computes features of a batch and waits for them; and the model."""
    mesh = make_mesh()
    model = models.build(name, image_size=image_size, dtype=dtype)
    weights = jax.device_put(model.init(jax.random.key(0)), replicated(mesh))
    images = np.random.default_rng(0).standard_normal((batch, *image_size, 3), np.float32)
    placed = to_devices({"image": images}, mesh)["image"]

    def features(weights, images):
        params, stats = weights
        return model.apply(params, stats, images, train=False)[0]["feature"]

    compiled = jax.jit(features)
    return lambda: jax.block_until_ready(compiled(weights, placed)), model


def runtime_inference(name: str, batch: int, dtype: str, image_size: tuple[int, int]) -> tuple[Call, Any]:
    """A call that computes features of a batch by onnxruntime; and the model."""
    onnx_runtime.check("onnxruntime", dtype, field="--tasks=onnx")
    model = models.build(name, image_size=image_size)
    features = onnx_runtime.compile_features(model, *model.init(jax.random.key(0)))
    images = np.random.default_rng(0).integers(0, 256, (batch, *image_size, 3), np.uint8)
    return lambda: features(images), model


class Torch:
    """The same calls in PyTorch."""

    def __init__(self) -> None:
        try:
            import torch

            from dmosnet_jax.benchmarks import torch_networks
        except ImportError as error:
            raise ConfigError(f"--against=torch: {error}: pip install torch, or leave it out") from error
        self._torch, self._networks = torch, torch_networks
        self.device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"

    def _network(self, name: str, compiled: bool) -> Any:
        network: Any = self._networks.build(name, CLASSES)
        if network is None:
            return None
        network = network.to(self.device, memory_format=self._torch.channels_last)
        return self._torch.compile(network) if compiled else network

    def _autocast(self, dtype: str) -> Any:
        return self._torch.autocast(self.device, self._torch.bfloat16, enabled=dtype == "bfloat16")

    def _wait(self) -> None:
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    def _images(self, batch: int, image_size: tuple[int, int]) -> Any:
        images = self._torch.randn(batch, 3, *image_size, device=self.device)
        return images.contiguous(memory_format=self._torch.channels_last)

    def step(self, name: str, batch: int, dtype: str, image_size: tuple[int, int], *, spcl: bool, compiled: bool):
        """A training step with Adam; with `spcl` against a memory of all images, as SpCL computes it."""
        torch = self._torch
        network = self._network(name, compiled)
        if network is None:
            return None
        images = self._images(batch, image_size)
        classes = torch.arange(batch, device=self.device) // INSTANCES % CLASSES
        width = network.classifier.weight.shape[1]
        memory = torch.nn.functional.normalize(torch.randn(MEMORY, width, device=self.device))
        labels = torch.randint(0, MEMORY // 2, (MEMORY,), device=self.device)
        indices = torch.randperm(MEMORY, device=self.device)[:batch]
        optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], RATE)

        def against_memory(feature: Any) -> Any:
            feature = torch.nn.functional.normalize(feature.float())
            similarity = (feature @ memory.T / 0.05).T
            sums = torch.zeros(MEMORY // 2, batch, device=self.device).index_add_(0, labels, similarity)
            counts = torch.bincount(labels, minlength=MEMORY // 2)[:, None]
            weights = torch.exp(sums / counts.clamp(min=1)) * (counts > 0)
            shares = weights / (weights.sum(dim=0, keepdim=True) + 1e-6)
            return torch.nn.functional.nll_loss(torch.log(shares.T + 1e-6), labels[indices])

        def update_memory(feature: Any) -> None:
            with torch.no_grad():
                feature = torch.nn.functional.normalize(feature.float())
                memory[indices] = torch.nn.functional.normalize(0.2 * memory[indices] + 0.8 * feature)

        def call() -> None:
            optimiser.zero_grad(set_to_none=True)
            with self._autocast(dtype):
                feature, logits = network(images)
                loss = None if spcl else torch.nn.functional.cross_entropy(logits, classes, label_smoothing=0.1)
            loss = against_memory(feature) if loss is None else loss
            loss.backward()
            if spcl:
                update_memory(feature)
            optimiser.step()
            self._wait()

        return call

    def inference(self, name: str, batch: int, dtype: str, image_size: tuple[int, int], *, compiled: bool):
        """Features of a batch."""
        network = self._network(name, compiled)
        if network is None:
            return None
        network.eval()
        images = self._images(batch, image_size)

        def call() -> None:
            with self._torch.inference_mode(), self._autocast(dtype):
                network(images)
            self._wait()

        return call


def in_turns(calls: Sequence[Call | None], rounds: int, warm: int) -> list[dict[str, float] | None]:
    """Medians of seconds, processor seconds and page faults of each call, one after the other in every round."""
    seen: list[list[tuple[float, float, float]]] = [[] for _ in calls]
    for turn in range(warm + rounds):
        for call, rows in zip(calls, seen, strict=True):
            if call is None:
                continue
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            call()
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            if turn >= warm:
                rows.append((seconds, processor, after.ru_minflt - before.ru_minflt))
    names = ("seconds", "processor", "faults")
    return [
        dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True)) if rows else None
        for rows in seen
    ]


def peak_flops() -> float:
    """Operations per second of one large matrix product in float32, on all devices of this process."""
    side = 4096 if jax.default_backend() != "cpu" else 1536
    x = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds, _ = command.median_seconds(lambda: product(x), 5)
    return 2 * side**3 / seconds


def measure(
    task: str, name: str, batch: int, dtype: str, options: argparse.Namespace, peer: Torch | None
) -> dict[str, Any]:
    """One row of the table."""
    size = tuple(options.image_size)
    inference, spcl = task in ("infer", "onnx"), task.startswith("spcl")
    if inference:
        ours, model = (our_inference if task == "infer" else runtime_inference)(name, batch, dtype, size)
    else:
        at_once = 1 if task == "spcl_groups" else None
        ours, model = our_step(name, batch, dtype, size, spcl=spcl, groups_at_once=at_once)
    theirs: list[Call | None] = []
    if peer is not None:
        for compiled in (False, True) if peer.device == "cuda" else (False,):
            if inference:
                theirs.append(peer.inference(name, batch, dtype, size, compiled=compiled))
            else:
                theirs.append(peer.step(name, batch, dtype, size, spcl=spcl, compiled=compiled))
    mine, *others = in_turns([ours, *theirs], options.rounds, options.warm)
    assert mine is not None
    best = min((other for other in others if other), key=lambda other: other["seconds"], default=None)
    # A multiply-add is two operations, and training takes three times as many as inference.
    flops = 2 * batch * operations(model).total * (1 if inference else 3) / mine["seconds"]
    return _row(task, name, batch, dtype, mine, best, clock="seconds") | {
        "GFLOP/s": flops / 1e9,
        "of peak": flops / options.peak,
        "peak GiB": command.in_gib(command.device_peak() or command.peak_memory()),
    }


def _row(
    task: str, model: str, batch: int, dtype: str, mine: dict[str, float], other: dict[str, float] | None, *, clock: str
) -> dict[str, Any]:
    """Rates by `clock`, "seconds" or "processor"; the last three columns are still empty."""
    return {
        "task": task,
        "model": model,
        "batch": batch,
        "dtype": dtype,
        "images/s": batch / mine[clock],
        "PyTorch": batch / other[clock] if other else None,
        "ratio": other[clock] / mine[clock] if other else None,
        "CPU ms": 1e3 * mine["processor"] / batch,
        "PyTorch CPU ms": 1e3 * other["processor"] / batch if other else None,
        "faults": int(mine["faults"]),
        "PyTorch faults": int(other["faults"]) if other else None,
        **dict.fromkeys(("GFLOP/s", "of peak", "peak GiB")),
    }


def measure_decoding(options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of one core, from JPEG bytes to the array that crosses to the device."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(64):
        # Smooth, as photos are: noise would take the decoder several times as long.
        small = Image.fromarray(rng.integers(0, 256, (16, 8, 3), np.uint8))
        file = io.BytesIO()
        small.resize((64, 128), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    height, width = options.image_size

    def ours() -> None:
        for data in files:
            transforms.load(data, (height, width), "bilinear")

    def theirs() -> None:
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            np.asarray(image)

    mine, other = in_turns([ours, theirs if options.against else None], options.rounds * 4, options.warm)
    assert mine is not None
    return _row("decode", "-", len(files), "uint8", mine, other, clock="processor")


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    peer = Torch() if options.against == "torch" else None
    options.peak = peak_flops()
    for task in options.tasks:
        if task == "decode":
            yield measure_decoding(options)
            continue
        for name in options.models:
            for batch in options.batch:
                for dtype in options.dtype:
                    yield measure(task, name, batch, dtype, options, peer)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.parser("speed", __doc__)
    parser.add_argument("--against", choices=("torch", ""), default="", help="what to compare with")
    parser.add_argument("--tasks", type=command.some_of(TASKS), default=list(USUAL), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--models", type=command.some_of(models.names()), default=["osnet_x1_0", "osnet_x0_25"])
    parser.add_argument("--batch", type=command.sizes, default=[64], help="batch sizes, separated by commas")
    parser.add_argument("--dtype", type=command.some_of(("float32", "bfloat16")), default=["float32"])
    parser.add_argument("--image_size", type=int, nargs=2, default=(256, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--warm", type=int, default=3, help="calls before those")
    options = parser.parse_args(argv)
    if min(*options.batch, options.rounds) < 1 or options.warm < 1:
        parser.error("--batch, --rounds and --warm must be 1 or more")
    if "onnx" in options.tasks and options.dtype != ["float32"]:
        parser.error("--tasks=onnx computes in float32: give --dtype=float32")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    options = _arguments(sys.argv[1:] if argv is None else argv)

    def run() -> None:
        device = jax.devices()[0]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        print(f"{jax.device_count()} x {device.device_kind} ({device.platform}), {cores} cores, jax {jax.__version__}")
        rows = []
        for row in _rows(options):
            rows.append(row)
            print(f"{row['task']} {row['model']}: {row['images/s']:.1f} images/s", flush=True)
        tables.publish(rows, options.output)

    return guarded(run)


if __name__ == "__main__":
    run_program(main)
