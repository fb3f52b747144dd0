"""What a config means: checks before any device is touched, data sets, durations, changes while a run goes on."""

import ast
import difflib
import fnmatch
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dmosnet_jax.core.errors import ConfigError, printable
from dmosnet_jax.core.trees import named_leaves

# Between the names of data sets that are trained on together.
JOIN = "+"
CRITERIA = ("cfs",)
_EXAMPLE = '("cfs", "runs/cfs/scores.npz", 0.5)'
RECIPES = (
    *("quickstart", "spcl", "spcl_uda", "supervised", "evaluate", "compare", "extract", "activation_maps"),
    *("index", "search", "export", "cfs"),
)
_CHOICES = {
    "optim.name": ("adam", "sgd"),
    "optim.schedule": ("step", "cosine", "constant"),
    "spcl.memory": ("image", "cluster", "cluster_hardest"),
    "spcl.search": ("exact", "bfloat16"),
    "loss.triplet": ("hinge", "soft", "none"),
    "loss.triplet_on": ("embedding", "feature"),
    "data.interpolation": ("bilinear", "bicubic"),
    "data.placement": ("host", "device"),
    "eval.runtime": ("jax", "onnxruntime"),
    "augment.erasing": ("fastreid", "spcl"),
    "dtype": ("float16", "float32"),
    "onnx.input": ("imagenet", "unit", "byte"),
}
_NUMBERS: dict[str, Callable[[Any], bool]] = {
    "must be greater than 0": lambda value: value > 0,
    "must not be negative": lambda value: value >= 0,
    "must lie between 0 and 1": lambda value: 0 <= value <= 1,
    "must be at least 0 and less than 1": lambda value: 0 <= value < 1,
}


# Whole numbers go into 32-bit arrays; numbers beyond say what nobody means, and overflow somewhere else.
_LARGEST = 2**31 - 1
_LARGEST_SEED = 2**63 - 1
# Of an image's side in pixels, and of threads and processes for one job.
_LONGEST_SIDE, _MOST_THREADS = 4096, 1024


def _check_magnitudes(config: Any) -> None:
    """Refuses numbers of any field that no 32-bit array holds, and infinities."""
    for field, leaf in named_leaves(config.to_dict() if hasattr(config, "to_dict") else config):
        for value in leaf if isinstance(leaf, list | tuple) else (leaf,):
            largest = _LARGEST_SEED if field.rpartition(".")[2] == "seed" else _LARGEST
            if isinstance(value, int) and abs(value) > largest:
                raise ConfigError(f"{field}={_short(leaf)} must be at most {largest}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field}={_short(leaf)} must be a finite number")


def _short(value: Any) -> str:
    # Python writes no integers of more than 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"(a number of {value.bit_length()} bits)"
    return printable(value, 60)


def unknown_field(config: Any, field: str) -> str | None:
    """What to say of a dotted field that a config does not have, None where it has it.

    Returns:
        A message with the names that come nearest.
    """
    node, parts = config, field.split(".")
    for part in parts:
        if not hasattr(node, "keys") or part not in node:
            break
        node = node[part]
    else:
        return None
    names = [name for name, _ in _fields(config)]
    last = parts[-1].lower().replace("_", "").replace("-", "")
    # The same name elsewhere, or written in another way, comes before names that look alike.
    same = [name for name in names if name.rpartition(".")[2].lower().replace("_", "") == last]
    near = same or difflib.get_close_matches(field, names, 3, 0.6)
    by_last = {name.rpartition(".")[2]: name for name in names}
    near = near or [by_last[name] for name in difflib.get_close_matches(parts[-1], by_last, 3, 0.6)]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else f"its fields are {', '.join(sorted(config.keys()))}"
    return f"--config.{printable(field, 60)}: this config has no such field: {hint}"


