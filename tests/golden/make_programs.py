"""Writes programs.json: digests of every network's training and evaluation step, as JAX hands them to the compiler.

    python tests/golden/make_programs.py

A refactoring must leave them as they are; who means to change a program runs this and commits the difference. The text
of a program depends on the libraries that write it, so the file says which these were.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
FILE = HERE / "programs.json"
# All families at their smallest width.
NETWORKS = (
    "dmosnet_ibn_x0_25",
    "dmosnet_x0_25",
    "osnet_ain_x0_25",
    "osnet_ibn_x0_25",
    "osnet_x0_25",
    "resnet50",
    "resnet50_ibn_a",
)
IMAGE_SIZE = (64, 32)
BATCH = 8
CLASSES = 4


def made_with() -> dict[str, str]:
    """Versions of the libraries that the text of a program depends on, and the kind of device it is for."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {**versions, "backend": jax.default_backend()}


def digests(name: str) -> dict[str, str]:
    """SHA-256 of the StableHLO of a network's steps, lowered for one device and not compiled."""
    import jax
    import jax.numpy as jnp

    from configs import finetune
    from dmosnet_jax import models
    from dmosnet_jax.core.parallel import make_mesh
    from dmosnet_jax.data import augment
    from dmosnet_jax.train import optim, state, steps

    config = finetune.get_config()
    model = models.build(name, num_classes=CLASSES, image_size=IMAGE_SIZE)
    rate = optim.learning_rate(config.optim, steps_per_epoch=100, total_steps=12_000)
    optimiser = optim.make_optimiser(config.optim, rate)
    params, stats = model.shapes()
    start = state.shapes(params, stats, optimiser)
    images = jax.ShapeDtypeStruct((BATCH, *IMAGE_SIZE, 3), jnp.uint8)
    batch = {"image": images, "pid": jax.ShapeDtypeStruct((BATCH,), jnp.int32)}

    def evaluation(params, stats, images):
        pixels = augment.normalise(images, config.pixel_mean, config.pixel_std)
        return model.apply(params, stats, pixels, train=False)[0]["feature"]

    mesh = make_mesh(jax.devices()[:1])
    training = steps.compile_step(steps.supervised_step(model, optimiser, config), start, mesh)
    # The tests forbid JAX to mix types, and Optax does.
    with jax.numpy_dtype_promotion("standard"):
        programs = {
            "train": training.lower(start, batch),
            "evaluation": jax.jit(evaluation).lower(params, stats, images),
        }
    return {step: digest(program) for step, program in programs.items()}


def digest(lowered: Any) -> str:
    """Of the program alone: without locations, names of results, and names of functions."""
    text = re.sub(r'jax\.result_info = "[^"]*"', "", lowered.as_text(debug_info=False))
    symbols: dict[str, str] = {}
    text = re.sub(r"@[\w.$-]+", lambda found: symbols.setdefault(found[0], f"@{len(symbols)}"), text)
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Writes the file."""
    contents = {"made_with": made_with(), "programs": {name: digests(name) for name in NETWORKS}}
    FILE.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # As in the tests, which have several devices: the programs of XLA alone.
    os.environ["DMOSNET_CPU_KERNELS"] = "0"
    sys.path.insert(0, str(HERE.parent.parent))
    main()
