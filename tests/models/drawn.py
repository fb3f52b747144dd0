"""Weights drawn by name, as the reference outputs were made, and drawn for whole trees."""

import json
import math
import zlib

import jax
import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.float32)
    if name.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        values = rng.normal(0, 0.1, shape)
    elif len(shape) >= 2:
        values = rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
    elif name.endswith("weight"):
        values = rng.uniform(0.8, 1.2, shape)
    else:
        values = rng.normal(0, 0.05, shape)
    return values.astype(np.float32)


def draw_all(keys_path) -> dict[str, np.ndarray]:
    shapes = json.loads(keys_path.read_text())
    return {name: draw(name, tuple(shape)) for name, shape in shapes.items()}


def draw_tree(tree, rng: np.random.Generator):
    """Leaves of a `shapes()` tree, drawn so that every norm and bias does something."""

    def leaf(path, shape):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, math.sqrt(2 / math.prod(shape[:-1])), shape)
        if name in ("bias", "mean"):
            return rng.normal(0, 0.1, shape)
        return np.full(shape, 3.0) if name == "p" else rng.uniform(0.8, 1.2, shape)

    return jax.tree_util.tree_map_with_path(lambda path, x: leaf(path, x.shape).astype(np.float32), tree)