def _fields(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in node.keys():  # noqa: SIM118 - a ConfigDict is no mapping
        name = f"{prefix}.{key}" if prefix else str(key)
        value = node[key]
        if hasattr(value, "keys"):
            yield from _fields(value, name)
        yield name, value


# Recipes that rank a gallery.
_RANKING = ("quickstart", "spcl", "spcl_uda", "supervised", "evaluate", "compare")
# Recipes that extract features and do not rank.
_EXTRACTING = ("extract", "index", "search")


def _check_numbers(config: Any, rule: str, *fields: str) -> None:
    for field in fields:
        value = read(config, field)
        if value is not None and not _NUMBERS[rule](value):
            raise ConfigError(f"{field}={value} {rule}")


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
    for field in ("data.threads", "data.workers"):
        if (read(config, field) or 0) > _MOST_THREADS:
            raise ConfigError(f"{field}={read(config, field)} must be at most {_MOST_THREADS}")
    _check_numbers(
        config,
        "must be greater than 0",
        *("batch_size", "eval.batch_size", "sampler.instances", "optim.learning_rate", "optim.base_batch_size"),
        *("train.epochs", "train.steps_per_epoch", "train.keep", "train.log_every_steps"),
        *("train.checkpoint_every_steps", "train.checkpoint_every_minutes", "train.eval_every_epochs"),
        *("spcl.temperature", "spcl.eps", "spcl.k1", "spcl.k2", "spcl.min_samples", "spcl.max_classes"),
        "spcl.groups_at_once",
        *("loss.circle_scale", "loss.circle_margin", "cfs.chunk_images", "cfs.sheet_columns", "top_k"),
        *("latency.batch_size", "latency.repeats"),
    )
    _check_numbers(
        config,
        "must not be negative",
        *("seed", "data.threads", "data.workers", "augment.pad", "eval.rank_lists", "spcl.refresh_every_steps"),
        *("eval.query_expansion", "eval.expansion_alpha"),
        *("optim.weight_decay", "optim.warmup_steps", "optim.warmup_epochs", "optim.clip_norm", "loss.triplet_weight"),
    )
    _check_numbers(
        config,
        "must lie between 0 and 1",
        *("augment.flip", "augment.erase", "augment.autoaugment", "spcl.min_clustered"),
        *("optim.warmup_factor", "optim.decay_factor", "optim.final_factor", "false_accept_rate"),
    )
    _check_numbers(
        config, "must be at least 0 and less than 1", "spcl.momentum", "optim.momentum", "loss.label_smoothing"
    )
    _check_magnitudes(config)
    if read(config, "loss.triplet") == "hinge":
        _check_numbers(config, "must be greater than 0", "loss.triplet_margin")
    for field, known in _CHOICES.items():
        value = read(config, field)
        # No filter means the one that the weights were trained with.
        if value not in (None, *known) and (field, value) != ("data.interpolation", ""):
            raise ConfigError(f"{field}={value!r} is not known: use one of {', '.join(known)}")
    if read(config, "data.placement") == "device" and read(config, "augment.autoaugment"):
        raise ConfigError(
            "data.placement='device' keeps decoded images, which AutoAugment changes before they are resized: use "
            "data.placement=host or augment.autoaugment=0"
        )
    _check_test_time(config, recipe)
    _check_selection(config, recipe)
    _check_domains(config, recipe)
    _check_image_size(config)
    _check_sampler(config)
    _check_groups(config, recipe)
    _check_radii(config)


def _check_test_time(config: Any, recipe: str) -> None:
    """Of choices that only rankings and features have."""
    named = ("flip", "multi_query", "query_expansion", "expansion_alpha", "rerank", "projector")
    for field in (f"eval.{name}" for name in named):
        value = read(config, field)
        if value and recipe not in _RANKING:
            raise ConfigError(f"{field}={value} is for a ranking, which the {recipe} recipe has not: leave it out")
    runtime = read(config, "eval.runtime")
    if runtime not in (None, "jax") and recipe not in (*_RANKING, *_EXTRACTING):
        raise ConfigError(f"eval.runtime={runtime} is for features, which the {recipe} recipe has not: leave it out")
    alpha = read(config, "eval.expansion_alpha")
    if alpha and not read(config, "eval.query_expansion"):
        raise ConfigError(
            f"eval.expansion_alpha={alpha} weights the images of eval.query_expansion=0, which are none: give how many"
        )


def _check_selection(config: Any, recipe: str) -> None:
    dataset, subset = read(config, "dataset"), read(config, "data.subset")
    names = () if dataset is None else dataset_names(dataset)
    if recipe == "compare" and read(config, "checkpoints"):
        checkpoint_paths(read(config, "checkpoints"))
    check_subset(subset)
    if len(names) > 1 and recipe in ("quickstart", "cfs"):
        raise ConfigError(f"dataset={dataset!r}: the {recipe} recipe takes one data set: run it for each")
    if subset is not None and recipe == "spcl_uda":
        raise ConfigError(
            f"data.subset={tuple(subset)!r} selects from one data set, of source and target: leave it out"
        )
    if subset is not None and recipe not in ("spcl", "supervised"):
        raise ConfigError(f"data.subset={tuple(subset)!r} selects training images, which the {recipe} recipe has not")
    if subset is not None and len(names) > 1:
        raise ConfigError(f"data.subset={tuple(subset)!r} selects from one data set: give one instead of {dataset!r}")


def _check_domains(config: Any, recipe: str) -> None:
    """Of a labelled source beside the target."""
    if recipe != "spcl_uda":
        return
    source, target = (dataset_names(read(config, field), field) for field in ("source", "dataset"))
    both = sorted(set(source) & set(target))
    if both:
        raise ConfigError(
            f"source={joined(source)!r} with dataset={joined(target)!r}: {both[0]} cannot be source and target: give "
            "the labelled data sets as source, the unlabelled ones as dataset"
        )
    batch, memory = read(config, "batch_size"), read(config, "spcl.memory")
    if batch % 2:
        raise ConfigError(f"batch_size={batch} is shared by source and target: use {batch + 1}")
    if memory != "image":
        raise ConfigError(
            f"spcl.memory={memory!r}: a source's classes have rows in the memory of images only: use image"
        )


def _per_domain(config: Any) -> int | None:
    """Images of a batch that meet in a sampler and in batch norms: half of it with a labelled source."""
    batch = read(config, "batch_size")
    return batch // 2 if batch and read(config, "recipe") == "spcl_uda" else batch


def _share(config: Any) -> str:
    """What messages call that number."""
    return "half of the batch_size" if read(config, "recipe") == "spcl_uda" else "batch_size"


def _check_image_size(config: Any) -> None:
    deviations = read(config, "pixel_std")
    if deviations is not None and not all(value > 0 for value in deviations):
        raise ConfigError(f"pixel_std={tuple(deviations)} must be greater than 0")
    size = read(config, "image_size")
    if size is not None and not (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise ConfigError(f"image_size={tuple(size)} must be (height, width) in pixels, e.g. (256, 128)")
    if size is not None and max(size) > _LONGEST_SIDE:
        raise ConfigError(f"image_size={tuple(size)}: no side may have more than {_LONGEST_SIDE} pixels")


def _check_sampler(config: Any) -> None:
    batch, instances = _per_domain(config), read(config, "sampler.instances")
    if batch and instances and batch % instances:
        raise ConfigError(
            f"{_share(config)}={batch} is not a multiple of sampler.instances={instances}: "
            f"use {batch // instances * instances or instances} or change sampler.instances"
        )


def _check_groups(config: Any, recipe: str) -> None:
    batch, group = _per_domain(config), read(config, "model.bn_group_size")
    instances = read(config, "sampler.instances")
    together = min(group or batch, batch) if batch else 0
    if recipe in ("spcl", "spcl_uda", "supervised") and instances and 1 < together <= instances:
        size = f"model.bn_group_size={group}" if group and group < batch else f"{_share(config)}={batch}"
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
            f"{_share(config)}={batch} is not a multiple of model.bn_group_size={group}: use a divisor of {batch}, or "
            "0 for statistics over the whole batch"
        )


def _check_radii(config: Any) -> None:
    gap = read(config, "spcl.eps_gap")
    for field in ("eps", "eps_end"):
        eps = read(config, f"spcl.{field}")
        if eps is not None and gap is not None and not (0 <= gap < eps and eps + gap < 1):
            raise ConfigError(
                f"spcl.{field}={eps} with spcl.eps_gap={gap}: the radii {field} - eps_gap to {field} + eps_gap must "
                "lie between 0 and 1"
            )


def dataset_names(value: Any, field: str = "dataset") -> tuple[str, ...]:
    """Names of the data sets that a field of the config means.

    Args:
        value: a name, several joined by `+`, or a sequence of names, also written as text (`("a", "b")`).
        field: for messages.

    Raises:
        ConfigError: no name, the same one twice, or something else.
    """
    names = _listed(value, JOIN)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(f"{field}={value!r} is not a name: give one, or several as market1501{JOIN}msmt17")
    found = tuple(name.strip() for name in names)
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"{field}={value!r} must name each data set once, e.g. market1501{JOIN}msmt17")
    return found


