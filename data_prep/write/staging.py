"""A folder in which a data set is written, so that it appears under its name whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from tqdm import tqdm

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

_OLD = ".replaced"


@contextlib.contextmanager
def staging(data_dir: pathlib.Path, dataset: str, *, keep: bool = False) -> Iterator[pathlib.Path]:
    """An empty folder in `data_dir` for one conversion of the data set at a time, removed at the end.

    It is locked while in use; what a killed process left in it is removed by the next one.

    Args:
      data_dir: where the data set will be; made if missing, and removed again if it stays empty.
      dataset: its name.
      keep: after a failure or a kill, the next conversion finds the folder as it was left.

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
        _restore(data_dir / dataset)
        if not keep:
            _empty(stage)
    except OSError as error:
        raise DataError(f"cannot write to {data_dir} ({error.strerror}): give another data_dir") from error
    done = False
    try:
        yield stage
        done = True
    finally:
        if done or not keep or not any(stage.iterdir()):
            shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def publish(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a finished data set from the stage to `target`, and removes one that is there already.

    Raises:
      DataError: it cannot be moved there.
    """
    # Not on the stage, which the next conversion empties: `_restore` must find it.
    old = target.with_name(f".{target.name}{_OLD}")
    try:
        # Names may be on the disk before the content that they stand for.
        files.flush_tree(folder)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write {target} ({error.strerror}): remove what is there, or give another data_dir"
        ) from error


def sweep(data_dir: pathlib.Path, dataset: str, unfinished: str = "") -> None:
    """Removes the stage of a conversion that was killed when its data set had been published.

    Args:
      data_dir: see `staging`.
      dataset: its name, which is there.
      unfinished: of a kept stage, the folder in it that is moved away when all is done; where it is there, the stage is
        of another conversion, which is to go on.
    """
    stage = data_dir / f".{dataset}.incomplete"
    if not stage.is_dir() or (unfinished and (stage / unfinished).exists()):
        return
    # Another conversion may be at work, or the folder not be ours to change.
    with contextlib.suppress(DataError, OSError):
        lock = _lock(stage)
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


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


def _restore(folder: pathlib.Path) -> None:
    """Puts back a data set whose replacement was killed between the two renames of `publish`."""
    for old in folder.glob(f".*{_OLD}"):
        target = old.with_name(old.name[1 : -len(_OLD)])
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)


def _empty(stage: pathlib.Path) -> None:
    for entry in stage.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def upload(folder: str, target: str) -> None:
    """Copies a finished data set to a URL; it is one when its description, the last file, is there.

    Args:
      folder: a folder, or a URL in the same storage.
      target: the URL of the data set; what is there already is replaced.

    Raises:
      DataError: it cannot be copied.
    """
    try:
        files.remove(files.join(target, records.INFO_FILE))
        files.remove(target)
        names = [entry.name for entry in files.entries(folder)]
        bar = tqdm(sorted(names, key=lambda name: name == records.INFO_FILE), desc="copying", disable=None, leave=False)
        for name in bar:
            files.copy(files.join(folder, name), files.join(target, name))
    except OSError as error:
        raise DataError(f"cannot write to {target} ({error.strerror}): check the name and the credentials") from error
