"""Folders and zips: the root that is found, the files below it, and what is refused or bounded."""

import bz2
import os
import stat
import struct
import tracemalloc
import zipfile
import zlib

import pytest

from data_prep.sources import base
from data_prep.sources.folder import open_listed, read_file
from data_prep.sources.root import open_tree
from dmosnet_jax.core.errors import DataError

MARKS = ("train", "query")
FILES = {
    "list.txt": b"l",
    "train/b.jpg": b"bb",
    "train/0000/a.jpg": b"a" * 5000,
    "query/c.jpg": b"c",
}
RUBBISH = {
    "__MACOSX/train/._a.jpg": b"x",
    "train/._a.jpg": b"x",
    "train/Thumbs.db": b"x",
    "query/.DS_Store": b"x",
}


def as_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def as_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    path.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path / "set.zip", "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path / "set.zip"


@pytest.mark.parametrize("make", [as_folder, as_zip])
@pytest.mark.parametrize("root", ["", "Market-1501-v15.09.15/", "download/Market/"])
def test_root_is_found_and_rubbish_ignored(tmp_path, make, root):
    files = {root + name: content for name, content in (FILES | RUBBISH).items()}
    source = open_tree(make(tmp_path / "source", files), MARKS)
    assert source.names == sorted(FILES)
    assert {name: source.read(name) for name in source.names} == FILES
    assert str(tmp_path / "source") in source.location
    with source.open("train/0000/a.jpg") as file:
        file.seek(4990)
        assert file.read() == b"a" * 10
    # A file may be the mark as well.
    assert (
        open_tree(tmp_path / "source" / ("set.zip" if make is as_zip else ""), ("list.txt", "no")).names == source.names
    )


def test_windows_separators_and_stored_entries(tmp_path):
    path = as_zip(
        tmp_path, {"root\\" + name.replace("/", "\\"): data for name, data in FILES.items()}, zipfile.ZIP_STORED
    )
    source = open_tree(path, MARKS)
    assert {name: source.read(name) for name in source.names} == FILES


def test_entries_that_begin_at_the_dot(tmp_path):
    path = as_zip(tmp_path, {f"./{name}": data for name, data in (FILES | RUBBISH).items()})
    source = open_tree(path, MARKS)
    assert {name: source.read(name) for name in source.names} == FILES
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("./../train/z.jpg", b"z")
    with pytest.raises(DataError, match="leads out of the archive"):
        open_tree(path, MARKS)


@pytest.mark.parametrize("make", [as_folder, as_zip])
def test_without_root_or_with_several_it_says_so(tmp_path, make):
    path = make(tmp_path / "a", {"images/a.jpg": b"a", "b.txt": b"b"})
    with pytest.raises(DataError, match=r"has no train or query; it holds b.txt, images: give the root"):
        open_tree(path, MARKS)
    files = {f"{root}/{name}": content for root in ("one", "two") for name, content in FILES.items()}
    with pytest.raises(DataError, match=r"several data sets \(one/, two/\)"):
        open_tree(make(tmp_path / "b", files), MARKS)
    # The least deep counts, and nothing below the third level.
    deep = make(tmp_path / "c", {"train/a.jpg": b"a", "x/y/z/query/b.jpg": b"b"})
    assert open_tree(deep, MARKS).names == ["train/a.jpg", "x/y/z/query/b.jpg"]
    with pytest.raises(DataError, match="has no query"):
        open_tree(deep, ("query",))


def test_source_that_is_neither(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_tree(tmp_path / "nowhere", MARKS)
    (tmp_path / "a.mat").write_bytes(b"MATLAB" * 100)
    with pytest.raises(DataError, match=r"a\.mat cannot be opened \(it is not a zip file\)"):
        open_tree(tmp_path / "a.mat", MARKS)
    whole = as_zip(tmp_path, FILES).read_bytes()
    for size in (0, 10, len(whole) - 30):
        (tmp_path / "cut.zip").write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be opened"):
            open_tree(tmp_path / "cut.zip", MARKS)


@pytest.mark.parametrize(
    "name", ["../train/evil.jpg", "train/../../evil.jpg", "/train/evil.jpg", "C:/train/evil.jpg", "..\\evil.jpg"]
)
def test_entries_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out of the archive"):
        open_tree(as_zip(tmp_path, FILES | {name: b"x"}))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = as_zip(tmp_path, FILES)
    info = zipfile.ZipInfo("train/z.jpg")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"entry 'train/z.jpg' is a link or a device"):
        open_tree(path, MARKS)


def test_encrypted_and_double_entries_are_refused(tmp_path):
    content = bytearray(as_zip(tmp_path, FILES).read_bytes())
    central = content.find(b"PK\x01\x02")
    content[central + 8] |= 1  # the flag of the first entry
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        open_tree(tmp_path / "locked.zip", MARKS)
    path = as_zip(tmp_path, FILES | {"train\\b.jpg": b"other"})
    with pytest.raises(DataError, match=r"holds 'train/b.jpg' twice"):
        open_tree(path, MARKS)


