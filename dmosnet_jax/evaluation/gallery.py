"""A gallery of features on disk that grows and is searched.

    gallery = Gallery.create("gallery", fingerprint=extractor.fingerprint, feature_dim=extractor.feature_dim)
    gallery.append(extractor(paths, normalised=True), paths)
    matches = gallery.search(extractor("query.jpg", normalised=True), top_k=10)

A folder of `gallery.json` and, for each time that images were added, `features-NNNNN.npy` (float16 or float32 [N, E],
of unit length), `files-NNNNN.json` (names) and `cameras-NNNNN.npy` (int32 [N], -1 where unknown). Features are mapped
into memory, not read. A part appears when `gallery.json` names it, so a killed append leaves what was there; there may
be one writer at a time, and any number of readers.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from dmosnet_jax.core import arguments, safe_json
from dmosnet_jax.core.errors import ArgumentError, ConfigError, DataError, printable
from dmosnet_jax.core.files import atomic_write, read
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.evaluation import search

MANIFEST = "gallery.json"
DTYPES = ("float16", "float32")
_FORMAT = 1
_OPEN_AGAIN = "copy the gallery again, or index the images anew"


@dataclasses.dataclass(frozen=True)
class _Part:
    """Images that were added at once; `root` is the folder that their names are relative to, "" for none."""

    images: int
    root: str = ""


class Gallery:
    """See the module.

    Attributes:
        path: the folder.
        fingerprint: of the weights that made the features.
        feature_dim: size E of a feature.
        dtype: "float16" or "float32".
        checkpoint: where these weights were, or "".
    """

    def __init__(self, path: pathlib.Path, values: dict[str, Any]):
        """Of the checked contents of `gallery.json`: use `create` and `open`."""
        self.path = path
        self.fingerprint: str = values["fingerprint"]
        self.feature_dim: int = values["feature_dim"]
        self.dtype: str = values["dtype"]
        self.checkpoint: str = values["checkpoint"]
        self._parts = [_Part(**part) for part in values["parts"]]

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        fingerprint: str,
        feature_dim: int,
        dtype: str = "float16",
        checkpoint: str = "",
    ) -> "Gallery":
        """An empty gallery.

        Raises:
            ConfigError: unknown dtype, or another argument that can't be.
            DataError: there is something already, or it can't be written.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not known: use one of {', '.join(DTYPES)}")
        feature_dim = arguments.count("gallery: feature_dim", feature_dim)
        if not isinstance(fingerprint, str) or not isinstance(checkpoint, str):
            raise ArgumentError("gallery: fingerprint and checkpoint must be texts: give those of the extractor")
        folder = pathlib.Path(path).absolute()
        if folder.exists():
            raise DataError(f"{path}: exists already; open it to add images, or give another path")
        values = {"fingerprint": fingerprint, "feature_dim": feature_dim, "dtype": dtype, "checkpoint": checkpoint}
        gallery = cls(folder, values | {"parts": []})
        with atomic_write(folder) as part:
            part.mkdir()
            (part / MANIFEST).write_text(gallery._manifest(), encoding="utf-8")
        return gallery

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Gallery":
        """A gallery that is there.

        Raises:
            DataError: no gallery, damaged, or of another version.
        """
        file = pathlib.Path(path).absolute() / MANIFEST
        try:
            values = safe_json.read_object(file, fix=_OPEN_AGAIN)
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: is no gallery ({MANIFEST}: {error.strerror}): make one with configs/index.py"
            ) from error
        problem = _wrong(values)
        if problem:
            raise DataError(f"{file}: {problem}; {_OPEN_AGAIN}")
        gallery = cls(file.parent, values)
        for number, part in enumerate(gallery._parts):
            gallery._check_part(number, part)
        return gallery

    def __len__(self) -> int:
        return sum(part.images for part in self._parts)

    @functools.cached_property
    def files(self) -> list[str]:
        """Names of the images.

        Raises:
            DataError: a file is missing or damaged.
        """
        return [name for number, part in enumerate(self._parts) for name in self._names(number, part)]

    @property
    def roots(self) -> list[str]:
        """The folder that each image's name is relative to, "" where it is none."""
        return [part.root for part in self._parts for _ in range(part.images)]

    @property
    def cameras(self) -> Int32[np.ndarray, " n"]:
        """Camera of each image, -1 where unknown."""
        parts = [self._array("cameras", number) for number in range(len(self._parts))]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @property
    def features(self) -> list[np.ndarray]:
        """Features of unit length, mapped into memory, one array for each time that images were added."""
        return [self._array("features", number) for number in range(len(self._parts))]

    def append(
        self,
        features: Float[np.ndarray, "n d"],
        files: Sequence[str | os.PathLike[str]],
        *,
        cameras: Sequence[int] | np.ndarray | None = None,
        root: str = "",
    ) -> None:
        """Adds images; they are there as a whole or not at all.

        Args:
            features: any length; kept with unit length.
            files: their names.
            cameras: of the images; None where they are not known.
            root: the folder that the names are relative to.

        Raises:
            ConfigError: names that are none.
            DataError: the arguments do not pair up, are of another size or not finite, or can't be written.
        """
        listed = isinstance(files, Iterable) and not isinstance(files, str | bytes)
        if not listed or not all(isinstance(name, str | os.PathLike) for name in files):
            raise ArgumentError(f"{self.path}: files={reprlib.repr(files)} must be a list of names")
        if not isinstance(root, str):
            raise ArgumentError(f"{self.path}: root={reprlib.repr(root)} must be a folder's name")
        features = arguments.matrix(f"{self.path}: the features", features, may_be_empty=True)
        if features.shape != (len(files), self.feature_dim):
            raise DataError(
                f"{self.path}: features have shape {features.shape}, which is not that of {len(files)} files and "
                f"{self.feature_dim} values"
            )
        if not np.isfinite(features).all():
            raise DataError(f"{self.path}: the features are not finite; the network has diverged or is damaged")
        places = np.full(len(files), -1, np.int32) if cameras is None else _cameras(self.path, cameras)
        if places.shape != (len(files),):
            raise DataError(f"{self.path}: {len(files)} files have cameras of shape {places.shape}")
        if not len(files):
            return
        number = len(self._parts)
        units = unit_rows_np(features).astype(self.dtype)
        for kind, array in (("features", units), ("cameras", places)):
            with atomic_write(self._file(kind, number)) as part, part.open("wb") as file:
                np.save(file, array)
        names = json.dumps([os.fspath(name) for name in files], ensure_ascii=True)
        with atomic_write(self._file("files", number)) as part:
            part.write_text(names, encoding="utf-8")
        self._parts.append(_Part(len(files), root))
        self.__dict__.pop("files", None)
        try:
            with atomic_write(self.path / MANIFEST) as part:
                part.write_text(self._manifest(), encoding="utf-8")
        except BaseException:
            self._parts.pop()
            raise

    def check(self, fingerprint: str, weights: str | os.PathLike[str]) -> None:
        """Raises DataError where the features are not those of these weights, which none can be compared with."""
        if fingerprint != self.fingerprint:
            own = f" ({printable(self.checkpoint)})" if self.checkpoint else ""
            raise DataError(
                f"{self.path}: was made by other weights{own} than {weights}, and their features can't be compared: "
                "give those weights, or index the images anew"
            )

    def search(self, features: Float[np.ndarray, "q d"], top_k: int = 10, **options: Any) -> search.Matches:
        """The most similar images of each query, exactly: see `search.search`."""
        return search.search(
            unit_rows_np(arguments.matrix("search: queries", features, may_be_empty=True)),
            self.features,
            top_k,
            **options,
        )

    def _manifest(self) -> str:
        values = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "feature_dim": self.feature_dim,
            "dtype": self.dtype,
            "checkpoint": self.checkpoint,
            "parts": [dataclasses.asdict(part) for part in self._parts],
        }
        return json.dumps(values, indent=2) + "\n"

    def _file(self, kind: str, number: int) -> pathlib.Path:
        return self.path / f"{kind}-{number:05d}.{'json' if kind == 'files' else 'npy'}"

    def _array(self, kind: str, number: int) -> np.ndarray:
        path = self._file(kind, number)
        if path.exists() and not path.is_file():
            # Reading a pipe would wait for ever.
            raise DataError(f"{path}: is no file; {_OPEN_AGAIN}")
        with _reading(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)

    def _check_part(self, number: int, part: _Part) -> None:
        expected = {"features": ((part.images, self.feature_dim), self.dtype), "cameras": ((part.images,), "int32")}
        for kind, (shape, dtype) in expected.items():
            found = self._array(kind, number)
            if found.shape != shape or found.dtype != dtype:
                raise DataError(
                    f"{self._file(kind, number)}: is {found.dtype}{list(found.shape)}, not {dtype}{list(shape)}; "
                    f"{_OPEN_AGAIN}"
                )

    def _names(self, number: int, part: _Part) -> list[str]:
        path = self._file("files", number)
        with _reading(path):
            names = json.loads(read(path).decode())
        if not isinstance(names, list) or len(names) != part.images or not all(isinstance(n, str) for n in names):
            raise DataError(f"{path}: is no list of {part.images} names; {_OPEN_AGAIN}")
        return names


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Turns what reading a file raises into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); {_OPEN_AGAIN}") from error
    # Values may be nested deeper than Python recurses.
    except (ValueError, EOFError, RecursionError) as error:
        raise DataError(f"{path}: is damaged ({' '.join(str(error).split())}); {_OPEN_AGAIN}") from error


def _cameras(path: pathlib.Path, cameras: Any) -> Int32[np.ndarray, " n"]:
    found = arguments.integers(f"{path}: cameras", cameras)
    if len(found) and (np.abs(found) >= 2**31).any():
        raise DataError(f"{path}: cameras have {np.abs(found).max()}, which no int32 holds; number them from 0")
    return found.astype(np.int32)


def _wrong(values: Any) -> str | None:
    """What is wrong with the contents of a `gallery.json`, or None."""
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        return f"is not of format {_FORMAT}"
    kinds = {"fingerprint": str, "feature_dim": int, "dtype": str, "checkpoint": str, "parts": list}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            return f"{name} is missing or of another kind"
    if values["dtype"] not in DTYPES or values["feature_dim"] < 1:
        return f"dtype={values['dtype']!r}, feature_dim={values['feature_dim']} are not those of a gallery"
    for part in values["parts"]:
        sound = isinstance(part, dict) and set(part) == {"images", "root"} and isinstance(part["root"], str)
        if not sound or not isinstance(part["images"], int) or part["images"] < 1:
            return "parts are damaged"
    return None
