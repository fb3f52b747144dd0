"""One way to open weights of any kind: a folder of ours, a training run's checkpoint, or a PyTorch file."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.trees import differences
from dmosnet_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from dmosnet_jax.data.transforms import DEFAULT_FILTER
from dmosnet_jax.export import folder, layouts, torch_import
from dmosnet_jax.export.identify import infer_batches
from dmosnet_jax.models import Model, build
from dmosnet_jax.train import checkpoints

Tree = dict[str, Any]
# Options of `models.build` that belong to the weights; the others are the user's to choose.
PARTS = ("name", "attention", "neck", "pool", "classifier", "variant")


@dataclasses.dataclass(frozen=True)
class Opened:
    """Weights, and what is known of their network.

    Attributes:
        path: where they come from.
        options: arguments of `models.build` that the weights tell; what they don't tell is absent.
        mean: per-channel mean of the pixels, in [0, 1] units.
        std: per-channel standard deviation of the pixels.
        interpolation: filter that resized the images they were trained with, "bilinear" or "bicubic".
        num_classes: classes of the classifier among the weights, 0 for none.
        batches: training steps, as far as the weights tell.
        with_val: whether they were trained on the images for validation too; None where the weights do not tell.
        state_dict: arrays of a PyTorch file, or None.
        trees: `(params, stats)` of a checkpoint or folder of ours, or None.
    """

    path: str
    options: Mapping[str, Any]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = DEFAULT_FILTER
    num_classes: int = 0
    batches: int = 0
    with_val: bool | None = None
    state_dict: Mapping[str, np.ndarray] | None = None
    trees: tuple[Tree, Tree] | None = None

    def model(self, **overrides: Any) -> Model:
        """The network, without a classifier unless `num_classes` is given.

        Args:
            **overrides: options of `models.build`; None means: as the weights say.

        Raises:
            ConfigError: neither the weights nor the caller say which network it is, or an option is wrong.
        """
        options = {**self.options, **{key: value for key, value in overrides.items() if value is not None}}
        if options.get("name") is None:
            raise ConfigError(f"{self.path}: does not tell its network: give name=NAME, one of models.names()")
        return build(**options)

    def weights(self, model: Model) -> tuple[Tree, Tree]:
        """`(params, stats)` as NumPy arrays for a model.

        Raises:
            DataError: they belong to another model; every difference is listed.
        """
        if self.state_dict is not None:
            try:
                return torch_import.convert(self.state_dict, model)
            except DataError as error:
                raise DataError(f"{self.path}: {error}") from error
        assert self.trees is not None
        params, stats = self.trees
        params = {name: part for name, part in params.items() if name != "classifier" or model.num_classes}
        pairs = zip(model.shapes(), (params, stats), strict=True)
        problems = [text for expected, found in pairs for text in differences(expected, found)]
        if problems:
            raise DataError(f"{self.path}: does not fit model {model.name}: {'; '.join(problems)}")
        return params, stats


def open_weights(path: str | os.PathLike[str]) -> Opened:
    """Opens weights.

    Args:
        path: a folder with a `model.json`; a run's workdir, its `checkpoints` folder, one step of it or
            `checkpoints/best`; or a PyTorch or safetensors file.

    Raises:
        DataError: nothing there, damaged, or refused.
    """
    where, place = str(path), pathlib.Path(path)
    if folder.is_folder(place):
        params, stats, card = folder.load(place)
        inputs = card.mean, card.std, card.interpolation
        return Opened(where, card.options(), *inputs, card.num_classes, trees=(params, stats))
    if place.is_dir() or place.name == checkpoints.BEST:
        return _from_run(checkpoints.load_model(place))
    state_dict = torch_import.load(path)
    told = {name: value for name, value in torch_import.describe(state_dict).items() if value is not None}
    counts = torch_import.infer_num_classes(state_dict), infer_batches(state_dict)
    inputs = IMAGENET_MEAN, IMAGENET_STD, layouts.recognise(state_dict).interpolation
    return Opened(where, told, *inputs, *counts, state_dict=state_dict)


def describe_run(path: str | os.PathLike[str], meta: Mapping[str, Any]) -> Opened:
    """What a checkpoint's JSON values tell of its network, without its arrays."""
    described, config = meta.get("model", {}), meta.get("config", {})
    options = {name: described[name] for name in (*PARTS, "image_size") if described.get(name) not in (None, "")}
    mean, std = (tuple(config.get(field) or default) for field, default in _PIXELS)
    # Checkpoints from before the filter was recorded were trained with the default.
    interpolation = config.get("data", {}).get("interpolation") or DEFAULT_FILTER
    return Opened(str(path), options, mean, std, interpolation, with_val=bool(config.get("with_val")))


def _from_run(saved: checkpoints.SavedModel) -> Opened:
    kernel = saved.params.get("classifier", {}).get("kernel")
    return dataclasses.replace(
        describe_run(saved.path, saved.meta),
        num_classes=0 if kernel is None else kernel.shape[1],
        batches=saved.step,
        trees=(saved.params, saved.stats),
    )


_PIXELS = (("pixel_mean", IMAGENET_MEAN), ("pixel_std", IMAGENET_STD))
