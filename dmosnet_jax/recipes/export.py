"""Weights of any kind, in and out: a run's checkpoint, a PyTorch file or a folder of ours; and out only, ONNX."""

import dataclasses
import os
import pathlib
from typing import Any

from dmosnet_jax.core import files, safe_json
from dmosnet_jax.core.errors import ConfigError, DataError, printable
from dmosnet_jax.core.parallel import print_once
from dmosnet_jax.export import folder, model_card, onnx_file, torch_export
from dmosnet_jax.export.weights import open_weights
from dmosnet_jax.models import Model
from dmosnet_jax.recipes.network import options_of, require_paths

# One in a thousand pairs of different people is taken for one.
FALSE_ACCEPT_RATE = 1e-3
_FILES = (*torch_export.SUFFIXES, onnx_file.SUFFIX)


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
        results=config.results or None,
        threshold=config.threshold,
        false_accept_rate=config.false_accept_rate,
        stablehlo=config.stablehlo,
        onnx_input=config.onnx.input,
        normalise=config.onnx.normalise,
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
    is_file = suffix in _FILES
    if not is_file and not suffix[1:].isdigit() and suffix:
        raise ConfigError(
            f"{target}: {suffix} is no form that is written: use one of {', '.join(_FILES)} for a file, or a name "
            "without suffix for a folder"
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
    results: str | os.PathLike[str] | None = None,
    threshold: float | None = None,
    false_accept_rate: float = FALSE_ACCEPT_RATE,
    stablehlo: bool = False,
    onnx_input: str = "imagenet",
    normalise: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Model:
    """Exports weights.

    Args:
        source: see `open_weights`.
        target: a file with the suffix `.safetensors`, `.pth`, `.pt` or `.onnx`, or a folder.
        layout: of a file, see `torch_export.to_state_dict`; None takes fast-reid's names for a BNNeck and torchreid's
            for others, where these code bases have the network.
        keep_classifier: keep the training identities' classifier.
        origin: for a card: where the weights come from; default the source's path, or what its own card says.
        licence: for a card.
        interpolation: for a folder's card: filter that resizes the images; None: as the weights say.
        results: for a folder's card: the `results.json` of an evaluation of these weights.
        threshold: for a folder's card: similarity from which on two images are taken for one person; None: that of the
            results.
        false_accept_rate: at which the results' threshold is taken, of their first data set.
        stablehlo: whether a folder gets a program for JAX alone.
        onnx_input: for ONNX: what is fed, a key of `onnx_file.INPUTS`.
        normalise: for ONNX: whether features come out with unit length.
        overwrite: replace an earlier export.
        **options: options of `models.build` that the weights don't tell; None means: as they say.

    Returns:
        The network.

    Raises:
        ConfigError: the network isn't told, the layout has no such network, or the target is of another kind.
        DataError: the source can't be read or belongs to another network, or the target can't be written.
    """
    check_target(target, overwrite=overwrite)
    weights = open_weights(source)
    model = weights.model(**options, num_classes=weights.num_classes if keep_classifier else 0)
    params, stats = weights.arrays(model)
    own = weights.card or folder.Card(model, weights.mean, weights.std, source=str(source))
    interpolation = interpolation or weights.interpolation
    origin, licence = origin or own.source, licence or own.licence
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
    card = dataclasses.replace(own, model=model, interpolation=interpolation, source=origin, licence=licence, **inputs)
    card = _with_threshold(card, results, threshold, false_accept_rate)
    folder.save(target, params, stats, card, with_program=stablehlo, overwrite=overwrite)
    return model


def _with_threshold(
    card: folder.Card, results: str | os.PathLike[str] | None, threshold: float | None, rate: float
) -> folder.Card:
    """The card with the scores and the threshold of a `results.json`, or with the caller's threshold.

    Raises:
        ConfigError: the results have no threshold at this rate.
        DataError: they can't be read, or are another network's.
    """
    if results is not None:
        try:
            found = safe_json.read_object(results, fix="give the results.json of an evaluation")
        except FileNotFoundError as error:
            raise DataError(f"{results}: can't be read ({error.strerror}); give a results.json") from error
        evaluations = model_card.scores_of(found, str(results))
        if found.get("model") != card.model.name:
            raise DataError(
                f"{results}: was made with model {printable(found.get('model'))}, not {card.model.name}: give that of "
                "an evaluation of these weights"
            )
        at_rate = model_card.threshold_at(evaluations, rate, str(results))
        card = dataclasses.replace(
            card, evaluations=evaluations, threshold=at_rate, false_accept_rate=None if at_rate is None else rate
        )
    if threshold is not None:
        card = dataclasses.replace(card, threshold=threshold, false_accept_rate=None)
    return card


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
