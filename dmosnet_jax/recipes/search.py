"""The most similar images of a gallery for each of a user's own queries."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.evaluation import report
from dmosnet_jax.evaluation.gallery import Gallery
from dmosnet_jax.recipes.extract import ImageFiles, find_images
from dmosnet_jax.recipes.index import fingerprint_of
from dmosnet_jax.recipes.network import open_network, require_paths
from dmosnet_jax.recipes.scoring import make_extractor
from dmosnet_jax.train.metrics import write_json


def run(config: Any, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Runs the recipe; writes `config.output` and `config.page`, and returns the contents of the first.

    Raises:
        ConfigError: a path is not set, or the gallery names no weights.
        DataError: images, gallery or weights missing or damaged, or the gallery is other weights'.
    """
    del workdir
    require_paths(config, "index", "images", "output")
    for target in filter(None, (config.output, config.page)):
        files.refuse_existing(target, overwrite=config.overwrite)
    gallery = Gallery.open(config.index)
    checkpoint = config.checkpoint or gallery.checkpoint
    if not checkpoint:
        raise ConfigError(f"{config.index}: names no weights: give --config.checkpoint=PATH")
    images = find_images(config.images)
    network = open_network(config, checkpoint)
    gallery.check(fingerprint_of(network), checkpoint)
    features = make_extractor(network.config, network.model, make_mesh())(network.params, network.stats, images)
    found = gallery.search(features, config.top_k)
    results = listed(images.files, gallery, found.indices, found.scores, config.threshold)
    if jax.process_index() == 0:
        write_json(pathlib.Path(config.output), results)
        print(f"{len(images)} queries, {len(gallery)} images in the gallery: {config.output}")
        if config.page:
            _write_page(config, images, gallery, found.indices, results)
            print(f"written: {config.page}")
    return results


def listed(
    queries: Sequence[str], gallery: Gallery, indices: np.ndarray, scores: np.ndarray, threshold: float | None = None
) -> list[dict[str, Any]]:
    """Matches by name, as JSON values; those below a threshold are left out."""
    names = gallery.files
    return [
        {
            "query": query,
            "matches": [
                {"rank": rank, "file": names[row], "score": float(score)}
                for rank, (row, score) in enumerate(zip(rows, values, strict=True), start=1)
                if threshold is None or score >= threshold
            ],
        }
        for query, rows, values in zip(queries, indices, scores, strict=True)
    ]


def _write_page(
    config: Any, images: ImageFiles, gallery: Gallery, indices: np.ndarray, results: list[dict[str, Any]]
) -> None:
    roots = gallery.roots

    def shown(rows: np.ndarray, matches: list[dict[str, Any]]) -> list[report.RankItem]:
        return [
            report.RankItem(
                _read(pathlib.Path(roots[row]) / match["file"]), f"{match['score']:.3f}, {match['file']}", None
            )
            for row, match in zip(rows, matches, strict=False)
        ]

    lists = [
        report.RankList(images.record(number).image, images.files[number], shown(rows, result["matches"]))
        for number, (rows, result) in enumerate(zip(indices, results, strict=True))
        if number < config.eval.rank_lists
    ]
    report.write_report(
        config.page,
        title="Most similar images",
        subtitle=f"{len(images)} queries, {len(gallery)} images in the gallery {config.index}",
        results={},
        rank_lists={"Rank lists": lists},
    )


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}): put the gallery's images back, or leave out --config.page"
        ) from error
