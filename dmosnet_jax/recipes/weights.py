"""From a config and the weights that it names to a model and its parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.trees import differences
from dmosnet_jax.export import opening, torch_import
from dmosnet_jax.models import Model, build

Tree = dict[str, Any]


# Parts that may differ between a network and the weights that its training starts from.
HEAD = ("neck", "pool", "classifier")


def build_for(
    config: Any, opened: opening.Opened | None = None, *, num_classes: int = 0, free: Sequence[str] = ()
) -> Model:
    """The model that a config asks for; what it leaves open is as the weights say, or as in the paper.

    Args:
        config: the run's config.
        opened: weights that the model must fit.
        num_classes: classifier size.
        free: parts in which the config may differ from the weights: `HEAD` where they only start training.

    Raises:
        ConfigError: no model name, or unknown options.
        DataError: the config asks for another model than the weights hold.
    """
    chosen = {part: config.model.get(part) for part in opening.PARTS}
    if chosen["attention"] is not None:
        chosen["attention"] = tuple(int(bool(flag)) for flag in chosen["attention"])
    for part, value in (opened.options if opened else {}).items():
        if part not in chosen or (part in free and chosen[part] is not None):
            continue
        value = tuple(value) if part == "attention" else value
        if chosen[part] is not None and chosen[part] != value:
            raise DataError(
                f"{opened.path if opened else ''}: holds {part}={value!r}, but config.model.{part}={chosen[part]!r}: "
                f"give the checkpoint of that model, or --config.model.{part}={value!r}"
            )
        chosen[part] = value
    if chosen["name"] is None:
        chosen["name"] = config.get("default_model")
    if chosen["name"] is None:
        raise ConfigError("model.name is not set and the weights do not say it: give --config.model.name=NAME")
    options = {part: value for part, value in chosen.items() if value is not None}
    return build(
        **options,
        num_classes=num_classes,
        bn_group_size=config.model.bn_group_size or None,
        dtype=config.model.dtype,
        image_size=config.image_size,
    )


def as_trained(config: Any, opened: opening.Opened | None) -> Any:
    """The config with the input of the weights, or the usual one without weights, wherever it leaves that open.

    That is the image size, the filter that resizes, and the pixel statistics.
    """
    told = opened or opening.Opened("", {})
    known = {
        "image_size": tuple(told.options.get("image_size") or (256, 128)),
        "pixel_mean": tuple(told.mean),
        "pixel_std": tuple(told.std),
    }
    filled = config.copy_and_resolve_references()
    with filled.unlocked():
        for field, value in known.items():
            if filled[field] is None:
                filled[field] = value
        filled.data.interpolation = filled.data.interpolation or told.interpolation
    return filled


def start_from(opened: opening.Opened, model: Model, key: jax.Array) -> tuple[Tree, Tree, list[str]]:
    """Weights to start training from: the backbone must fit, a head that does not is drawn afresh.

    Returns:
        `(params, stats, drawn)`: `drawn` names the top-level parts that were drawn.

    Raises:
        DataError: the backbone belongs to another model; every difference is listed.
    """
    params, stats = model.init(key)
    if opened.state_dict is None:
        return _start_from_trees(opened, model, params, stats)
    heads = torch_import.HEADS
    try:
        found = torch_import.plan(opened.state_dict, model, missing_ok=heads, unexpected_ok=heads)
    except DataError as error:
        raise DataError(f"{opened.path}: {error}") from error
    drawn = sorted({name.split(".")[0] for name in found.left_out})
    return torch_import.fill(params, found.params), torch_import.fill(stats, found.stats), drawn


def _start_from_trees(opened: opening.Opened, model: Model, params: Tree, stats: Tree) -> tuple[Tree, Tree, list[str]]:
    assert opened.trees is not None
    merged, problems = [], []
    drawn: set[str] = set()
    for fresh, found in zip((params, stats), opened.trees, strict=True):
        wrong = {name for name in fresh if name not in found or differences({name: fresh[name]}, {name: found[name]})}
        for name in sorted(wrong - set(torch_import.HEADS)):
            problems += differences({name: fresh[name]}, {name: found[name]} if name in found else {})
        problems += [f"unexpected {name}" for name in set(found) - set(fresh) - set(torch_import.HEADS)]
        drawn |= wrong
        merged.append({name: fresh[name] if name in wrong else found[name] for name in fresh})
    if problems:
        raise DataError(f"{opened.path}: checkpoint does not fit model {model.name}: {'; '.join(problems)}")
    return merged[0], merged[1], sorted(drawn)


def settings_of(model: Model) -> dict[str, Any]:
    """JSON values that let `build` make the same model again."""
    return {**dataclasses.asdict(model), "feature_dim": model.feature_dim}
