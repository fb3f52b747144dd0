"""A trained network as a folder: `model.safetensors`, by torchreid's names, and `config.json`, which says what it is.

Nothing of the training run is needed to use it: `dmosnet_jax.load(folder)`, or the `evaluate` and `extract` recipes.
Beside them are a model card, `README.md`, for people and for model hubs; where Roboflow's `reid` has the network, the
weights and a description under the names that it looks for; and on demand a program that JAX alone runs.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import safetensors

from dmosnet_jax.core import files, safe_json
from dmosnet_jax.core.errors import ConfigError, DataError, first
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.trees import differences
from dmosnet_jax.data.transforms import DEFAULT_FILTER, FILTERS
from dmosnet_jax.export import model_card, roboflow, stablehlo, torch_export, torch_import
from dmosnet_jax.models import Model, build
from dmosnet_jax.train.checkpoints import FOLDER as CHECKPOINTS

WEIGHTS, CARD, README, PROGRAM = "model.safetensors", "config.json", "README.md", "model.stablehlo"
_FORMAT = 1
# In the header of the weights: the checksum of the card.
_ABOUT = "dmosnet_card"
# Options of `models.build` in the card.
_OPTIONS = ("name", "attention", "neck", "pool", "classifier", "variant", "num_classes", "image_size")

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Card:
    """What a folder says of its weights.

    Attributes:
        model: the network; `num_classes` is that of the classifier in the folder.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        interpolation: filter that resizes the images, "bilinear" or "bicubic".
        source: where the weights come from.
        licence: under which terms they may be used.
        threshold: cosine similarity from which on two images are taken for one person, or None.
        false_accept_rate: share of pairs of different people that it accepts, or None where it is not known.
        evaluations: contents of `results.json`, one for each data set.
    """

    model: Model
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = DEFAULT_FILTER
    source: str = ""
    licence: str = ""
    threshold: float | None = None
    false_accept_rate: float | None = None
    evaluations: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The contents of `config.json`, but for the checksum of the weights."""
        network = {name: getattr(self.model, name) for name in _OPTIONS}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "model"}
        return {"format": _FORMAT, **network, "feature_dim": self.model.feature_dim, **own}


