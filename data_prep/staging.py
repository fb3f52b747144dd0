"""A place to write a data set aside, so that it appears whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from dmosnet_jax.core.errors import DataError


@contextlib.contextmanager
def staging(data_dir: pathlib.Path, dataset: str) -> Iterator[pathlib.Path]:
    """An empty folder in `data_dir`, removed at the end, however it comes.

    It is locked while in use; what a killed process left in it is removed by the next.

    Args:
      data_dir: where the data set will be; made if missing, and removed again if it stays empty.
      dataset: name of the data set; one conversion of each at a time.

    Yields:
      The folder, on the same file system as `data_dir`.

    Raises:
      DataError: another process converts the same data set to the same place, or it cannot be written there.
    """
    made = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    stage = data_dir / f".{dataset}.incomplete"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(stage)
        _empty(stage)
    except OSError as error:
        raise DataError(f"cannot write to {data_dir} ({error.strerror}): give another data_dir") from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def publish(folder: pathlib.Path, target: pathlib.Path, stage: pathlib.Path) -> None:
    """Moves a finished data set from the stage to its place; one that is there already goes with the stage.

    Raises:
      DataError: it cannot be moved there.
    """
    try:
        target.parent.mkdir(exist_ok=True)
        old = stage / "replaced"
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
    except OSError as error:
        raise DataError(
            f"cannot write {target} ({error.strerror}): remove what is there, or give another data_dir"
        ) from error


def _lock(stage: pathlib.Path) -> int:
    """Makes the folder and locks it; the lock ends with the process."""
    while True:
        stage.mkdir(exist_ok=True)
        lock = os.open(stage, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise DataError(f"another conversion is writing {stage}: wait for it to end") from error
        except OSError:
            # Some network file systems have no locks; without one, two conversions at a time are the user's care.
            return lock
        # The process before us may have removed the folder between our opening and locking it.
        if stage.exists() and os.path.samestat(os.fstat(lock), stage.stat()):
            return lock
        os.close(lock)


def _empty(stage: pathlib.Path) -> None:
    for entry in stage.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
