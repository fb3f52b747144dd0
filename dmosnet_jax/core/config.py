"""What a config means: checks before any device is touched, data sets, durations, changes while a run goes on."""

import ast
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dmosnet_jax.core.errors import ConfigError

# Between the names of data sets that are trained on together.
JOIN = "+"
CRITERIA = ("cfs",)
_EXAMPLE = '("cfs", "runs/cfs/scores.npz", 0.5)'
RECIPES = ("quickstart", "spcl", "supervised", "evaluate", "extract", "export", "cfs")
SCHEDULES = ("step", "cosine", "constant")
MEMORIES = ("image", "cluster", "cluster_hardest")
SEARCHES = ("exact", "bfloat16")
TRIPLETS = ("hinge", "soft", "none")
TRIPLET_FEATURES = ("embedding", "feature")
INTERPOLATIONS = ("bilinear", "bicubic")
ERASINGS = ("fastreid", "spcl")


def _positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = read(config, field)
        if value is not None and not value > 0:
            raise ConfigError(f"{field}={value} must be greater than 0")


def _not_negative(config: Any, *fields: str) -> None:
    for field in fields:
        value = read(config, field)
        if value is not None and not value >= 0:
            raise ConfigError(f"{field}={value} must not be negative")


def _fraction(config: Any, *fields: str) -> None:
    for field in fields:
        value = read(config, field)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{field}={value} must lie between 0 and 1")


def _below_one(config: Any, *fields: str) -> None:
    for field in fields:
        value = read(config, field)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{field}={value} must be at least 0 and less than 1")


def _known(config: Any, field: str, known: tuple[str, ...]) -> None:
    value = read(config, field)
    if value not in (None, "", *known) or (value == "" and field != "data.interpolation"):
        raise ConfigError(f"{field}={value!r} is not known: use one of {', '.join(known)}")


def read(config: Any, field: str) -> Any:
    """The value of a dotted field, or None where a part of the path does not exist."""
    node = config
    for part in field.split("."):
        if node is None or part not in node:
            return None
        node = node[part]
    return node


def validate(config: Any) -> None:
    """Checks a config as far as that is possible without data and devices.

    Args:
        config: the locked `ml_collections.ConfigDict` of a run.

    Raises:
        ConfigError: names the field, its value and the fix.
    """
    recipe = read(config, "recipe")
    if recipe not in RECIPES:
        raise ConfigError(f"recipe={recipe!r} is not known: use one of {', '.join(RECIPES)}")
    _positive(config, "batch_size", "eval.batch_size", "optim.learning_rate", "train.log_every_steps", "train.keep")
    _positive(
        config, "train.checkpoint_every_steps", "train.epochs", "train.steps_per_epoch", "train.eval_every_epochs"
    )
    _positive(config, "sampler.instances", "spcl.temperature", "spcl.eps", "spcl.k1", "spcl.k2", "spcl.min_samples")
    _positive(config, "spcl.max_classes")
    _not_negative(
        config,
        "spcl.refresh_every_steps",
        "eval.rank_lists",
        "seed",
        "optim.weight_decay",
        "optim.warmup_steps",
        "optim.clip_norm",
        "loss.triplet_weight",
        "augment.pad",
        "data.threads",
        "data.workers",
    )
    _fraction(
        config, "spcl.min_clustered", "augment.flip", "augment.erase", "augment.autoaugment", "optim.warmup_factor"
    )
    _fraction(config, "optim.decay_factor", "optim.final_factor")
    _below_one(config, "spcl.momentum", "optim.momentum", "loss.label_smoothing")
    _positive(config, "cfs.chunk_images", "cfs.sheet_columns")
    _check_selection(config, recipe)
    _check_image_size(config)
    _check_sampler(config)
    _check_groups(config, recipe)
    _check_schedule(config)
    _check_loss(config)
    _known(config, "data.interpolation", INTERPOLATIONS)
    _known(config, "augment.erasing", ERASINGS)