def test_zip_bombs_are_refused(tmp_path, monkeypatch):
    bomb = as_zip(tmp_path / "one", FILES | {f"train/{i}.jpg": bytes(2**24) for i in range(6)})
    with pytest.raises(DataError, match=r"refused: its .* bytes claim to hold 100,6.*, which images never do"):
        open_tree(bomb)
    # One file alone, below that sum.
    monkeypatch.setattr(base, "MAX_BYTES", 4_999)
    for source in (as_zip(tmp_path / "two", FILES), as_folder(tmp_path / "three", FILES)):
        with pytest.raises(DataError, match="more than 4999 bytes"):
            open_tree(source).read("train/0000/a.jpg")
    monkeypatch.setattr(base, "MAX_LARGE_BYTES", 4_999)
    with pytest.raises(DataError, match="more than 4999 bytes"):
        open_tree(tmp_path / "two" / "set.zip").open("train/0000/a.jpg")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_without_a_bound_are_refused(tmp_path, compression):
    with pytest.raises(DataError, match=r"entry 'list.txt' is compressed in another way than zip's usual one"):
        open_tree(as_zip(tmp_path, FILES, compression), MARKS)


def lying_zip(path, method, packed, claimed):
    """A zip of one entry `train/a.jpg` whose headers claim fewer bytes than it unpacks to."""
    name, crc = b"train/a.jpg", zlib.crc32(bytes(claimed))
    fields = (20, 0, method, 0, 0, crc, len(packed), claimed, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", *fields) + name + packed
    central = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, *fields, 0, 0, 0, 0, 0) + name
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)
    return path


def test_no_more_is_unpacked_than_is_claimed(tmp_path):
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(bytes(2**27)) + packer.flush()
    tree = open_tree(lying_zip(tmp_path / "deflated.zip", zipfile.ZIP_DEFLATED, packed, 1000), MARKS)
    tracemalloc.start()
    try:
        assert tree.read("train/a.jpg") == bytes(1000)
        with tree.open("train/a.jpg") as file:
            assert file.read() == bytes(1000)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    path = lying_zip(tmp_path / "bzip2.zip", zipfile.ZIP_BZIP2, bz2.compress(bytes(2**20)), 1000)
    with pytest.raises(DataError, match="is compressed in another way"):
        open_tree(path, MARKS)
    path = lying_zip(tmp_path / "short.zip", zipfile.ZIP_STORED, bytes(10), 1000)
    with pytest.raises(DataError):
        open_tree(path, MARKS).read("train/a.jpg")


def test_damage_is_found_when_read(tmp_path):
    path = as_zip(tmp_path, FILES, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.find(b"a" * 5000) + 99] ^= 1
    path.write_bytes(content)
    tree = open_tree(path, MARKS)
    assert tree.read("train/b.jpg") == b"bb"
    for read in (tree.read, tree.open):
        with pytest.raises(DataError, match="CRC"):
            read("train/0000/a.jpg")
    folder = as_folder(tmp_path / "f", FILES)
    tree = open_tree(folder, MARKS)
    (folder / "list.txt").unlink()
    for read in (tree.read, tree.open):
        with pytest.raises(DataError, match="No such file"):
            read("list.txt")


def test_links_of_a_folder_must_stay_inside(tmp_path):
    folder = as_folder(tmp_path / "set", FILES)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "train" / "again.jpg").symlink_to(folder / "train" / "0000" / "a.jpg")
    assert open_tree(folder, MARKS).read("train/again.jpg") == b"a" * 5000
    os.symlink(folder / "train", folder / "again")
    with pytest.raises(DataError, match="again is a link to a folder"):
        open_tree(folder, MARKS)
    (folder / "again").unlink()
    (folder / "train" / "z.jpg").symlink_to("../../secret.jpg")
    with pytest.raises(DataError, match=r"refused: train/z\.jpg is a link that leads out of it: put the files"):
        open_tree(folder, MARKS)
    (folder / "train" / "z.jpg").unlink()
    (tmp_path / "elsewhere").mkdir()
    (folder / "query").rename(tmp_path / "elsewhere" / "query")
    (folder / "query").symlink_to(tmp_path / "elsewhere" / "query")
    with pytest.raises(DataError, match="refused: query is a link that leads out of it"):
        open_tree(folder, MARKS)
    # The source itself may be one.
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (folder / "query").unlink()
    (tmp_path / "elsewhere" / "query").rename(folder / "query")
    assert len(open_tree(tmp_path / "link", MARKS).names) == len(FILES) + 1


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = as_folder(tmp_path / "set", FILES)
    os.mkfifo(folder / "train" / "pipe.jpg")
    assert open_tree(folder, MARKS).names == sorted(FILES)
    with pytest.raises(DataError, match="it is no regular file"):
        read_file(folder / "train" / "pipe.jpg")


def test_names_of_a_table_are_files_inside(tmp_path):
    folder = as_folder(tmp_path / "set", FILES)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    os.symlink(tmp_path / "secret.jpg", folder / "link.jpg")
    wrong = ["../secret.jpg", "/etc/passwd", "link.jpg", "gone.jpg", "train", "", "query/\0"]
    assert open_listed(folder, ["query/c.jpg", *wrong, "query/c.jpg"]).names == ["query/c.jpg"]


def test_long_lists_are_shown_short_and_without_control_characters():
    shown = base.some([f"{number}\n\x1b[2J" for number in range(50)], 3)
    assert shown == "0\\n\\x1b[2J, 1\\n\\x1b[2J, 2\\n\\x1b[2J and 47 more"
