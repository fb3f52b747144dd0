"""A part of a split, chosen by an order of its images from outside, such as the catastrophic forgetting score.

Nothing is rewritten: a subset is a list of rows over the shards that are there.
"""

import contextlib
import dataclasses
import fractions
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Int64

from dmosnet_jax.core import arguments, files
from dmosnet_jax.core.errors import ConfigError, DataError, printable
from dmosnet_jax.core.safe_npz import read_arrays
from dmosnet_jax.data.rankings import identity, read_ranking
from dmosnet_jax.data.splits import Split, Subset

# Reading every name means reading every record: from so many images on, the matches are cached beside the list.
KEEP_FROM = 100_000
# A list of which less than this share is found, of itself and of what is wanted, is of another data set.
_LEAST = 0.5
_SUFFIX = re.compile(r"(?<=[^/])\.(?:jpe?g|png|bmp|webp)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Matches:
    """Where the names of a list are in a data set.

    Attributes:
      rows: of the data set, best first; each once.
      listed: entries of the list.
      unmatched: entries that name no image of the data set.
      repeated: entries that name an image for the second time.
      how: what of the names was compared.
    """

    rows: Int64[np.ndarray, " m"]
    listed: int
    unmatched: int = 0
    repeated: int = 0
    how: str = "scores"


def share_count(total: int, share: float) -> int:
    """Images in a share of `total`: rounded up, computed exactly (the half of 4,180,243 is 2,090,122).

    Raises:
      ConfigError: the share is not in (0, 1].
    """
    if arguments.number("subset: share", share, low=0, high=1) == 0:
        raise ConfigError("subset: share=0 leaves no image: give a number up to 1")
    return math.ceil(fractions.Fraction(str(share)) * total)


def choose(
    split: Split, path: str | os.PathLike[str], share: float, *, names: Callable[[], Sequence[str]] | None = None
) -> tuple[Subset, str]:
    """The best images of a split by a score file or a list of names.

    The first `share_count(len(split), share)` images of the order are kept, or all of it where it has fewer; they stay
    in the order of the records.

    Args:
      split: the whole split.
      path: see `rankings.read_ranking`.
      share: of the split's images, in (0, 1].
      names: gives the file names of the split; None reads them without showing progress.

    Returns:
      The subset, and a sentence about it.

    Raises:
      DataError: the file can't be read, is refused, is of another data set, or names none or few of the images.
    """
    wanted = share_count(len(split), share)
    found = ranked_rows(split, path, names=names)
    if len(found.rows) < _LEAST * min(wanted, found.listed):
        raise DataError(
            f"{os.fspath(path)}: only {len(found.rows):,} of its {found.listed:,} names are in {split.name} "
            f"{split.split}, of whose {len(split):,} images {wanted:,} are wanted: give the list of this data set, or "
            "one of the names that it shares with it"
        )
    rows = np.sort(found.rows[:wanted]).astype(np.int32)
    about = f"{split.name} {split.split}: {len(rows):,} of {len(split):,} images, the best by {os.fspath(path)}"
    if found.how != "scores":
        about += f" ({found.listed:,} names, {found.unmatched:,} of them not in the data set, compared by {found.how}"
        about += f", {found.repeated:,} repeated)" if found.repeated else ")"
    if len(rows) < wanted:
        about += f"; a share of {share} would be {wanted:,}"
    return Subset(split, rows), about


def ranked_rows(
    split: Split, path: str | os.PathLike[str], *, names: Callable[[], Sequence[str]] | None = None
) -> Matches:
    """Rows of a split in the order of a score file or a list of names; arguments and errors as for `choose`."""
    cache = _MatchCache(path, split) if len(split) >= KEEP_FROM else None
    if cache is not None and (found := cache.read()) is not None:
        return found
    ranking = read_ranking(path, split)
    if isinstance(ranking, np.ndarray):
        return Matches(ranking, listed=len(ranking))
    found = _match(ranking, split.filenames() if names is None else names(), f"{split.name} {split.split}", path)
    if cache is not None:
        cache.write(found)
    return found


def _match(listed: Sequence[str], names: Sequence[str], what: str, path: str | os.PathLike[str]) -> Matches:
    """Finds the listed names among a data set's by the most telling form of a name that finds the most.

    Lists name an image by other roots, without the suffix, or with `_` between the parts of its path, as LMDB keys have
    it. A form under which two images of the data set would have the same name is not used.
    """
    best: tuple[int, str, np.ndarray] | None = None
    for how, form in _forms(listed, names):
        table = {form(name): row for row, name in enumerate(names)}
        if len(table) < len(names):
            continue
        rows = np.fromiter((table.get(form(name), -1) for name in listed), np.int64, len(listed))
        count = int(np.count_nonzero(rows >= 0))
        if best is None or count > best[0]:
            best = count, how, rows
        if count == len(listed):
            break
    if best is None or not best[0]:
        raise DataError(
            f"{os.fspath(path)}: none of its {len(listed):,} names (the first is {printable(listed[0], 80)!r}) is in "
            f"{what} (its first is {printable(names[0], 80)!r}): give the list of this data set"
        )
    count, how, rows = best
    present = rows[rows >= 0]
    # The first mention counts.
    first = np.sort(np.unique(present, return_index=True)[1])
    return Matches(present[first], len(listed), len(listed) - count, len(present) - len(first), how)


def _forms(listed: Sequence[str], names: Sequence[str]) -> list[tuple[str, Callable[[str], str]]]:
    """Forms of a name that may be compared, the most telling first, each with its description."""
    depth = min(_path(listed[0]).count("/"), _path(names[0]).count("/")) + 1
    return [
        ("path", _path),
        ("path without suffix", _stem),
        *((f"the last {parts} parts of the path", partial(_last, parts)) for parts in range(depth, 1, -1)),
        ("file name", partial(_last, 1)),
        ("path joined by _", lambda name: _stem(name).replace("/", "_")),
        # LUPerson's country, city, video and image, and the same without the video.
        *((f"the last {parts} parts of the path joined by _", partial(_last, parts, join="_")) for parts in (4, 3)),
    ]


def _path(name: str) -> str:
    return re.sub(r"^(?:\./|/)+", "", name.replace("\\", "/"))


def _stem(name: str) -> str:
    # Only the suffixes of images are removed: other points belong to the name.
    return _SUFFIX.sub("", _path(name))


def _last(parts: int, name: str, join: str = "/") -> str:
    return join.join(_stem(name).rsplit("/", parts)[-parts:])


class _MatchCache:
    """The rows that a list names in a data set, in a file beside the list."""

    def __init__(self, path: str | os.PathLike[str], split: Split):
        ranking = pathlib.Path(files.tidy(path))
        self._identity = identity(split)
        self._digest = ""
        with contextlib.suppress(OSError), files.open_local(ranking) as file:
            self._digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        self._path = ranking.with_name(f"{ranking.name}.rows-{self._identity[:16]}.npz")

    def read(self) -> Matches | None:
        """The rows; None where there is no file, or it is damaged or of another list or data set."""
        try:
            stored = read_arrays(self._path)
            if (str(stored["identity"]), str(stored["digest"])) != (self._identity, self._digest):
                return None
            counts = {name: int(stored[name]) for name in ("listed", "unmatched", "repeated")}
            return Matches(stored["rows"].astype(np.int64), **counts, how=str(stored["how"]))
        except Exception:
            return None

    def write(self, found: Matches) -> None:
        """Writes the file, where the folder allows it."""
        values = dataclasses.asdict(found) | {"identity": self._identity, "digest": self._digest}
        with contextlib.suppress(OSError), files.create(self._path) as file:
            np.savez(file, **values)