def _check_selection(config: Any, recipe: str) -> None:
    dataset, subset = read(config, "dataset"), read(config, "data.subset")
    names = () if dataset is None else dataset_names(dataset)
    check_subset(subset)
    if len(names) > 1 and recipe in ("quickstart", "cfs"):
        raise ConfigError(f"dataset={dataset!r}: the {recipe} recipe takes one data set: run it for each")
    if subset is not None and recipe not in ("spcl", "supervised"):
        raise ConfigError(f"data.subset={tuple(subset)!r} selects training images, which the {recipe} recipe has not")
    if subset is not None and len(names) > 1:
        raise ConfigError(f"data.subset={tuple(subset)!r} selects from one data set: give one instead of {dataset!r}")


def _check_image_size(config: Any) -> None:
    deviations = read(config, "pixel_std")
    if deviations is not None and not all(value > 0 for value in deviations):
        raise ConfigError(f"pixel_std={tuple(deviations)} must be greater than 0")
    size = read(config, "image_size")
    if size is not None and not (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise ConfigError(f"image_size={tuple(size)} must be (height, width) in pixels, e.g. (256, 128)")


def _check_sampler(config: Any) -> None:
    batch, instances = read(config, "batch_size"), read(config, "sampler.instances")
    if batch and instances and batch % instances:
        raise ConfigError(
            f"batch_size={batch} is not a multiple of sampler.instances={instances}: "
            f"use {batch // instances * instances or instances} or change sampler.instances"
        )


def _check_groups(config: Any, recipe: str) -> None:
    batch, group = read(config, "batch_size"), read(config, "model.bn_group_size")
    instances = read(config, "sampler.instances")
    together = min(group or batch, batch) if batch else 0
    if recipe in ("spcl", "supervised") and instances and 1 < together <= instances:
        size = f"model.bn_group_size={group}" if group and group < batch else f"batch_size={batch}"
        raise ConfigError(
            f"{size} with sampler.instances={instances}: images that share batch statistics would all be of one "
            "identity, whose features these statistics make equal, so nothing could be learnt: "
            + (
                f"use more than {instances}, or 0 for the whole batch"
                if group and group < batch
                else "raise batch_size"
            )
        )
    if batch and group and group < batch and batch % group:
        raise ConfigError(
            f"batch_size={batch} is not a multiple of model.bn_group_size={group}: use a divisor of {batch}, or 0 for "
            "statistics over the whole batch"
        )


def _check_schedule(config: Any) -> None:
    _known(config, "optim.schedule", SCHEDULES)
    gap = read(config, "spcl.eps_gap")
    for field in ("eps", "eps_end"):
        eps = read(config, f"spcl.{field}")
        if eps is not None and gap is not None and not (0 <= gap < eps and eps + gap < 1):
            raise ConfigError(
                f"spcl.{field}={eps} with spcl.eps_gap={gap}: the radii {field} - eps_gap to {field} + eps_gap must "
                "lie between 0 and 1"
            )
    _known(config, "spcl.memory", MEMORIES)
    _known(config, "spcl.search", SEARCHES)


def _check_loss(config: Any) -> None:
    _known(config, "loss.triplet", TRIPLETS)
    _known(config, "loss.triplet_on", TRIPLET_FEATURES)
    if read(config, "loss.triplet") == "hinge":
        _positive(config, "loss.triplet_margin")
    _positive(config, "loss.circle_scale", "loss.circle_margin")


def dataset_names(value: Any) -> tuple[str, ...]:
    """Names of the data sets that the config's `dataset` means.

    Args:
        value: a name, several joined by `+`, or a sequence of names, also written as text (`("a", "b")`).

    Raises:
        ConfigError: no name, the same one twice, or something else.
    """
    names: Any = value
    if isinstance(value, str):
        names = _literal(value) if value.strip().startswith(("(", "[")) else value.split(JOIN)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(f"dataset={value!r} is not a name: give one, or several as market1501{JOIN}msmt17")
    found = tuple(name.strip() for name in names)
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"dataset={value!r} must name each data set once, e.g. market1501{JOIN}msmt17")
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def joined(names: Sequence[str]) -> str:
    """One name for data sets that are used together."""
    return JOIN.join(names)


