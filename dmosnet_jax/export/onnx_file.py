"""A network as an ONNX file for trackers and inference servers, and the note beside it that BoxMOT reads.

    onnx_file.save("person.onnx", model, params, stats, input="unit", normalise=True)

The file has one input, `images` float32 [batch, 3, H, W] with free batch and fixed H and W, and one output, `output0`
float32 [batch, E]: the names and shapes that BoxMOT, Ultralytics, DeepStream and Triton expect.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmosnet_jax import __version__
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.trees import check
from dmosnet_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from dmosnet_jax.export import onnx_network
from dmosnet_jax.export.onnx_graph import Graph
from dmosnet_jax.models import Model

Tree = dict[str, Any]
SUFFIX, NOTE_SUFFIX = ".onnx", ".metadata.json"
# What `images` holds, and how it is told in the file.
INPUTS: Mapping[str, str] = {
    "imagenet": "RGB / 255, less ImageNet's mean, over its standard deviation",
    "unit": "RGB / 255, in [0, 1]",
    "byte": "RGB, 0 to 255",
}


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Tree,
    stats: Tree,
    *,
    input: str = "imagenet",  # noqa: A002 - the config's name
    normalise: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    properties: Mapping[str, str] | None = None,
) -> None:
    """Writes `path`, and beside it `<path>.metadata.json`.

    Args:
        path: file with the suffix `.onnx`.
        model: the network; a classifier is left out.
        params: its parameters.
        stats: its batch statistics.
        input: what the caller will feed, a key of `INPUTS`; whatever of the normalisation is then missing is in the
            graph. Normalising twice, outside and inside, is the classic mistake.
        normalise: whether the output has unit length.
        mean: per channel, of the pixels that the network was trained with, in [0, 1] units.
        std: likewise.
        properties: further facts for the file's metadata.

    Raises:
        ConfigError: another suffix, or an unknown input.
        DataError: the arrays are not the model's, or the file can't be written.
    """
    if pathlib.Path(path).suffix != SUFFIX:
        raise ConfigError(f"{path}: an ONNX file must have the suffix {SUFFIX}")
    data = serialise(
        model, params, stats, input=input, normalise=normalise, mean=mean, std=std, properties=properties or {}
    )
    note = {
        "schema_version": 1,
        "model_name": model.name,
        "preprocess": "resize",
        "model_kwargs": {"img_size": list(model.image_size)},
    }
    with atomic_write(path) as part:
        part.write_bytes(data)
    with atomic_write(f"{path}{NOTE_SUFFIX}") as part:
        part.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def serialise(
    model: Model,
    params: Tree,
    stats: Tree,
    *,
    input: str,  # noqa: A002
    normalise: bool,
    mean: Sequence[float],
    std: Sequence[float],
    properties: Mapping[str, str],
) -> bytes:
    """The file's bytes: see `save`.

    Raises:
        ConfigError: an unknown input.
        DataError: the arrays are not the model's.
    """
    if input not in INPUTS:
        raise ConfigError(f"onnx.input={input!r} is not known: use one of {', '.join(INPUTS)}")
    check(
        f"ONNX of {model.name}",
        map(_without_classifier, model.shapes()),
        map(_without_classifier, (params, stats)),
    )
    graph = Graph()
    images = graph.input("images", ("batch", 3, *model.image_size))
    pixels = onnx_network.affine(graph, images, "input", _normalisation(input, mean, std))
    feature = onnx_network.add_features(graph, pixels, model, params, stats)
    if normalise:
        feature = onnx_network.unit_length(graph, feature)
    graph.output(feature, "output0", ("batch", model.feature_dim))
    length = "unit length" if normalise else "any length"
    facts = {
        "model": model.name,
        "input": f"{input}: {INPUTS[input]}",
        "output": f"features of {model.feature_dim} values, of {length}; compare them by cosine",
        **properties,
    }
    height, width = model.image_size
    about = f"Person re-identification by {model.name}. Input {height}x{width}: {INPUTS[input]}."
    return graph.serialise(model.name, version=__version__, about=about, properties=facts)


def _without_classifier(tree: Any) -> Any:
    """It takes no part, and need not be there."""
    return {name: part for name, part in tree.items() if name != "classifier"} if isinstance(tree, Mapping) else tree


def _normalisation(kind: str, mean: Sequence[float], std: Sequence[float]) -> onnx_network.Affine:
    """From what `images` holds to what the network was trained with."""
    own_mean, own_std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if kind == "imagenet":
        given_mean, given_std = np.asarray(IMAGENET_MEAN), np.asarray(IMAGENET_STD)
    else:
        given_mean, given_std = np.zeros(3), np.full(3, 1.0 if kind == "unit" else 1 / 255)
    # pixel = given * given_std + given_mean, in [0, 1] units.
    return given_std / own_std, (given_mean - own_mean) / own_std
