import contextlib
import os
import stat
import sys
import threading
import tracemalloc
import uuid

import pytest

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path):
    """A folder of each kind that does not exist yet."""
    if request.param == "memory":
        pytest.importorskip("fsspec")
        return f"memory://{uuid.uuid4().hex}/deep"
    return ("file://" if request.param == "file" else "") + str(tmp_path / "deep")


def test_files_are_written_listed_read_and_removed(folder, rng):
    data = rng.bytes(10_000)
    for name, content in {"b": data, "a": b"", "below/c": b"123"}.items():
        files.write(files.join(folder, *name.split("/")), content)
    entries = [(e.name, e.is_folder, e.size) for e in files.entries(folder)]
    assert entries == [("a", False, 0), ("b", False, 10_000), ("below", True, 0)]
    path = files.join(folder, "b")
    assert files.read(path) == data
    assert files.size(path) == 10_000
    assert files.is_file(path)
    assert not files.is_file(folder)
    with files.open_stream(path) as file:
        assert file.read(7) + file.read() == data
    files.write(path, b"new")
    assert files.read(path) == b"new"
    files.remove(path)
    files.remove(path)
    assert not files.is_file(path)
    files.remove(folder)
    assert not files.is_file(files.join(folder, "below", "c"))
    with pytest.raises(FileNotFoundError) as error:
        files.read(path)
    assert error.value.strerror == "No such file or directory"


def test_ranges_end_where_the_file_does():
    pytest.importorskip("fsspec")
    url = f"memory://{uuid.uuid4().hex}/file"
    files.write(url, bytes(range(100)))
    assert files.read_range(url, 10, 5) == bytes(range(10, 15))
    assert files.read_range(url, 95, 50) == bytes(range(95, 100))
    assert files.read_range(url, 95, 0) == b""


def test_a_failed_local_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails():
        with files.create(path) as file:
            file.write(b"half")
            assert path.read_bytes() == b"old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path, is_folder):
    target = tmp_path / "deep" / "target"

    def fill(part, content):
        if is_folder:
            part.mkdir()
            (part / "inside").write_bytes(content)
        else:
            part.write_bytes(content)

    def fails():
        with files.atomic_write(target) as part:
            fill(part, b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert list(target.parent.iterdir()) == []
    with files.atomic_write(target) as part:
        fill(part, b"whole")
        assert not target.exists()
    assert (target / "inside" if is_folder else target).read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_content_is_on_the_disk_before_it_has_its_name_and_then_the_name(tmp_path, monkeypatch):
    synced, target = [], tmp_path / "target"
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, target.exists())))
    with files.atomic_write(target) as part:
        part.mkdir()
        (part / "inside").write_bytes(b"1")
        inside, folder = (path.stat().st_ino for path in (part / "inside", part))
    assert set(synced) == {(inside, False), (folder, False), (tmp_path.stat().st_ino, True)}
    monkeypatch.setattr(os, "fsync", original)


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    # As two containers on one disk, whose only process has the same number.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "file"
    with files.atomic_write(path) as one, files.atomic_write(path) as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_files_have_the_permissions_of_any_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        files.write(tmp_path / "a", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(DataError, match=r"file/below: can't be written \(.*\); give a path in a writable folder"),
        files.atomic_write(tmp_path / "file" / "below") as part,
    ):
        part.write_bytes(b"1")


def test_results_at_a_url_are_refused_and_no_folder_of_its_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match="gs://bucket/a: results can be written to local folders only"),
        files.atomic_write("gs://bucket/a"),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_only_what_was_being_written_is_removed(tmp_path):
    for name in ("a", "a.0123.part", "b.part.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.4567.part").mkdir()
    files.remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b.part.txt"]


def test_copies_go_up_and_across(tmp_path):
    pytest.importorskip("fsspec")
    (tmp_path / "here").write_bytes(b"content")
    root = f"memory://{uuid.uuid4().hex}"
    files.copy(tmp_path / "here", f"{root}/new/there")
    files.copy(f"{root}/new/there", f"{root}/other")
    assert files.read(f"{root}/new/there") == files.read(f"{root}/other") == b"content"


