"""Size of a gallery on disk, time and memory of its exact search, on synthetic features.

    python -m dmosnet_jax.benchmarks.gallery --n 1000000 --output=gallery.csv

Features are random directions of 512 values around 10,000 centres. A row says how large the index is, what one query
and a thousand take (medians, the files being in the page cache), the most memory that the process held while it
searched (with the pages of the files that are mapped), and whether the results of the thousand are those of a full
product in float32 of the same stored features.
"""

import functools
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from dmosnet_jax.benchmarks import command
from dmosnet_jax.core import tables
from dmosnet_jax.core.command import guarded, run_program
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.evaluation.gallery import DTYPES, Gallery

_WIDTH, _CENTRES, _CHUNK, _QUERIES, _TOP = 512, 10_000, 50_000, 1000, 10


def _features(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    noise = rng.standard_normal((count, _WIDTH), np.float32)
    return unit_rows_np(centres[rng.integers(0, len(centres), count)] + noise)


def fill(path: str, n: int, dtype: str) -> None:
    """Writes a gallery of n images."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((_CENTRES, _WIDTH), np.float32)
    gallery = Gallery.create(path, fingerprint="synthetic", feature_dim=_WIDTH, dtype=dtype)
    for start in range(0, n, _CHUNK):
        count = min(_CHUNK, n - start)
        gallery.append(_features(rng, centres, count), [f"{start + row:08d}.jpg" for row in range(count)])


def _queries(count: int) -> np.ndarray:
    centres = np.random.default_rng(0).standard_normal((_CENTRES, _WIDTH), np.float32)
    return _features(np.random.default_rng(1), centres, count)


def measure(path: str, repeats: int) -> dict[str, float]:
    """Seconds and memory of searches; in a process of its own."""
    before = time.perf_counter()
    gallery = Gallery.open(path)
    opened = time.perf_counter() - before
    row = {"s to open": opened}
    for count in (1, _QUERIES):
        asked = _queries(count)
        search = functools.partial(gallery.search, asked, _TOP)
        row[f"s for {count}"] = command.median_seconds(search, repeats if count > 1 else 9)[0]
    row["peak GiB"] = (command.peak_memory() or 0) / command.GIB
    return row


def equal_to_full_product(path: str) -> bool:
    """Whether the search finds what sorting the whole product finds, up to the last digits of equal scores."""
    gallery, asked = Gallery.open(path), _queries(_QUERIES)
    found = gallery.search(asked, _TOP)
    stored = np.concatenate(gallery.features)
    for start in range(0, len(asked), 50):
        rows = slice(start, start + 50)
        product = np.concatenate(
            [
                asked[rows] @ stored[first : first + _CHUNK].astype(np.float32).T
                for first in range(0, len(stored), _CHUNK)
            ],
            axis=1,
        )
        best = np.argpartition(-product, _TOP, axis=1)[:, :_TOP]
        wanted = -np.sort(-np.take_along_axis(product, best, axis=1), axis=1)
        told = np.take_along_axis(product, found.indices[rows], axis=1)
        if np.abs(found.scores[rows] - wanted).max() > 1e-6 or np.abs(told - wanted).max() > 1e-6:
            return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    parser = command.parser("gallery", __doc__)
    parser.add_argument("--n", type=command.sizes, default=[1_000_000], help="images in the gallery, by commas")
    parser.add_argument("--repeats", type=int, default=3, help="searches of a thousand queries, whose median counts")
    args = parser.parse_args(argv)

    def run() -> None:
        rows = []
        for n in args.n:
            for dtype in DTYPES:
                with tempfile.TemporaryDirectory() as folder:
                    path = str(pathlib.Path(folder) / "gallery")
                    command.in_fresh_process(fill, path, n, dtype)
                    size = sum(file.stat().st_size for file in pathlib.Path(path).iterdir())
                    row: dict[str, Any] = {"images": n, "dtype": dtype, "GB on disk": size / 1e9}
                    row |= command.in_fresh_process(measure, path, args.repeats)
                    row["as a full product"] = str(command.in_fresh_process(equal_to_full_product, path))
                    rows.append(row)
        tables.publish(rows, args.output)

    return guarded(run)


if __name__ == "__main__":
    run_program(main)
