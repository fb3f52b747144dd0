"""Files by path or by URL (`gs://`, `s3://`, ... through fsspec), and the one way to write them whole or not at all.

fsspec is imported when the first URL is met, so that local data never need it. Every function raises `OSError` with a
reason and the path, whatever the storage raises, and `ConfigError` where the storage's package is not installed. A read
of a URL is tried again, and what fails every time is a `DataError`; so is what `atomic_write`, for files that a user
asked for, can't write. Only regular files are read and replaced: a pipe would be waited for, and a device lost.
"""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import os
import pathlib
import posixpath
import random
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dmosnet_jax.core.errors import ArgumentError, ConfigError, DataError, UserError, printable

Path = str | os.PathLike[str]

# Ends the name of a local file or folder that is being written.
PART = ".part"

# The most bytes of an image that are read: crops are some kilobytes, but a file may have any size.
MAX_IMAGE_BYTES = 2**26
# What this process is writing just now.
_unfinished: set[pathlib.Path] = set()

# Requests of a process to remote storages at once, tries of each, and seconds between them: half a minute in all.
REQUESTS, TRIES = 32, 8
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0
_AT_ONCE = 1024

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_FILE = "file://"
_INSTALL = "pip install 'dmosnet_jax[remote]'"


class Entry(NamedTuple):
    """What a folder holds: a name, whether it is a folder, the bytes of a file, and whether it is a link."""

    name: str
    is_folder: bool
    size: int
    is_link: bool = False


def is_remote(location: Path) -> bool:
    """Whether a location is a URL of another storage than the local files."""
    text = os.fspath(location)
    return "://" in text and not text.startswith(_FILE)


def tidy(location: Path) -> str:
    """A path with the user's home filled in, or a URL; neither ends in a slash.

    Raises:
      ArgumentError: it is no path.
    """
    if not isinstance(location, str | os.PathLike):
        raise ArgumentError(f"{printable(location)!r} is no path: give a text or a `pathlib.Path`")
    text = os.fspath(location)
    if is_remote(text):
        return text.rstrip("/") if not text.endswith("://") else text
    return os.path.expanduser(text.removeprefix(_FILE))


def join(location: Path, *names: str) -> str:
    """A location below another."""
    if is_remote(location):
        return "/".join([tidy(location), *names])
    return os.path.join(os.fspath(location), *names)


