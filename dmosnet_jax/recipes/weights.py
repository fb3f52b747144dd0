"""Weights to start from or to evaluate, from a checkpoint of ours or from a PyTorch file, behind one interface."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.trees import differences
from dmosnet_jax.export import torch_import
from dmosnet_jax.models import Model, build
from dmosnet_jax.train import checkpoints

Tree = dict[str, Any]
_PARTS = ("name", "attention", "neck", "pool")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that may fit several models.

    Attributes:
        path: where they come from.
        settings: what is known of their model: name, attention, neck, pool.
        state_dict: arrays of a PyTorch file, or None.
        saved: a checkpoint of ours, or None.
    """

    path: str
    settings: dict[str, Any]
    state_dict: Mapping[str, Any] | None = None
    saved: checkpoints.SavedModel | None = None

    def convert(self, model: Model) -> tuple[Tree, Tree]:
        """The whole model's weights.

        Raises:
            DataError: they belong to another model; every difference is listed.
        """
        if self.state_dict is not None:
            try:
                return torch_import.convert(self.state_dict, model)
            except DataError as error:
                raise DataError(f"{self.path}: {error}") from error
        assert self.saved is not None
        params = {name: part for name, part in self.saved.params.items() if name != "classifier" or model.num_classes}
        problems = [
            problem
            for expected, found in zip(model.shapes(), (params, self.saved.stats), strict=True)
            for problem in differences(expected, found)
        ]
        if problems:
            raise DataError(f"{self.path}: checkpoint does not fit model {model.name}: {'; '.join(problems)}")
        return params, self.saved.stats

    def start(self, model: Model, key: jax.Array) -> tuple[Tree, Tree, list[str]]:
        """Weights to start training from: the backbone must fit, a head that does not is drawn afresh.

        Returns:
            `(params, stats, fresh)`: `fresh` names the top-level parts that were drawn.

        Raises:
            DataError: the backbone belongs to another model.
        """
        fresh_params, fresh_stats = model.init(key)
        if self.state_dict is not None:
            heads = torch_import.HEADS
            try:
                found = torch_import.plan(self.state_dict, model, missing_ok=heads, unexpected_ok=heads)
            except DataError as error:
                raise DataError(f"{self.path}: {error}") from error
            drawn = sorted({name.split(".")[0] for name in found.left_out})
            return (
                torch_import.fill(fresh_params, found.params),
                torch_import.fill(fresh_stats, found.stats),
                drawn,
            )
        assert self.saved is not None
        return _start_from_saved(self.path, self.saved, model, fresh_params, fresh_stats)


def _start_from_saved(
    path: str, saved: checkpoints.SavedModel, model: Model, params: Tree, stats: Tree
) -> tuple[Tree, Tree, list[str]]:
    trees, problems = [], []
    drawn: set[str] = set()
    for fresh, found in ((params, saved.params), (stats, saved.stats)):
        wrong = {name for name in fresh if name not in found or differences({name: fresh[name]}, {name: found[name]})}
        for name in sorted(wrong - set(torch_import.HEADS)):
            problems += differences({name: fresh[name]}, {name: found[name]} if name in found else {})
        problems += [f"unexpected {name}" for name in set(found) - set(fresh) - set(torch_import.HEADS)]
        drawn |= wrong
        trees.append({name: fresh[name] if name in wrong else found[name] for name in fresh})
    if problems:
        raise DataError(f"{path}: checkpoint does not fit model {model.name}: {'; '.join(problems)}")
    return trees[0], trees[1], sorted(drawn)


def open_weights(path: str) -> Weights:
    """Reads weights.

    Args:
        path: a run's workdir, checkpoint folder or step (see `checkpoints.find`), or a PyTorch or safetensors file.

    Raises:
        DataError: nothing there, or damaged.
    """
    place = pathlib.Path(path)
    if place.is_dir() or place.name == checkpoints.BEST:
        saved = checkpoints.load_model(place)
        model = saved.meta.get("model", {})
        return Weights(str(saved.path), {part: model.get(part) for part in _PARTS}, saved=saved)
    state_dict = torch_import.load(path)
    settings = {"neck": torch_import.infer_neck(state_dict), "pool": torch_import.infer_pool(state_dict)}
    return Weights(path, settings, state_dict=state_dict)


def build_for(
    config: Any, known: Mapping[str, Any] | None = None, *, num_classes: int = 0, where: str = "", start: bool = False
) -> Model:
    """The model that a config asks for, where the weights do not already say what it is.

    Args:
        config: the run's config.
        known: `Weights.settings`.
        num_classes: classifier size.
        where: the weights' path, for messages.
        start: the weights only start training, so neck and pool may differ.

    Raises:
        ConfigError: no model name, or unknown options.
        DataError: the config asks for another model than the weights hold.
    """
    chosen = {part: config.model[part] for part in _PARTS}
    if chosen["attention"] is not None:
        chosen["attention"] = tuple(int(bool(flag)) for flag in chosen["attention"])
    for part, value in (known or {}).items():
        if value is None or (start and part in ("neck", "pool") and chosen[part] is not None):
            continue
        value = tuple(value) if part == "attention" else value
        if chosen[part] is not None and chosen[part] != value:
            raise DataError(
                f"{where}: holds {part}={value!r}, but config.model.{part}={chosen[part]!r}: give the checkpoint of "
                f"that model, or --config.model.{part}={value!r}"
            )
        chosen[part] = value
    if chosen["name"] is None:
        chosen["name"] = config.get("default_model")
    if chosen["name"] is None:
        raise ConfigError("model.name is not set and the weights do not say it: give --config.model.name=NAME")
    return build(
        chosen["name"],
        attention=chosen["attention"],
        neck=chosen["neck"],
        pool=chosen["pool"] or "avg",
        num_classes=num_classes,
        bn_group_size=config.model.bn_group_size or None,
        dtype=config.model.dtype,
        image_size=config.image_size,
    )


def settings_of(model: Model) -> dict[str, Any]:
    """JSON values that let `build` make the same model again."""
    return {**dataclasses.asdict(model), "feature_dim": model.feature_dim}
