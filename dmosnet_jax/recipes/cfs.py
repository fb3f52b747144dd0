"""The catastrophic forgetting score of every image of a split, in resumable chunks; see `evaluation.forgetting`."""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.config import dataset_names
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import atomic_write, make_folder
from dmosnet_jax.core.parallel import make_mesh, print_once
from dmosnet_jax.data import rankings
from dmosnet_jax.data.records import TRAIN, Record
from dmosnet_jax.data.splits import Rows, Split, Subset, load_split
from dmosnet_jax.data.subset import share_count
from dmosnet_jax.evaluation.contact_sheet import POSITIONS, write_contact_sheet
from dmosnet_jax.evaluation.forgetting import ForgettingScorer, Proxy
from dmosnet_jax.recipes.chunks import SCORES, Chunks
from dmosnet_jax.recipes.datasets import read_names
from dmosnet_jax.recipes.network import open_network, require_paths
from dmosnet_jax.recipes.scoring import RESULTS
from dmosnet_jax.recipes.training import locked
from dmosnet_jax.train.metrics import progress_bar, write_json

NAMES, SHEET = "names.txt", "contact_sheet.png"
_FIELDS = ("checkpoint_pretrained", "checkpoint_finetuned")


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe, or the rest of it; returns the contents of `results.json`.

    Raises:
        ConfigError: a checkpoint is not given, or the two do not go together.
        DataError: data or a checkpoint missing or damaged, or the workdir is of another run.
    """
    require_paths(config, *_FIELDS)
    [name] = dataset_names(config.dataset)
    split = load_split(config.data_dir, name, config.split)
    proxies, about = _open_proxies(config)
    about |= {"dataset": name, "split": split.split, "images": len(split), "data": rankings.identity(split)}
    about["chunk_images"] = config.cfs.chunk_images
    make_folder(workdir)
    with locked(workdir):
        chunks = Chunks(workdir, split, about)
        scores = chunks.finished()
        if scores is None:
            scores = _score(config, chunks, proxies)
        return _finish(config, chunks, scores)


def _open_proxies(config: Any) -> tuple[list[Proxy], dict[str, Any]]:
    """The two networks, and what identifies them."""
    proxies, about, sizes, filters = [], {}, {}, {}
    for field in _FIELDS:
        network = open_network(config, config[field])
        pixels = tuple(network.config.pixel_mean), tuple(network.config.pixel_std)
        proxies.append(Proxy(network.model, network.params, network.stats, *pixels))
        sizes[field], filters[field] = tuple(network.model.image_size), network.config.data.interpolation
        about[field] = {"path": network.weights.path, **_fingerprint(proxies[-1])}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"image_size: {', '.join(f'{field} has {size}' for field, size in sizes.items())}: give "
            "--config.image_size='(H, W)' for both"
        )
    if len(set(filters.values())) > 1:
        raise ConfigError(
            f"data.interpolation: {', '.join(f'{field} has {name}' for field, name in filters.items())}: give "
            "--config.data.interpolation=bilinear or bicubic for both"
        )
    about["interpolation"] = filters[_FIELDS[0]]
    lengths = [proxy.model.feature_dim for proxy in proxies]
    if lengths[0] != lengths[1]:
        raise DataError(
            f"{config[_FIELDS[0]]} gives embeddings of {lengths[0]} values and {config[_FIELDS[1]]} of {lengths[1]}: "
            "their cosine needs two checkpoints of the same network"
        )
    return proxies, about


def _fingerprint(proxy: Proxy) -> dict[str, Any]:
    """What must be equal for scores to be comparable; the path need not."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path((proxy.params, proxy.stats)):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    model = proxy.model
    return {
        "model": f"{model.name} {model.neck} {model.dtype} {list(model.image_size)}",
        "pixels": [list(proxy.mean), list(proxy.std)],
        "weights": digest.hexdigest(),
    }