def storage(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, for this process, and the path in it.

    Raises:
      ConfigError: fsspec, or the package for this kind of URL, is not installed, or there is no such kind.
    """
    kind = url.split("://", 1)[0]
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(f"{url} is remote, which needs fsspec: {_INSTALL}") from error
    try:
        # Instances are cached by fsspec, for each process anew. Listings change under us: others write there too.
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(f"{url} needs another package ({_line(error)}): {_INSTALL}, or that package") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {kind}:// is not a kind of storage that fsspec knows ({_line(error)})") from error
    except Exception as error:
        raise ConfigError(f"{url}: its storage cannot be opened ({_line(error)}): check the credentials") from error


def open_local(location: Path) -> BinaryIO:
    """A local file for reading at any position.

    Raises:
      OSError: it is not there, or is no regular file, which is not waited for.
    """
    path = tidy(location)
    # Opening a pipe waits for a writer, and reading a device may never end.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOCTTY", 0))
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        return open(handle, "rb", buffering=1 << 20)
    os.close(handle)
    number = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
    raise OSError(number, os.strerror(number) if stat.S_ISDIR(kind) else "it is no regular file", path)


def foreign(start: bytes) -> str | None:
    """What a file is that stands in the place of another one, by its first 512 bytes; None where that is not known."""
    head = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not the file itself: download the file again"
    if start[257:262] == b"ustar":
        return "is a tar archive: unpack it, and give what is inside"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")):
        return "is compressed: unpack it, and give what is inside"
    return None


def read(location: Path, *, most: int | None = None) -> bytes:
    """The content of a file; a local one of more than `most` bytes is an `OSError`, before it is read."""
    if not is_remote(location):
        with open_local(location) as file:
            if most is not None and os.fstat(file.fileno()).st_size > most:
                raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", os.fspath(location))
            return file.read()
    return _request(location, lambda files, path: files.cat_file(path))


def read_range(location: Path, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file from `offset`, fewer where it ends before; of a remote one by one request."""
    if size <= 0:
        return b""
    if not is_remote(location):
        with open_local(location) as file:
            file.seek(offset)
            return file.read(size)
    return _request(location, lambda files, path: files.cat_file(path, start=offset, end=offset + size))


@contextlib.contextmanager
def open_stream(location: Path) -> Iterator[BinaryIO]:
    """A file to read from its start to its end."""
    if not is_remote(location):
        with open_local(location) as file:
            yield file
        return
    with _remote(location) as (files, path), files.open(path, "rb", block_size=1 << 23) as stream:
        yield stream


def size(location: Path) -> int:
    """Bytes in a file."""
    if not is_remote(location):
        return os.stat(tidy(location)).st_size
    return _request(location, lambda files, path: int(files.info(path)["size"]))


def is_file(location: Path) -> bool:
    """Whether a file is there."""
    if not is_remote(location):
        return os.path.isfile(tidy(location))
    return _request(location, lambda files, path: bool(files.isfile(path)))


def entries(location: Path) -> list[Entry]:
    """What a folder holds, sorted by name."""
    if not is_remote(location):
        with os.scandir(tidy(location)) as found:
            return sorted(_local_entry(entry) for entry in found)
    listed, root = _request(location, lambda files, path: (files.ls(path, detail=True), path.rstrip("/")))
    return sorted(
        Entry(posixpath.basename(info["name"].rstrip("/")), info["type"] == "directory", int(info["size"] or 0))
        for info in listed
        # Object stores list a folder's own mark as one of its entries.
        if info["name"].rstrip("/") != root
    )


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    is_folder, is_link, size = entry.is_dir(), entry.is_symlink(), 0
    if not is_folder:
        # A link may lead nowhere.
        with contextlib.suppress(FileNotFoundError):
            size = entry.stat().st_size
    return Entry(entry.name, is_folder, size, is_link)


def concurrently(work: Callable[[_Item], _Result], items: Iterable[_Item], location: Path) -> list[_Result]:
    """What reads of a location give for each item, in order: remote ones wait for their answers together.

    All threads of a process share `REQUESTS` of them at once, so that a slow storage hides its latency and is not
    flooded. Work must not call this itself.
    """
    if not is_remote(location):
        return [work(item) for item in items]
    readers, left = _readers(os.getpid()), iter(items)
    found: list[_Result] = []
    # Not all of millions at once: each has a handle of its own.
    while some := list(itertools.islice(left, _AT_ONCE)):
        found += readers.map(work, some)
    return found


@functools.cache
def _readers(process: int) -> concurrent.futures.ThreadPoolExecutor:
    """The threads of a process; a fork has none of its parent's."""
    del process
    return concurrent.futures.ThreadPoolExecutor(REQUESTS, thread_name_prefix="remote")


def _request(location: Path, request: Callable[[Any, str], _Result]) -> _Result:
    """What a request to a URL's storage gives; see `again`."""

    def ask() -> _Result:
        with _remote(location) as (files, path):
            return request(files, path)

    return again(ask, location)


def again(read: Callable[[], _Result], location: Path) -> _Result:
    """What a read of a location gives; of a remote one it is tried again, after waits that double up to a cap.

    Args:
      read: may fail with `OSError` in the middle.
      location: what it reads.

    Raises:
      DataError: it failed every time.
      OSError: there is no such file, or no permission.
    """
    if not is_remote(location):
        return read()
    since, last = time.monotonic(), ""
    for attempt in range(TRIES):
        if attempt:
            # Not all at the same time: whoever failed together would fail together again.
            time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
        try:
            return read()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            last = str(error.strerror)
    raise DataError(
        f"{os.fspath(location)}: {TRIES} requests in {time.monotonic() - since:.0f} s failed, the last by: {last}: see "
        "that this machine reaches the storage (network, credentials, quota), then run the same command to go on"
    )


def write(location: Path, data: bytes) -> None:
    """Writes a file, whole or not at all; makes its folder."""
    with create(location) as file:
        file.write(data)


@contextlib.contextmanager
def create(location: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name at the end of the block and not before; makes its folder."""
    if is_remote(location):
        with _remote(location) as (files, path):
            files.makedirs(posixpath.dirname(path), exist_ok=True)
            file = files.open(path, "wb")
            try:
                yield file
            except BaseException:
                # Closing would publish what was written so far.
                with contextlib.suppress(Exception):
                    file.discard()
                raise
            file.close()
        return
    with _replacing(location) as part, part.open("wb", buffering=1 << 20) as file:
        yield file


def make_folder(folder: Path) -> None:
    """Makes a local folder and those above it.

    Raises:
      DataError: it can't be made.
    """
    try:
        os.makedirs(tidy(folder), exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: can't be made ({error.strerror}): give a folder that can be written to") from error


def refuse_existing(path: Path, *, overwrite: bool, may_replace: Callable[[str], bool] = os.path.isfile) -> None:
    """Checks that a result may be written to a local path, before the work for it is done.

    Args:
      path: where the result goes.
      overwrite: whether an earlier result may be replaced.
      may_replace: whether what is there is such a result.

    Raises:
      DataError: something is there that may not be replaced.
    """
    target = tidy(path)
    if not os.path.lexists(target) or (overwrite and may_replace(os.path.realpath(target))):
        return
    if overwrite or not may_replace(os.path.realpath(target)):
        raise DataError(f"{path}: is something else than an earlier result, and stays: give another path")
    raise DataError(f"{path}: exists already: give another path, remove it first, or set --config.overwrite=True")


@contextlib.contextmanager
def atomic_write(path: Path, *, replace_folder: bool = False) -> Iterator[pathlib.Path]:
    """A name beside a local `path` for a file or a folder, which replaces it, whole, when the block ends.

    It is on the disk before it gets the name, and vanishes when the block fails; two writers do not meet. Missing
    folders are made. A folder that is there is replaced where that is asked for; killed in between, both are left.

    Raises:
      ConfigError: the path is a URL.
      DataError: it can't be written there.
    """
    if is_remote(path):
        raise ConfigError(f"{path}: results can be written to local folders only; give a local path, and copy it then")
    try:
        with _replacing(path, replace_folder=replace_folder) as part:
            yield part
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{path}: can't be written ({reason}); give a path in a writable folder") from error


@contextlib.contextmanager
def _replacing(path: Path, *, replace_folder: bool = False) -> Iterator[pathlib.Path]:
    # A link stays one: what it leads to is replaced.
    target = pathlib.Path(os.path.realpath(tidy(path)))
    _refuse_special(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Process ids are equal in containers that share a disk.
    part = target.with_name(f"{target.name}.{secrets.token_hex(8)}{PART}")
    _unfinished.add(part)
    try:
        yield part
        flush_tree(part)
        if replace_folder and target.is_dir():
            old = part.with_suffix(".old")
            target.rename(old)
            part.rename(target)
            remove(old)
        else:
            part.replace(target)
        # Some network file systems know no flushing of a folder.
        with contextlib.suppress(OSError):
            _flush(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(part)
        raise
    finally:
        _unfinished.discard(part)


def discard_unfinished() -> None:
    """Removes what this process is writing just now, because it ends at once."""
    for part in list(_unfinished):
        with contextlib.suppress(OSError):
            remove(part)


def _refuse_special(target: pathlib.Path) -> None:
    """Raises OSError where there is something else than a file or folder: a rename would put a file in its place."""
    try:
        kind = os.lstat(target).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket", os.fspath(target))


def flush_tree(folder: Path) -> None:
    """Waits until a local folder, with everything in it, is on the disk."""
    top = pathlib.Path(tidy(folder))
    for entry in [top, *top.rglob("*")]:
        _flush(entry)


def _flush(path: pathlib.Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes were writing in a local folder; nobody else may be writing there."""
    for part in pathlib.Path(tidy(folder)).glob("*" + PART):
        remove(part)


def remove(location: Path) -> None:
    """Removes a folder with everything in it, or a file, where it is there."""
    if is_remote(location):
        with _remote(location) as (files, path):
            if files.exists(path):
                files.rm(path, recursive=True)
        return
    path = tidy(location)
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def copy(source: Path, target: Path) -> None:
    """Copies a file to a remote location: a local one up, a remote one within its storage."""
    with _remote(target) as (files, path):
        files.makedirs(posixpath.dirname(path), exist_ok=True)
        if is_remote(source):
            files.cp_file(storage(os.fspath(source))[1], path)
        else:
            files.put_file(tidy(source), path)


@contextlib.contextmanager
def _remote(location: Path) -> Iterator[tuple[Any, str]]:
    """The storage and path of a URL; inside, every failure becomes an `OSError` with a reason and the URL."""
    url = os.fspath(location)
    files, path = storage(url)
    try:
        yield files, path
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, _line(error), url) from error
    except UserError:
        raise
    # Each storage has errors of its own: of HTTP, of its library, of the network.
    except Exception as error:
        raise OSError(errno.EIO, _line(error), url) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
