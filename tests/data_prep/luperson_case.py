"""Small sources of LUPerson, and their conversion, for the tests of it."""

import pathlib

from data_prep import convert
from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.data.splits import load_split

ROOT = pathlib.Path(convert.__file__).resolve().parent.parent
SCENE = Scene(train_ids=6, test_ids=3, cameras=4, images=3, image_size=(64, 32))
# About five shards; in this process, for worker processes take time to start.
SMALL = {"shard_mib": 0.03, "workers": 1}


def run(source, data_dir, **options):
    warnings = []
    summary = convert.convert("luperson", data_dir, source=source, options=SMALL | options, warn=warnings.append)
    return summary, warnings


def rows(data_dir):
    split = load_split(data_dir, "luperson", "train")
    return [split.record(row) for row in range(len(split))]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def jpegs(folder):
    return [path for path in sorted(folder.rglob("*.jpg")) if path.is_file()]
