"""Scores and names of a split's images on disk, in chunks, so that a killed run can be resumed."""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core import safe_json
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.parallel import from_first
from dmosnet_jax.core.safe_npz import read_arrays
from dmosnet_jax.data import rankings
from dmosnet_jax.data.splits import Split, Subset
from dmosnet_jax.train.metrics import write_json

SCORES, RUN, FOLDER = "scores.npz", "run.json", "chunks"


class Chunks:
    """Runs of images whose scores and names go to disk at once, in files that appear whole or not at all."""

    def __init__(self, workdir: pathlib.Path, split: Split, about: dict[str, Any]):
        """Resumes the run in a workdir, or starts one.

        Raises:
            DataError: the workdir is of a run with other images, checkpoints or chunks.
        """
        self.workdir, self.split, self.about = workdir, split, about
        self._size = about["chunk_images"]
        self.bounds = [(at, min(at + self._size, len(split))) for at in range(0, len(split), self._size)]
        if jax.process_index() == 0:
            self._check_run()

    def _check_run(self) -> None:
        path = self.workdir / RUN
        if not path.exists():
            write_json(path, self.about)
            return
        before = safe_json.read_object(path, fix="remove the folder, or give another --workdir")
        same = _without_path
        changed = [name for name, value in self.about.items() if same(before.get(name)) != same(value)]
        if changed:
            raise DataError(
                f"{self.workdir}: holds the scores of a run with another {', '.join(changed)}: give another --workdir, "
                "or the earlier settings"
            )

    def finished(self) -> np.ndarray | None:
        """The scores of a finished run (empty except on process 0); None where the run is not finished."""
        found = np.empty(0, np.float32)
        if jax.process_index() == 0 and (self.workdir / SCORES).exists():
            found = rankings.read_scores(self.workdir / SCORES, self.split)
        return found if from_first(np.array(found.size)) else None

    def missing(self) -> list[int]:
        """Numbers of the chunks that are not on disk, the same on every process."""
        done = np.zeros(len(self.bounds), bool)
        if jax.process_index() == 0:
            done[:] = [self.read(number) is not None for number in range(len(self.bounds))]
        return np.flatnonzero(~from_first(done)).tolist()

    def images(self, number: int) -> Subset:
        """The images of a chunk."""
        return Subset(self.split, np.arange(*self.bounds[number], dtype=np.int32))

    def _path(self, number: int) -> pathlib.Path:
        return self.workdir / FOLDER / f"{number:06d}.npz"

    def write(self, number: int, scores: np.ndarray, names: list[str]) -> None:
        """Keeps a chunk."""
        text = np.frombuffer("\n".join(name.replace("\n", " ") for name in names).encode(), np.uint8)
        with atomic_write(self._path(number)) as part, part.open("wb") as file:
            np.savez(file, scores=scores, names=text)

    def read(self, number: int) -> tuple[np.ndarray, list[str]] | None:
        """Scores and names of a chunk; None where it is not there, or damaged."""
        first, last = self.bounds[number]
        try:
            arrays = read_arrays(self._path(number))
            scores, names = arrays["scores"], arrays["names"].tobytes().decode().split("\n")
        except Exception:
            # Scored again, whatever is wrong with it.
            return None
        return (scores, names) if scores.shape == (last - first,) and len(names) == last - first else None

    def scores(self) -> np.ndarray:
        """Scores of all images, float32 [N]; every chunk is on disk.

        Raises:
            DataError: a chunk vanished.
        """
        return np.concatenate([self._read(number)[0] for number in range(len(self.bounds))])

    def names(self) -> list[str]:
        """Names of all images, or an empty list where the chunks are gone."""
        found = [self.read(number) for number in range(len(self.bounds))]
        return [name for chunk in found if chunk for name in chunk[1]] if all(found) else []

    def _read(self, number: int) -> tuple[np.ndarray, list[str]]:
        chunk = self.read(number)
        if chunk is None:
            raise DataError(f"{self._path(number)}: vanished or damaged; run the same command again")
        return chunk

    def remove(self) -> None:
        """Removes the chunks."""
        shutil.rmtree(self.workdir / FOLDER, ignore_errors=True)


def _without_path(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else value