def checkpoint_paths(value: Any) -> tuple[str, ...]:
    """Paths that the field `checkpoints` means.

    Args:
        value: paths with commas between them, or a sequence of paths, also written as text (`("a", "b")`).

    Raises:
        ConfigError: none, the same one twice, or something else.
    """
    paths = _listed(value, ",")
    if isinstance(paths, str):
        paths = (paths,)
    given = paths if isinstance(paths, Sequence) else ()
    found = tuple(path.strip() if isinstance(path, str) else "" for path in given)
    if not found or not all(found):
        raise ConfigError(f"checkpoints={value!r} names no checkpoints: give --config.checkpoints=PATH,PATH")
    if len(set(map(os.path.abspath, found))) < len(found):
        raise ConfigError(f"checkpoints={value!r} must name each checkpoint once")
    return found


def _listed(value: Any, separator: str) -> Any:
    """What is between separators in a text, or the sequence that it writes as a literal; other values as they are."""
    if not isinstance(value, str):
        return value
    if not value.strip().startswith(("(", "[")):
        return value.split(separator)
    try:
        return ast.literal_eval(value)
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


# May a run be resumed with another value of a field? The first pattern that matches decides; a field that no pattern
# matches is refused, because parts of the run that were trained under different values would pass as one run.
FREE, TOLD, REFUSED = "free", "told", "refused"
ON_RESUME = (
    # Speed, paths and intervals: no result depends on them.
    ("data_dir", FREE),
    ("data.threads", FREE),
    ("data.workers", FREE),
    ("data.cache_mib", FREE),
    ("data.placement", FREE),
    # SpCL's features agree to rounding only.
    ("eval.runtime", TOLD),
    ("eval.*", FREE),
    ("train.log_every_steps", FREE),
    ("train.checkpoint_every_steps", FREE),
    ("train.checkpoint_every_minutes", FREE),
    ("train.eval_every_epochs", FREE),
    ("train.keep", FREE),
    # Compared by their outcome instead: the network, the selected images, the steps of an epoch.
    ("model.*", FREE),
    ("default_model", FREE),
    ("data.subset", FREE),
    ("train.steps_per_epoch", FREE),
    # The weights are in the checkpoint; their file may be gone.
    ("pretrained", TOLD),
    # The user may change these on purpose: the length, the learning rate, the radius.
    ("spcl.memory", REFUSED),
    # Its state is the optimiser's own.
    ("optim.name", REFUSED),
    ("train.epochs", TOLD),
    ("optim.*", TOLD),
    ("augment.*", TOLD),
    ("loss.*", TOLD),
    ("sampler.*", TOLD),
    ("spcl.*", TOLD),
)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """Fields whose values differ from those that the run began with, by `ON_RESUME`.

    Args:
        before: the config in a checkpoint, nested dicts of JSON values.
        now: the present config, in the same form.

    Returns:
        "FIELD=VALUE (was VALUE)" of each changed field, under `TOLD` and `REFUSED`, without fields that a checkpoint
        of an older version does not have.
    """
    found: dict[str, list[str]] = {TOLD: [], REFUSED: []}
    then = dict(named_leaves(before))
    for field, value in named_leaves(now):
        rule = next((rule for pattern, rule in ON_RESUME if fnmatch.fnmatchcase(field, pattern)), REFUSED)
        if rule != FREE and field in then and then[field] != value:
            found[rule].append(f"{field}={value!r} (was {then[field]!r})")
    return found


def duration_steps(config: Any, name: str, *, steps_per_epoch: int) -> int | None:
    """A duration in steps, from whichever of `<name>_steps` and `<name>_epochs` is set.

    Args:
        config: the node that holds the fields, e.g. `config.optim`.
        name: the duration's name, e.g. "warmup".
        steps_per_epoch: steps in an epoch.

    Returns:
        The number of steps, or None where neither is set.

    Raises:
        ConfigError: both are set.
    """
    units = {"steps": 1, "epochs": steps_per_epoch}
    given = {unit: read(config, f"{name}_{unit}") for unit in units}
    given = {unit: value for unit, value in given.items() if value is not None}
    if len(given) > 1:
        fields = ", ".join(f"{name}_{unit}={value}" for unit, value in given.items())
        raise ConfigError(f"{fields}: give one of them")
    for unit, value in given.items():
        return round(value * units[unit])
    return None
