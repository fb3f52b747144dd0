"""The model card of an exported folder: a README with the header that the Hugging Face hub reads."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.models import Model

SCORES = (("mAP", "mAP"), ("rank1", "rank-1"), ("rank5", "rank-5"), ("rank10", "rank-10"), ("mINP", "mINP"))
_ROW = ("far", "tar", "threshold")
PROTOCOL = "single query, cosine distance, no re-ranking"
# The hub's own names of common licences; it takes others as `other` with a name.
_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "unlicense"),
)

# Markdown, not HTML: nothing to escape but what ends a table's cell.
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("dmosnet_jax", "export"),
    autoescape=False,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)


def scores_of(results: Any, where: str) -> tuple[dict[str, Any], ...]:
    """What a card says of evaluations: scores, sizes and thresholds, without paths and curves.

    Args:
        results: the contents of a `results.json`, or a sequence of such.
        where: which file, for the errors.

    Returns:
        One dict for each data set.

    Raises:
        DataError: a field is missing, or of another kind.
    """
    if isinstance(results, Mapping):
        datasets = results.get("datasets")
        results = list(datasets.values()) if isinstance(datasets, Mapping) else [results]
    if not isinstance(results, Sequence) or not all(isinstance(found, Mapping) for found in results):
        raise DataError(f"{where}: holds no results of an evaluation; give the results.json of configs/evaluate.py")
    return tuple(_one(found, where) for found in results)


def _one(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    kept = {"dataset": found.get("dataset"), "interpolation": found.get("interpolation") or ""}
    numbers = [*(key for key, _ in SCORES), "num_query", "num_valid_query", "num_gallery"]
    kept |= {key: found.get(key) for key in numbers}
    kept["thresholds"] = decided = found.get("thresholds")
    wrong = [key for key in numbers if not _is_number(kept[key])]
    wrong += [key for key in ("dataset", "interpolation") if not isinstance(kept[key], str)]
    if decided is not None:
        rows = decided.get("tar_at_far") if isinstance(decided, Mapping) else None
        if not isinstance(rows, list | tuple) or not _is_number(decided.get("eer")):
            wrong.append("thresholds")
        elif not all(isinstance(row, Mapping) and all(_is_number(row.get(key)) for key in _ROW) for row in rows):
            wrong.append("thresholds.tar_at_far")
    if wrong:
        raise DataError(f"{where}: {', '.join(wrong)}: missing or of another kind; evaluate again with this version")
    return kept


def threshold_at(evaluations: Sequence[Mapping[str, Any]], rate: float, where: str) -> float | None:
    """The threshold of the first data set at a false-accept rate; None where it has no thresholds.

    Raises:
        ConfigError: not measured at this rate.
    """
    decided = evaluations[0]["thresholds"] if evaluations else None
    if decided is None:
        return None
    known = {row["far"]: row["threshold"] for row in decided["tar_at_far"]}
    if rate not in known:
        rates = ", ".join(f"{far:g}" for far in known)
        raise ConfigError(f"false_accept_rate={rate:g}: {where} has thresholds at {rates}: give one of them")
    return float(known[rate])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def render(
    *,
    model: Model,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    source: str,
    licence: str,
    threshold: float | None,
    false_accept_rate: float | None,
    evaluations: Sequence[Mapping[str, Any]],
    roboflow: bool,
    stablehlo: bool,
) -> str:
    """The card's text.

    Args:
        model: the network.
        mean: per channel, in [0, 1] units.
        std: likewise.
        interpolation: filter that resizes the images.
        source: where the weights come from.
        licence: free text; the hub's own name where it has one.
        threshold: see `folder.Card`, as the next two.
        false_accept_rate: likewise.
        evaluations: likewise.
        roboflow: whether the files of `roboflow.add` are there.
        stablehlo: whether the program is there.
    """
    known = licence.lower() if licence.lower() in _LICENCES else ("other" if licence else "unknown")
    stages = [f"conv{stage}" for stage, used in zip((2, 3, 4), model.attention, strict=True) if used]
    return _PAGES.get_template("model_card.md").render(
        model=model,
        attention=", ".join(stages),
        mean=", ".join(f"{value:g}" for value in mean),
        std=", ".join(f"{value:g}" for value in std),
        interpolation=interpolation,
        source=_cell(source),
        licence=known,
        licence_name=_cell(licence) if known == "other" else "",
        threshold=threshold,
        false_accept_rate=false_accept_rate,
        evaluations=evaluations,
        scores=SCORES,
        protocol=PROTOCOL,
        roboflow=roboflow,
        stablehlo=stablehlo,
        jax_version=importlib.metadata.version("jax"),
    )


def _cell(text: str) -> str:
    """Free text in one line that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