def test_paths_and_urls(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert files.tidy("~/data") == "/home/somebody/data"
    assert files.tidy("gs://bucket/data/") == "gs://bucket/data"
    assert files.join("gs://bucket/", "a", "b") == "gs://bucket/a/b"
    assert files.join("data", "a") == os.path.join("data", "a")
    assert [files.is_remote(p) for p in ("gs://b", "s3://b/c", "file:///data", "/data", "data")] == [True] * 2 + [
        False
    ] * 3


def test_what_is_not_installed_or_unknown_is_one_line(monkeypatch):
    pytest.importorskip("fsspec")
    with pytest.raises(ConfigError, match="nowhere://x: nowhere:// is not a kind of storage"):
        files.read("nowhere://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"gs://b/c is remote, .*pip install 'dmosnet_jax\[remote\]'") as error:
        files.read("gs://b/c")
    assert "\n" not in str(error.value)


def test_a_missing_storage_package_names_the_extra(monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"Please install gcsfs.*dmosnet_jax\[remote\]"):
        files.read("gs://b/c")


def hanging_free(function):
    """What a call raises, given up after ten seconds; a pipe would be waited for."""
    found = []

    def call():
        try:
            function()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(10)
    assert found, "it hangs, or raises nothing"
    return found[0]


@pytest.mark.parametrize(
    "reader", [files.read, lambda path: files.read_range(path, 0, 5), lambda path: files.open_stream(path).__enter__()]
)
def test_pipes_and_devices_are_not_read(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", "/dev/zero"):
        error = hanging_free(lambda special=special: reader(special))
        assert isinstance(error, OSError)
        assert error.strerror == "it is no regular file"
    assert isinstance(hanging_free(lambda: reader(tmp_path)), IsADirectoryError)


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(DataError, match=r"pipe: can't be written \(it is a device, a pipe or a socket\)"),
        files.atomic_write(tmp_path / "pipe") as part,
    ):
        part.write_bytes(b"1")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]
    before = os.stat("/dev/null").st_mode
    with pytest.raises(DataError), files.atomic_write("/dev/null") as part:
        part.write_bytes(b"1")
    assert os.stat("/dev/null").st_mode == before


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    with files.atomic_write(tmp_path / "link") as part:
        part.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"new"


def test_an_earlier_result_is_replaced_where_that_is_said_and_nothing_else_ever(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    files.refuse_existing(tmp_path / "new", overwrite=False)
    files.refuse_existing(tmp_path / "file", overwrite=True)
    with pytest.raises(DataError, match=r"file: exists already: .*--config\.overwrite=True"):
        files.refuse_existing(tmp_path / "file", overwrite=False)
    for overwrite in (False, True):
        with pytest.raises(DataError, match="folder: is something else than an earlier result, and stays"):
            files.refuse_existing(tmp_path / "folder", overwrite=overwrite)


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "target"
    for content in ("first", "second"):
        with files.atomic_write(target, replace_folder=True) as part:
            part.mkdir()
            (part / content).write_bytes(b"")
        assert os.listdir(target) == [content]
        assert os.listdir(tmp_path) == ["target"]


def test_what_is_being_written_can_be_discarded_at_once(tmp_path):
    with contextlib.suppress(FileNotFoundError), files.create(tmp_path / "file") as file:
        file.write(b"half")
        assert len(os.listdir(tmp_path)) == 1
        files.discard_unfinished()
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n<HTML>", "is a web page"),
        (b"\0" * 257 + b"ustar", "is a tar archive"),
        (b"\x1f\x8b\x08", "is compressed"),
        (b"BZh9", "is compressed"),
        (b"PK\x03\x04", None),
        (b"", None),
    ],
)
def test_files_that_stand_in_the_place_of_others(start, part):
    found = files.foreign(start)
    assert (found is None) == (part is None)
    assert part is None or part in found


def test_a_file_of_more_bytes_than_wanted_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match="it has more than 67,108,864 bytes"):
            files.read(tmp_path / "sparse", most=files.MAX_IMAGE_BYTES)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    (tmp_path / "small").write_bytes(b"1234")
    assert files.read(tmp_path / "small", most=4) == b"1234"