def check_subset(subset: Any) -> None:
    """Checks `data.subset`: None, or `(criterion, path, share)`.

    Raises:
        ConfigError: names the value and the fix.
    """
    if subset is None:
        return
    given = tuple(subset) if isinstance(subset, list | tuple) else subset
    where = f"data.subset={given!r}"
    if not isinstance(given, tuple) or len(given) != 3:
        raise ConfigError(f"{where} must be (criterion, path, share), e.g. {_EXAMPLE}")
    criterion, path, share = given
    if criterion not in CRITERIA:
        raise ConfigError(f"{where}: criterion {criterion!r} is not known: use {', '.join(CRITERIA)}")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{where}: the path must be that of a score file or a list of names, e.g. {_EXAMPLE}")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"{where}: the share must be greater than 0 and at most 1, e.g. {_EXAMPLE}")


# What a field may do when a run goes on with another value than it began with; the first pattern that matches decides,
# and what no pattern matches is refused: what was learnt under one value and under another would pass as one run.
FREE, TOLD, REFUSED = "free", "told", "refused"
ON_RESUME = (
    # How fast, where from and how often: no number depends on it.
    ("data_dir", FREE),
    ("data.threads", FREE),
    ("data.workers", FREE),
    ("data.cache_mib", FREE),
    ("eval.*", FREE),
    ("train.log_every_steps", FREE),
    ("train.checkpoint_every_steps", FREE),
    ("train.eval_every_epochs", FREE),
    ("train.keep", FREE),
    # Compared as they came out, not as they were asked for: the network, the chosen images, the steps of an epoch.
    ("model.*", FREE),
    ("default_model", FREE),
    ("data.subset", FREE),
    ("train.steps_per_epoch", FREE),
    # The weights have been taken over; where they came from may be gone.
    ("pretrained", TOLD),
    # The run is another one from here on, as its owner wants it: longer, slower, with another radius.
    ("spcl.memory", REFUSED),
    ("train.epochs", TOLD),
    ("optim.*", TOLD),
    ("augment.*", TOLD),
    ("loss.*", TOLD),
    ("sampler.*", TOLD),
    ("spcl.*", TOLD),
)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a run that goes on has otherwise than it began, by `ON_RESUME`.

    Args:
        before: the config in a checkpoint, nested dicts of JSON values.
        now: the present config, in the same form.

    Returns:
        "FIELD=VALUE (was VALUE)" of each changed field, under `TOLD` and `REFUSED`. A field that the checkpoint does
        not have, of an older version, is left out.
    """
    found: dict[str, list[str]] = {TOLD: [], REFUSED: []}
    then = dict(_leaves(before))
    for field, value in _leaves(now):
        rule = next((rule for pattern, rule in ON_RESUME if fnmatch.fnmatchcase(field, pattern)), REFUSED)
        if rule != FREE and field in then and then[field] != value:
            found[rule].append(f"{field}={value!r} (was {then[field]!r})")
    return found


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def duration_steps(config: Any, name: str, *, steps_per_epoch: int, examples_per_step: int) -> int | None:
    """A duration in steps, from whichever of `<name>_steps`, `<name>_epochs`, `<name>_examples` is set.

    Args:
        config: the node that holds the fields, e.g. `config.optim`.
        name: the duration's name, e.g. "warmup".
        steps_per_epoch: steps in an epoch.
        examples_per_step: the global batch size.

    Returns:
        The number of steps, or None where no field is set.

    Raises:
        ConfigError: more than one of the fields is set.
    """
    units = {"steps": 1.0, "epochs": float(steps_per_epoch), "examples": 1.0 / examples_per_step}
    given = {unit: read(config, f"{name}_{unit}") for unit in units}
    given = {unit: value for unit, value in given.items() if value is not None}
    if len(given) > 1:
        fields = ", ".join(f"{name}_{unit}={value}" for unit, value in given.items())
        raise ConfigError(f"{fields}: give one of them")
    for unit, value in given.items():
        return round(value * units[unit])
    return None
