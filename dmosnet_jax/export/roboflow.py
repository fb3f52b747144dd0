"""What Roboflow's `reid` needs beside the weights of a network that it has: its names of files and of settings."""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence

from dmosnet_jax.models import Model
from dmosnet_jax.models.osnet import CHANNELS

WEIGHTS, CONFIG = "weights.safetensors", "reid_config.json"


def has(model: Model) -> bool:
    """Whether `reid` 0.1 builds the network: OSNet without IBN and attention, with torchreid's neck."""
    plain = model.name in {f"osnet_{width}" for width in CHANNELS}
    return plain and not any(model.attention) and model.neck == "fc" and model.pool == "avg"


def add(
    folder: pathlib.Path,
    weights: pathlib.Path,
    model: Model,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> None:
    """Writes both files.

    Args:
        folder: where to.
        weights: by torchreid's names, in the same folder.
        model: the network.
        mean: per channel, in [0, 1] units.
        std: likewise.
        interpolation: filter that resizes the images.
    """
    try:
        os.link(weights, folder / WEIGHTS)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(weights, folder / WEIGHTS)
    preprocessing = {
        "input_size": list(model.image_size),
        "mean": list(mean),
        "std": list(std),
        "interpolation": interpolation,
        # Frames of OpenCV are BGR.
        "to_rgb": True,
        "resize_mode": "stretch",
        # Not used when stretching.
        "pad_value": 114,
    }
    text = json.dumps({"architecture": model.name, "preprocessing": preprocessing}, indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
