"""Weights of any kind to weights of any kind: a run's checkpoint, a PyTorch file or a folder of ours, in and out."""

import os
import pathlib
from typing import Any

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import print_once
from dmosnet_jax.export import folder, torch_export
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
    check_target(config.output, overwrite=config.overwrite)
    model = convert(
        config.checkpoint,
        config.output,
        layout=config.layout or None,
        keep_classifier=config.keep_classifier,
        origin=config.source,
        licence=config.licence,
        image_size=config.image_size,
        interpolation=config.data.interpolation or None,
        overwrite=config.overwrite,
        **options_of(config),
    )
    print_once(f"{model.name}: {config.checkpoint} written to {config.output}")


def check_target(target: str | os.PathLike[str], *, overwrite: bool = False) -> bool:
    """Whether a target is a file, by its suffix, and not a folder.

    Raises:
        ConfigError: it has the suffix of another kind of file.
        DataError: something is there already.
    """
    # The points of a version, as in `osnet_x0.25`, begin no suffix.
    suffix = pathlib.Path(target).suffix
    is_file = suffix in torch_export.SUFFIXES
    if not is_file and not suffix[1:].isdigit() and suffix:
        raise ConfigError(
            f"{target}: {suffix} is no form that is written: use one of {', '.join(torch_export.SUFFIXES)} for a file, "
            "or a name without suffix for a folder"
        )
    files.refuse_existing(target, overwrite=overwrite, may_replace=os.path.isfile if is_file else folder.is_folder)
    return is_file


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | None = None,
    keep_classifier: bool = True,
    origin: str = "",
    licence: str = "",
    interpolation: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Model:
    """Exports weights.

    Args:
        source: see `open_weights`.
        target: a file with the suffix `.safetensors`, `.pth` or `.pt`, or a folder.
        layout: of a file, see `torch_export.to_state_dict`; None takes fast-reid's names for a BNNeck and torchreid's
            for others, where these code bases have the network.
        keep_classifier: keep the training identities' classifier.
        origin: for a folder's card: where the weights come from; default the source's path.
        licence: for a folder's card.
        interpolation: for a folder's card: filter that resizes the images; None: as the weights say.
        overwrite: replace an earlier export.
        **options: options of `models.build` that the weights don't tell; None means: as they say.

    Returns:
        The network.

    Raises:
        ConfigError: the network isn't told, the layout has no such network, or the target is of another kind.
        DataError: the source can't be read or belongs to another network, or the target can't be written.
    """
    is_file = check_target(target, overwrite=overwrite)
    weights = open_weights(source)
    model = weights.model(**options, num_classes=weights.num_classes if keep_classifier else 0)
    params, stats = weights.arrays(model)
    if is_file:
        layout = layout or _usual_layout(model)
        arrays = torch_export.to_state_dict(params, stats, model, layout=layout, batches=weights.batches)
        torch_export.save(target, arrays)
        return model
    if layout is not None:
        suffixes = ", ".join(torch_export.SUFFIXES)
        raise ConfigError(f"{target}: layout={layout!r} is for a file: give it one of the suffixes {suffixes}")
    card = folder.Card(
        model,
        mean=weights.mean,
        std=weights.std,
        interpolation=interpolation or weights.interpolation,
        source=origin or str(source),
        licence=licence,
    )
    folder.save(target, params, stats, card, overwrite=overwrite)
    return model


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
