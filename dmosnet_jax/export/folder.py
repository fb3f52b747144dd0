"""A trained network as a folder: its parameters in Orbax form and `model.json`, which says what they are.

Nothing of the training run is needed to use it: `dmosnet_jax.load(folder)`, or the `evaluate` and `extract` recipes.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.trees import differences
from dmosnet_jax.data.transforms import DEFAULT_FILTER, FILTERS
from dmosnet_jax.models import Model, build
from dmosnet_jax.train import integrity

CARD = "model.json"
_ARRAYS = "parameters"
_FORMAT = 1
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@dataclasses.dataclass(frozen=True)
class Card:
    """The contents of `model.json`.

    Attributes:
        name: registry name, see `models.names`.
        attention: DL-MHSA mask over conv2, conv3, conv4.
        neck: "fc", "bnneck" or "none".
        pool: "avg" or "gem".
        classifier: "linear" or "circle"; only matters with classes.
        variant: whose ResNet, "" for other networks.
        num_classes: classes of the classifier in the folder, 0 for none.
        image_size: (height, width) in pixels.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        interpolation: filter that resizes the images, "bilinear" or "bicubic".
        feature_dim: size of a feature.
        source: where the weights come from.
        licence: under which terms they may be used.
    """

    name: str
    attention: tuple[int, int, int]
    neck: str
    pool: str
    classifier: str
    variant: str
    num_classes: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    feature_dim: int
    source: str = ""
    licence: str = ""

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = DEFAULT_FILTER,
        source: str = "",
        licence: str = "",
    ) -> "Card":
        """The card of a model."""
        shared = {field.name for field in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(model)}
        values = {name: getattr(model, name) for name in shared}
        return cls(
            **values,
            feature_dim=model.feature_dim,
            mean=tuple(mean),
            std=tuple(std),
            interpolation=interpolation,
            source=source,
            licence=licence,
        )

    def options(self) -> dict[str, Any]:
        """Arguments of `models.build`."""
        names = ("name", "attention", "neck", "pool", "classifier", "variant", "image_size")
        return {name: getattr(self, name) for name in names}


def save(path: str | os.PathLike[str], params: Mapping[str, Any], stats: Mapping[str, Any], card: Card) -> None:
    """Writes a folder; it appears whole or not at all.

    Args:
        path: the folder, which must not exist yet.
        params: parameters of the card's model.
        stats: its batch statistics.
        card: what they are.

    Raises:
        DataError: the arrays are not the card's model's, the folder exists, or can't be written.
    """
    place = pathlib.Path(path).absolute()
    model = build(**card.options(), num_classes=card.num_classes)
    _check(model, params, stats, str(path))
    if place.exists():
        raise DataError(f"{path}: exists already; give another path, or remove it first")
    text = json.dumps({"format": _FORMAT, **dataclasses.asdict(card)}, indent=2, ensure_ascii=False)
    with atomic_write(place) as part:
        part.mkdir()
        _write_arrays(part / _ARRAYS, {"params": dict(params), "stats": dict(stats)})
        (part / CARD).write_text(text + "\n", encoding="utf-8")
        integrity.seal(part, [_ARRAYS])


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is such a folder."""
    return (pathlib.Path(path) / CARD).is_file()


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], Card]:
    """Reads a folder.

    Returns:
        `(params, stats, card)`: nested dicts of NumPy arrays, and what they are.

    Raises:
        DataError: no such folder, damaged, or not what its card says.
    """
    place = pathlib.Path(path).absolute()
    card = _read_card(place / CARD)
    problem = integrity.damage(place, [_ARRAYS])
    if problem is not None:
        raise DataError(f"{path}: is damaged ({problem}); copy or export it again")
    try:
        arrays = _read_arrays(place / _ARRAYS)
        params, stats = arrays["params"], arrays["stats"]
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{path}: can't be read ({reason}); copy or export it again") from error
    _check(build(**card.options(), num_classes=card.num_classes), params, stats, str(path))
    return params, stats, card


def _check(model: Model, params: Mapping[str, Any], stats: Mapping[str, Any], where: str) -> None:
    shapes = model.shapes()
    problems = [text for pair in zip(shapes, (dict(params), dict(stats)), strict=True) for text in differences(*pair)]
    if problems:
        raise DataError(f"{where}: the arrays are not those of {model.name}: {'; '.join(problems)}")


def _read_card(path: pathlib.Path) -> Card:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); give a folder with a {CARD}") from error
    except ValueError as error:
        raise DataError(
            f"{path}: is damaged ({' '.join(str(error).split())}); copy or export the folder again"
        ) from error
    fields = {field.name: field for field in dataclasses.fields(Card)}
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise DataError(f"{path}: is not of format {_FORMAT}; export the folder again with this version")
    # Folders from before the filter was recorded were made for the default.
    values.setdefault("interpolation", DEFAULT_FILTER)
    if set(values) != set(fields):
        wrong = ", ".join(sorted(set(values) ^ set(fields)))
        raise DataError(f"{path}: missing or unknown fields: {wrong}; copy or export the folder again")
    typed: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    card = Card(**typed)
    problem = _wrong_value(card)
    if problem:
        raise DataError(f"{path}: {problem}; correct it or export the folder again")
    return card


def _wrong_value(card: Card) -> str | None:
    """What a hand-edited card has wrong, or None."""
    triples = {"mean": card.mean, "std": card.std}
    for field, values in triples.items():
        numbers = isinstance(values, tuple) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not numbers or len(values) != 3 or (field == "std" and min(values) <= 0):
            return f"{field}={values!r} must be three numbers in [0, 1] units"
    if card.interpolation not in FILTERS:
        return f"interpolation={card.interpolation!r} must be one of {', '.join(FILTERS)}"
    try:
        model = build(**card.options(), num_classes=card.num_classes)
    except (ConfigError, TypeError, ValueError) as error:
        return str(error)
    return None if model.feature_dim == card.feature_dim else f"feature_dim={card.feature_dim!r} is {model.feature_dim}"


def _quiet() -> None:
    # Orbax logs every step of saving; ours are the messages that count.
    for name in ("absl", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _write_arrays(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    _quiet()
    with ocp.StandardCheckpointer() as store:
        store.save(path, jax.tree.map(np.asarray, arrays))


def _read_arrays(path: pathlib.Path) -> dict[str, Any]:
    _quiet()
    with ocp.StandardCheckpointer() as store:
        found = store.metadata(path).item_metadata.tree
        return store.restore(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), found))
