"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from dmosnet_jax.core.errors import DataError


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` that takes its name when the block ends, and vanishes when it fails.

    Missing folders are made.

    Raises:
        DataError: the file can't be written there.
    """
    place = pathlib.Path(path)
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            aside.replace(place)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: can't be written ({reason}); give a path in a writable folder") from error
