"""Weights of any kind, in and out: a run's checkpoint, a PyTorch file or a folder of ours; and out only, ONNX."""

import os
import pathlib
from typing import Any

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import print_once
from dmosnet_jax.export import folder, onnx_file, torch_export
from dmosnet_jax.export.weights import open_weights
from dmosnet_jax.models import Model
from dmosnet_jax.recipes.network import options_of, require_paths


def run(config: Any, workdir: pathlib.Path) -> None:
    """Runs the recipe; nothing is written to the workdir.

    Raises:
        ConfigError: no checkpoint or output given, the network is not told, or the layout has no such network.
        DataError: the checkpoint can't be read or is another network's, or the output can't be written.
    """
    del workdir
    require_paths(config, "checkpoint", "output")
    model = convert(
        config.checkpoint,
        config.output,
        layout=config.layout or None,
        keep_classifier=config.keep_classifier,
        origin=config.source,
        licence=config.licence,
        image_size=config.image_size,
        interpolation=config.data.interpolation or None,
        onnx_input=config.onnx.input,
        normalise=config.onnx.normalise,
        **options_of(config),
    )
    print_once(f"{model.name}: {config.checkpoint} written to {config.output}")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | None = None,
    keep_classifier: bool = True,
    origin: str = "",
    licence: str = "",
    interpolation: str | None = None,
    onnx_input: str = "imagenet",
    normalise: bool = False,
    **options: Any,
) -> Model:
    """Exports weights.

    Args:
        source: see `open_weights`.
        target: a file with the suffix `.safetensors`, `.pth`, `.pt` or `.onnx`, or a folder that doesn't exist yet.
        layout: of a file, see `torch_export.to_state_dict`; None takes fast-reid's names for a BNNeck and torchreid's
            for others, where these code bases have the network.
        keep_classifier: keep the training identities' classifier.
        origin: for a folder's card: where the weights come from; default the source's path.
        licence: for a folder's card.
        interpolation: for a folder's card: filter that resizes the images; None: as the weights say.
        onnx_input: for ONNX: what is fed, a key of `onnx_file.INPUTS`.
        normalise: for ONNX: whether features come out with unit length.
        **options: options of `models.build` that the weights don't tell; None means: as they say.

    Returns:
        The network.

    Raises:
        ConfigError: the network isn't told, or the layout has no such network.
        DataError: the source can't be read or belongs to another network, or the target can't be written.
    """
    weights = open_weights(source)
    model = weights.model(**options, num_classes=weights.num_classes if keep_classifier else 0)
    params, stats = weights.arrays(model)
    interpolation, origin = interpolation or weights.interpolation, origin or str(source)
    suffix = pathlib.Path(target).suffix
    if suffix in torch_export.SUFFIXES:
        _check_name(target, model)
        layout = layout or _usual_layout(model)
        arrays = torch_export.to_state_dict(params, stats, model, layout=layout, batches=weights.batches)
        torch_export.save(target, arrays)
        return model
    if layout is not None:
        suffixes = ", ".join(torch_export.SUFFIXES)
        raise ConfigError(f"{target}: layout={layout!r} is for a file: give it one of the suffixes {suffixes}")
    inputs: dict[str, Any] = {"mean": weights.mean, "std": weights.std}
    if suffix == onnx_file.SUFFIX:
        facts = {"interpolation": interpolation, "source": origin, "licence": licence}
        onnx_file.save(target, model, params, stats, input=onnx_input, normalise=normalise, properties=facts, **inputs)
        return model
    card = folder.Card(model, interpolation=interpolation, source=origin, licence=licence, **inputs)
    folder.save(target, params, stats, card)
    return model


def _check_name(target: str | os.PathLike[str], model: Model) -> None:
    """Raises ConfigError where BoxMOT, which takes a `.pt` file's network from its name, would build another one."""
    path = pathlib.Path(target)
    plain = f"osnet_{model.name.rpartition('osnet_')[2]}"
    if path.suffix == ".pt" and any(model.attention) and "osnet" in path.name.lower():
        raise ConfigError(
            f"{target}: BoxMOT takes a .pt file's network from its name, and would build {plain} for {model.name}: "
            "leave osnet out of the name, or export it as .onnx, which has its network inside"
        )


def _usual_layout(model: Model) -> str:
    """fast-reid's names for its kind of head, else the first layout that has the network.

    Raises:
        ConfigError: none has.
    """
    preferred = sorted(torch_export.EXPORTS, key=lambda name: model.neck == "bnneck" and name != "fastreid")
    for name in preferred:
        if torch_export.fits(model, name):
            return name
    raise ConfigError(f"model {model.name} fits no PyTorch code base: export it as a folder (a path without a suffix)")
