"""Writes every experiment's config as text, one line a field, so that a changed default shows in the diff.

python tests/golden/make_configs.py
"""

import importlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(__file__).resolve().parent / "configs"
# File names of the texts, and what stands after `--config=configs/`.
CASES = {
    "cfs_luperson": "cfs_luperson",
    "evaluate": "evaluate",
    "export": "export",
    "activation_maps": "activation_maps",
    "compare": "compare",
    "extract": "extract",
    "index": "index",
    "search": "search",
    "finetune": "finetune",
    "finetune_released": "finetune:market1501,recipe=released",
    "finetune_released_cuhk03": "finetune:cuhk03_detected,recipe=released",
    "quickstart": "quickstart",
    "spcl_luperson": "spcl_luperson:cfs=scores.npz",
    "spcl_market1501": "spcl_market1501",
    "spcl_market1501_cluster_contrast": "spcl_market1501:recipe=cluster_contrast",
    "spcl_uda": "spcl_uda",
}


def text(name: str) -> str:
    """The fields of a case, sorted by name."""
    file, _, arg = CASES[name].partition(":")
    config = importlib.import_module(f"configs.{file}").get_config(arg or None)
    return "".join(f"{field} = {value!r}\n" for field, value in sorted(_leaves(config.to_dict())))


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        (FOLDER / f"{case}.txt").write_text(text(case), encoding="utf-8")