def save(
    path: str | os.PathLike[str],
    params: Tree,
    stats: Tree,
    card: Card,
    *,
    with_program: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a folder; it appears whole or not at all.

    Args:
        path: the folder.
        params: parameters of the card's model.
        stats: its batch statistics.
        card: what they are.
        with_program: also write `model.stablehlo`; the file holds the weights once more.
        overwrite: replace an exported folder that is there.

    Raises:
        DataError: the arrays are not the card's model's, the folder exists, or can't be written.
    """
    folder, pairs = pathlib.Path(files.tidy(path)).absolute(), zip(card.model.shapes(), (params, stats), strict=True)
    problems = [text for expected, found in pairs for text in differences(expected, found)]
    if problems:
        raise DataError(f"{path}: the arrays are not those of {card.model.name}: {first(problems)}")
    files.refuse_existing(folder, overwrite=overwrite, may_replace=is_folder)
    with atomic_write(folder, replace_folder=overwrite) as part:
        part.mkdir()
        values = card.to_json()
        # Each file holds the checksum of the other.
        arrays, about = torch_export.by_torch_names(params, stats), {_ABOUT: _digest(values)}
        torch_export.save(part / WEIGHTS, arrays, about=about)
        values["sha256"] = _sha256(part / WEIGHTS)
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (part / CARD).write_text(text, encoding="utf-8")
        for_reid = roboflow.has(card.model)
        if for_reid:
            roboflow.add(part, part / WEIGHTS, card.model, card.mean, card.std, card.interpolation)
        if with_program:
            inputs = {"mean": card.mean, "std": card.std}
            (part / PROGRAM).write_bytes(stablehlo.serialise(card.model, params, stats, **inputs))
        facts = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
        page = model_card.render(**facts, roboflow=for_reid, stablehlo=with_program)
        (part / README).write_text(page, encoding="utf-8")


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is such a folder, and not a run's workdir, which has a `config.json` of its own."""
    folder = pathlib.Path(path)
    if (folder / CHECKPOINTS).is_dir():
        return False
    if (folder / WEIGHTS).is_file():
        return True
    # One that has lost its weights is to be told so.
    try:
        return "sha256" in safe_json.read_object(folder / CARD, fix="")
    except (OSError, DataError):
        return False


def load(path: str | os.PathLike[str]) -> tuple[Tree, Tree, Card]:
    """Reads a folder.

    Returns:
        `(params, stats, card)`: nested dicts of NumPy arrays, and what they are.

    Raises:
        DataError: no such folder, damaged, or not what its card says.
    """
    folder = pathlib.Path(files.tidy(path)).absolute()
    values = _read_json(folder / CARD)
    card = _card(values, folder / CARD)
    try:
        checksum = _sha256(folder / WEIGHTS)
    except OSError as error:
        raise DataError(f"{path}: is damaged ({WEIGHTS}: {error.strerror}); copy or export it again") from error
    if checksum != values["sha256"]:
        raise DataError(f"{path}: is damaged (the checksum of {WEIGHTS} differs); copy or export it again")
    try:
        params, stats = torch_import.convert(torch_import.load(folder / WEIGHTS), card.model)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    with safetensors.safe_open(folder / WEIGHTS, "numpy") as file:
        about = file.metadata() or {}
    # Folders of the first versions do not tell.
    if about.get(_ABOUT, _digest(values)) != _digest(values):
        raise DataError(
            f"{folder / CARD}: is damaged, or was changed: it is not the one that {WEIGHTS} was written with; copy or "
            "export the folder again"
        )
    return params, stats, card


def _digest(values: Mapping[str, Any]) -> str:
    """A checksum of a card's values, without that of the weights."""
    own = {name: values[name] for name in sorted(values) if name != "sha256"}
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
    with files.open_local(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = safe_json.read_object(path, fix="copy or export the folder again")
    except FileNotFoundError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); give a folder with a {CARD}") from error
    if values.get("format") != _FORMAT:
        raise DataError(f"{path}: is not of format {_FORMAT}; export the folder again with this version")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _card(values: dict[str, Any], path: pathlib.Path) -> Card:
    """The card of a `config.json`, which may hold anything."""
    # Folders from before the threshold have none.
    values = dict.fromkeys(("threshold", "false_accept_rate")) | {"evaluations": ()} | values
    own = [field.name for field in dataclasses.fields(Card) if field.name != "model"]
    wrong = set(values) ^ {"format", *_OPTIONS, "feature_dim", *own, "sha256"}
    if wrong:
        fields = ", ".join(sorted(wrong))
        raise DataError(f"{path}: missing or unknown fields: {fields}; copy or export the folder again")
    problem = _wrong_input(values)
    if problem is None:
        try:
            model = build(**{name: values[name] for name in _OPTIONS})
        except (ConfigError, TypeError, ValueError) as error:
            problem = str(error)
        else:
            if values["feature_dim"] == model.feature_dim:
                values["evaluations"] = model_card.scores_of(values["evaluations"], str(path))
                return Card(model, **{name: values[name] for name in own})
            problem = f"feature_dim={values['feature_dim']!r} is {model.feature_dim}"
    raise DataError(f"{path}: {problem}; correct it or export the folder again")


def _wrong_input(values: dict[str, Any]) -> str | None:
    for field in ("mean", "std"):
        triple = values[field]
        numbers = isinstance(triple, tuple) and all(isinstance(v, int | float) and math.isfinite(v) for v in triple)
        if not numbers or len(triple) != 3 or (field == "std" and min(triple) <= 0):
            return f"{field}={triple!r} must be three numbers in [0, 1] units"
    if values["interpolation"] not in FILTERS:
        return f"interpolation={values['interpolation']!r} must be one of {', '.join(FILTERS)}"
    for field, least in (("threshold", -1), ("false_accept_rate", 0)):
        value = values[field]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Rounding may lead a cosine beyond 1.
        if value is not None and not (number and least <= value <= 1.001):
            return f"{field}={value!r} must be a number from {least} to 1, or null"
    return None
