"""One way to open weights of any kind: a folder of ours, a training run's checkpoint, or a PyTorch file."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.errors import ConfigError, DataError, first
from dmosnet_jax.core.files import tidy
from dmosnet_jax.core.trees import differences, named_leaves
from dmosnet_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from dmosnet_jax.data.transforms import DEFAULT_FILTER
from dmosnet_jax.export import folder, identify, layouts, torch_import
from dmosnet_jax.models import Model, build
from dmosnet_jax.train import checkpoints

Tree = dict[str, Any]
# Options of `models.build` that belong to the weights; the others are the user's to choose.
MODEL_OPTIONS = ("name", "attention", "neck", "pool", "classifier", "variant")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights, and what is known of their network.

    Attributes:
        path: where they come from.
        options: arguments of `models.build` that can be read off the weights; others are absent.
        mean: per-channel mean of the pixels, in [0, 1] units.
        std: per-channel standard deviation of the pixels.
        interpolation: filter that resized the images they were trained with, "bilinear" or "bicubic".
        num_classes: classes of the classifier among the weights, 0 for none.
        batches: training steps, 0 where the weights do not tell.
        with_val: whether they were trained on the images for validation too; None where the weights do not tell.
        state_dict: arrays of a PyTorch file, or None.
        trees: `(params, stats)` of a checkpoint or folder of ours, or None.
        card: what an exported folder says of itself, None for others.
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
    card: folder.Card | None = None

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

    def arrays(self, model: Model) -> tuple[Tree, Tree]:
        """`(params, stats)` as NumPy arrays for a model, which must fit but for a classifier that it does not have.

        Raises:
            DataError: they belong to another model; every difference is listed.
        """
        if self.state_dict is not None:
            found = self._plan(model)
            return found.params, found.stats
        assert self.trees is not None
        params, stats = self.trees
        params = {name: part for name, part in params.items() if name != "classifier" or model.num_classes}
        pairs = zip(model.shapes(), (params, stats), strict=True)
        problems = [text for expected, found in pairs for text in differences(expected, found)]
        if problems:
            raise DataError(f"{self.path}: does not fit model {model.name}: {first(problems)}")
        return params, stats

    def start(self, model: Model, key: jax.Array) -> tuple[Tree, Tree, list[str]]:
        """Arrays to start training from: the backbone must fit, a head that does not is initialised from the key.

        Returns:
            `(params, stats, initialised)`: `initialised` names the top-level parts that are not from the weights.

        Raises:
            DataError: the backbone belongs to another model; every difference is listed.
        """
        params, stats = model.init(key)
        if self.state_dict is not None:
            found = self._plan(model, missing_ok=torch_import.HEADS, unexpected_ok=torch_import.HEADS)
            initialised = {name.split(".")[0] for name in found.left_out}
            return torch_import.fill(params, found.params), torch_import.fill(stats, found.stats), sorted(initialised)
        assert self.trees is not None
        problems, initialised = [], set()
        for fresh, tree in zip((params, stats), self.trees, strict=True):
            problems += [f"unexpected {name}" for name in set(tree) - set(fresh) - set(torch_import.HEADS)]
            for name in fresh:
                wrong = differences({name: fresh[name]}, {name: tree[name]} if name in tree else {})
                if not wrong:
                    fresh[name] = tree[name]
                elif name in torch_import.HEADS:
                    initialised.add(name)
                else:
                    problems += wrong
        if problems:
            raise DataError(f"{self.path}: checkpoint does not fit model {model.name}: {first(problems)}")
        return params, stats, sorted(initialised)

    def _plan(self, model: Model, **allowed: Any) -> torch_import.Conversion:
        assert self.state_dict is not None
        try:
            return torch_import.plan(self.state_dict, model, **allowed)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Opens weights.

    Args:
        path: an exported folder; a run's workdir, its `checkpoints` folder, one step of it or `checkpoints/best`; or a
            PyTorch or safetensors file, as `torch_import.load` takes it.

    Raises:
        DataError: nothing there, damaged, or refused.
    """
    local = pathlib.Path(tidy(path))
    where = str(local)
    if folder.is_folder(local):
        params, stats, card = folder.load(local)
        options = {name: getattr(card.model, name) for name in (*MODEL_OPTIONS, "image_size")}
        inputs = card.mean, card.std, card.interpolation
        return Weights(where, options, *inputs, card.model.num_classes, trees=(params, stats), card=card)
    if local.is_dir() or local.name == checkpoints.BEST:
        saved = checkpoints.load_model(local)
        kernel = saved.params.get("classifier", {}).get("kernel")
        classes, trees = 0 if kernel is None else kernel.shape[1], (saved.params, saved.stats)
        described = describe_run(saved.path, saved.meta)
        return dataclasses.replace(described, num_classes=classes, batches=saved.step, trees=trees)
    state_dict = torch_import.load(local)
    try:
        options = {name: value for name, value in identify.describe(state_dict).items() if value is not None}
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return Weights(
        where,
        options,
        interpolation=layouts.recognise(state_dict).interpolation,
        num_classes=identify.infer_num_classes(state_dict),
        batches=identify.infer_batches(state_dict),
        state_dict=state_dict,
    )


def fingerprint(
    model: Model, params: Tree, stats: Tree, *, mean: Sequence[float], std: Sequence[float], interpolation: str
) -> str:
    """What decides the features of an image, as one hexadecimal number: equal ones can be compared with each other.

    The classifier, the format of the file and where the weights come from have no part in it.
    """
    digest = hashlib.sha256()
    network = {part: getattr(model, part) for part in (*MODEL_OPTIONS, "image_size") if part != "classifier"}
    inputs = {"mean": list(map(float, mean)), "std": list(map(float, std)), "interpolation": interpolation}
    digest.update(json.dumps(network | inputs, sort_keys=True).encode())
    for tree in (params, stats):
        for name, leaf in sorted(named_leaves({key: part for key, part in tree.items() if key != "classifier"})):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(leaf, "<f4").tobytes())
    return digest.hexdigest()


def describe_run(path: str | os.PathLike[str], meta: Mapping[str, Any]) -> Weights:
    """What a checkpoint's JSON values tell of its network, without its arrays."""
    described, config = meta.get("model", {}), meta.get("config", {})
    options = {
        name: described[name] for name in (*MODEL_OPTIONS, "image_size") if described.get(name) not in (None, "")
    }
    return Weights(
        str(path),
        options,
        mean=tuple(config.get("pixel_mean") or IMAGENET_MEAN),
        std=tuple(config.get("pixel_std") or IMAGENET_STD),
        # Checkpoints from before the filter was recorded were trained with the default.
        interpolation=config.get("data", {}).get("interpolation") or DEFAULT_FILTER,
        with_val=bool(config.get("with_val")),
    )
