"""From a config and the weights that it names to a network."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import print_once
from dmosnet_jax.export.weights import MODEL_OPTIONS, Weights, open_weights
from dmosnet_jax.models import Model, build

# Parts that may differ between a network and the weights that its training starts from.
HEAD = ("neck", "pool", "classifier")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with weights, ready to run.

    Attributes:
        config: the run's config, with the input that the weights were trained with.
        weights: where the arrays come from.
        model: the network.
        params: NumPy parameters, nested dicts.
        stats: NumPy batch statistics.
    """

    config: Any
    weights: Weights
    model: Model
    params: dict[str, Any]
    stats: dict[str, Any]

    @property
    def origin(self) -> dict[str, Any]:
        """What `results.json` says of where the weights come from."""
        with_val = self.weights.with_val
        return {"checkpoint": self.weights.path} | ({} if with_val is None else {"with_val": with_val})


def require_paths(config: Any, *fields: str) -> None:
    """Raises ConfigError where a field that must name a path is empty."""
    for field in fields:
        if not config[field]:
            hint = " (a run's workdir, an exported folder or a PyTorch file)" if field.startswith("checkpoint") else ""
            raise ConfigError(f"{field} is not set: give --config.{field}=PATH{hint}")


def open_network(config: Any, path: str) -> Network:
    """The network of some weights, as far as the config does not ask for something else.

    Raises:
        ConfigError: see `build_model`.
        DataError: the weights are missing, damaged, or of another model.
    """
    weights = open_weights(path)
    config = fill_input(config, weights)
    model = build_model(config, weights)
    return Network(config, weights, model, *weights.arrays(model))


def build_model(
    config: Any, weights: Weights | None = None, *, num_classes: int = 0, may_differ: Sequence[str] = ()
) -> Model:
    """The model that a config asks for; what it leaves open is taken from the weights, or else from the paper.

    Args:
        config: the run's config.
        weights: what the model must fit.
        num_classes: classifier size.
        may_differ: parts in which the config may contradict the weights: `HEAD` where they only start training.

    Raises:
        ConfigError: no model name, or unknown options.
        DataError: the config asks for another model than the weights hold.
    """
    chosen = options_of(config)
    for part, value in (weights.options if weights else {}).items():
        if part not in chosen or (part in may_differ and chosen[part] is not None):
            continue
        value = tuple(value) if part == "attention" else value
        if chosen[part] is not None and chosen[part] != value:
            raise DataError(
                f"{weights.path if weights else ''}: holds {part}={value!r}, but config.model.{part}={chosen[part]!r}: "
                f"give the checkpoint of that model, or --config.model.{part}={value!r}"
            )
        chosen[part] = value
    if chosen["name"] is None:
        chosen["name"] = config.get("default_model")
    if chosen["name"] is None:
        raise ConfigError("model.name is not set and the weights do not say it: give --config.model.name=NAME")
    if config.model.dtype == "bfloat16" and jax.default_backend() == "cpu":
        print_once(
            "model.dtype='bfloat16' takes about twice as long as float32 on CPUs: give --config.model.dtype=float32"
        )
    return build(
        **{part: value for part, value in chosen.items() if value is not None},
        num_classes=num_classes,
        bn_group_size=config.model.bn_group_size or None,
        dtype=config.model.dtype,
        image_size=config.image_size,
    )


def options_of(config: Any) -> dict[str, Any]:
    """The config's value for each of `MODEL_OPTIONS`, None where it leaves that to the weights."""
    options = {part: config.model.get(part) for part in MODEL_OPTIONS}
    if options["attention"] is not None:
        options["attention"] = tuple(int(bool(flag)) for flag in options["attention"])
    return options


def fill_input(config: Any, weights: Weights | None) -> Any:
    """The config with its open input settings filled: those of the weights, or the defaults without weights.

    Input settings are the image size, the filter that resizes, and the pixel statistics.
    """
    source = weights or Weights("", {})
    known = {
        "image_size": tuple(source.options.get("image_size") or (256, 128)),
        "pixel_mean": tuple(source.mean),
        "pixel_std": tuple(source.std),
    }
    filled = config.copy_and_resolve_references()
    with filled.unlocked():
        for field, value in known.items():
            if filled[field] is None:
                filled[field] = value
        filled.data.interpolation = filled.data.interpolation or source.interpolation
    return filled


def settings_of(model: Model) -> dict[str, Any]:
    """JSON values that let `build` make the same model again."""
    return {**dataclasses.asdict(model), "feature_dim": model.feature_dim}