def _score(config: Any, chunks: Chunks, proxies: list[Proxy]) -> np.ndarray:
    """Scores what is not on disk yet; returns the scores of all images, on process 0."""
    missing = chunks.missing()
    left = sum(len(chunks.images(number)) for number in missing)
    count = len(chunks.split)
    if left < count:
        print_once(f"goes on in {chunks.workdir}: {count - left:,} of {count:,} images are scored")
    score = ForgettingScorer(
        proxies[0],
        proxies[1],
        make_mesh(),
        interpolation=chunks.about["interpolation"],
        batch_size=config.eval.batch_size,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    with progress_bar(count, label="cfs", initial=count - left) as bar:
        for number in missing:
            images = _Naming(chunks.images(number))
            found = []
            for scores in score(images):
                found.append(scores)
                bar.update(len(scores))
            if jax.process_index() == 0:
                chunks.write(number, np.concatenate(found), images.all_names())
    return chunks.scores() if jax.process_index() == 0 else np.empty(0, np.float32)


class _Naming(Rows):
    """A chunk that keeps the names of the records it reads, so that they need not be read twice."""

    def __init__(self, images: Subset):
        super().__init__(images.name, images.split, images.pids, images.camids)
        self.images = images
        self._names: dict[int, str] = {}

    @property
    def location(self) -> str:
        """See `splits.Rows.location`."""
        return self.images.location

    def record(self, index: int, /) -> Record:
        """See `splits.Split.record`."""
        found = self.images.record(index)
        self._names[index] = found.filename
        return found

    def all_names(self) -> list[str]:
        """Names of all images; those that other processes have read are read again."""
        others = [row for row in range(len(self.images)) if row not in self._names]
        self._names |= dict(zip(others, self.images.filenames(others), strict=True))
        return [self._names[row] for row in range(len(self.images))]


def _finish(config: Any, chunks: Chunks, scores: np.ndarray) -> dict[str, Any]:
    """Writes what a finished run leaves, on process 0."""
    if jax.process_index() != 0:
        return {}
    split, workdir = chunks.split, chunks.workdir
    order = rankings.order(scores)
    names = workdir / (NAMES + (".gz" if len(split) >= rankings.GZIP_FROM else ""))
    if not (names.exists() and (workdir / SCORES).exists()):
        listed = chunks.names() or read_names(split)
        with atomic_write(names) as part:
            rankings.write_names(part, (listed[row] for row in order), compress=names.suffix == ".gz")
        # Last of the two: where it is, the run is over.
        with atomic_write(workdir / SCORES) as part, part.open("wb") as file:
            rankings.write_scores(file, scores, split)
    title = f"{split.name} {split.split}: {len(split):,} images by catastrophic forgetting score, best first"
    write_contact_sheet(
        workdir / SHEET, scores, lambda row: split.record(row).image, title=title, columns=config.cfs.sheet_columns
    )
    results = _results(config, split, scores, order)
    write_json(workdir / RESULTS, results)
    chunks.remove()
    quartiles = "  ".join(f"{position} {score:.4f}" for position, score in results["scores"].items())
    print_once(f"scores of {len(split):,} images, best first: {quartiles}")
    print_once(f"written in {workdir}: {SCORES}, {names.name}, {SHEET}, {RESULTS}")
    if split.split == TRAIN:
        print_once(f'train on the better half: --config.data.subset=\'("cfs", "{workdir / SCORES}", 0.5)\'')
    return results


def _results(config: Any, split: Split, scores: np.ndarray, order: np.ndarray) -> dict[str, Any]:
    ranks = {f"{position}%": round(position / 100 * (len(order) - 1)) for position in POSITIONS}
    return {
        "dataset": split.name,
        "split": split.split,
        "images": len(split),
        "better_half": share_count(len(split), 0.5),
        "scores": {position: float(scores[order[rank]]) for position, rank in ranks.items()},
        "mean": float(scores.mean(dtype=np.float64)),
        **{field: config[field] for field in _FIELDS},
    }
