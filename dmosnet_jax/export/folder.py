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

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.trees import differences
from dmosnet_jax.data.transforms import DEFAULT_FILTER, FILTERS
from dmosnet_jax.export import model_card, roboflow, stablehlo, torch_export, torch_import
from dmosnet_jax.models import Model, build
from dmosnet_jax.train.checkpoints import FOLDER as CHECKPOINTS

WEIGHTS, CARD, README, PROGRAM = "model.safetensors", "config.json", "README.md", "model.stablehlo"
_FORMAT = 1
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


def save(path: str | os.PathLike[str], params: Tree, stats: Tree, card: Card, *, with_program: bool = False) -> None:
    """Writes a folder; it appears whole or not at all.

    Args:
        path: the folder, which must not exist yet.
        params: parameters of the card's model.
        stats: its batch statistics.
        card: what they are.
        with_program: also write `model.stablehlo`; the file holds the weights once more.

    Raises:
        DataError: the arrays are not the card's model's, the folder exists, or can't be written.
    """
    folder, pairs = pathlib.Path(path).absolute(), zip(card.model.shapes(), (params, stats), strict=True)
    problems = [text for expected, found in pairs for text in differences(expected, found)]
    if problems:
        raise DataError(f"{path}: the arrays are not those of {card.model.name}: {'; '.join(problems)}")
    if folder.exists():
        raise DataError(f"{path}: exists already; give another path, or remove it first")
    with atomic_write(folder) as part:
        part.mkdir()
        torch_export.save(part / WEIGHTS, torch_export.by_torch_names(params, stats))
        values = card.to_json() | {"sha256": _sha256(part / WEIGHTS)}
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
    return (folder / WEIGHTS).is_file() and not (folder / CHECKPOINTS).is_dir()


def load(path: str | os.PathLike[str]) -> tuple[Tree, Tree, Card]:
    """Reads a folder.

    Returns:
        `(params, stats, card)`: nested dicts of NumPy arrays, and what they are.

    Raises:
        DataError: no such folder, damaged, or not what its card says.
    """
    folder = pathlib.Path(path).absolute()
    values = _read_json(folder / CARD)
    card = _card(values, folder / CARD)
    try:
        checksum = _sha256(folder / WEIGHTS)
    except OSError as error:
        raise DataError(f"{path}: is damaged ({WEIGHTS}: {error.strerror}); copy or export it again") from error
    if checksum != values["sha256"]:
        raise DataError(f"{path}: is damaged (the checksum of {WEIGHTS} differs); copy or export it again")
    try:
        return *torch_import.convert(torch_import.load(folder / WEIGHTS), card.model), card
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); give a folder with a {CARD}") from error
    except ValueError as error:
        raise DataError(
            f"{path}: is damaged ({' '.join(str(error).split())}); copy or export the folder again"
        ) from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise DataError(f"{path}: is not of format {_FORMAT}; export the folder again with this version")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _card(values: dict[str, Any], path: pathlib.Path) -> Card:
    """The card of a `config.json`, which may have been edited by hand."""
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
