import os
import sys
import uuid

import pytest

from dmosnet_jax.core import places
from dmosnet_jax.core.errors import ConfigError


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
        places.write(places.join(folder, *name.split("/")), content)
    entries = [(e.name, e.is_folder, e.size) for e in places.entries(folder)]
    assert entries == [("a", False, 0), ("b", False, 10_000), ("below", True, 0)]
    path = places.join(folder, "b")
    assert places.read(path) == data
    assert places.size(path) == 10_000
    assert places.is_file(path)
    assert not places.is_file(folder)
    with places.open_stream(path) as file:
        assert file.read(7) + file.read() == data
    places.write(path, b"new")
    assert places.read(path) == b"new"
    places.remove(path)
    places.remove(path)
    assert not places.is_file(path)
    places.remove(folder)
    assert not places.is_file(places.join(folder, "below", "c"))
    with pytest.raises(FileNotFoundError) as error:
        places.read(path)
    assert error.value.strerror == "No such file or directory"


def test_ranges_end_where_the_file_does():
    pytest.importorskip("fsspec")
    url = f"memory://{uuid.uuid4().hex}/file"
    places.write(url, bytes(range(100)))
    assert places.read_range(url, 10, 5) == bytes(range(10, 15))
    assert places.read_range(url, 95, 50) == bytes(range(95, 100))
    assert places.read_range(url, 95, 0) == b""


def test_a_failed_local_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails():
        with places.create(path) as file:
            file.write(b"half")
            assert path.read_bytes() == b"old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_copies_go_up_and_across(tmp_path):
    pytest.importorskip("fsspec")
    (tmp_path / "here").write_bytes(b"content")
    root = f"memory://{uuid.uuid4().hex}"
    places.copy(tmp_path / "here", f"{root}/new/there")
    places.copy(f"{root}/new/there", f"{root}/other")
    assert places.read(f"{root}/new/there") == places.read(f"{root}/other") == b"content"


def test_paths_and_urls(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert places.tidy("~/data") == "/home/somebody/data"
    assert places.tidy("gs://bucket/data/") == "gs://bucket/data"
    assert places.join("gs://bucket/", "a", "b") == "gs://bucket/a/b"
    assert places.join("data", "a") == os.path.join("data", "a")
    assert [places.is_remote(p) for p in ("gs://b", "s3://b/c", "file:///data", "/data", "data")] == [True] * 2 + [
        False
    ] * 3


def test_what_is_not_installed_or_unknown_is_one_line(monkeypatch):
    pytest.importorskip("fsspec")
    with pytest.raises(ConfigError, match="nowhere://x: nowhere:// is not a kind of storage"):
        places.read("nowhere://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"gs://b/c is remote, .*pip install 'dmosnet_jax\[remote\]'") as error:
        places.read("gs://b/c")
    assert "\n" not in str(error.value)


def test_a_missing_storage_package_names_the_extra(monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"Please install gcsfs.*dmosnet_jax\[remote\]"):
        places.read("gs://b/c")
