import os
import zipfile

import pytest

from data_prep import raw, raw_tree
from dmosnet_jax.core.errors import DataError

FILES = {"list.txt": b"l", "train/0000/a.jpg": b"a" * 5000, "train/0001/b.jpg": b"b", "other/c.jpg": b"c"}


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
@pytest.mark.parametrize("root", ["", "MSMT17_V1/", "download/MSMT17/"])
def test_root_is_found_and_every_file_below_it(tmp_path, make, root):
    files = {root + name: content for name, content in FILES.items()}
    files |= {root + "train/0000/._a.jpg": b"x", root + "train/Thumbs.db": b"x", "__MACOSX/list.txt": b"x"}
    tree = raw_tree.open_tree(make(tmp_path / "source", files), ("list.txt", "nothing"))
    assert tree.names == sorted(FILES)
    assert {name: tree.read(name) for name in tree.names} == FILES
    with tree.open("train/0000/a.jpg") as file:
        file.seek(4990)
        assert file.read() == b"a" * 10


@pytest.mark.parametrize("make", [as_folder, as_zip])
def test_without_root_or_with_several_it_says_so(tmp_path, make):
    with pytest.raises(DataError, match=r"has no lost\.txt or gone; it holds list\.txt, other, train: give the root"):
        raw_tree.open_tree(make(tmp_path / "a", FILES), ("lost.txt", "gone"))
    files = {f"{root}/{name}": content for root in ("one", "two") for name, content in FILES.items()}
    with pytest.raises(DataError, match=r"several data sets \(one/, two/\)"):
        raw_tree.open_tree(make(tmp_path / "b", files), ("list.txt",))


def test_links_that_lead_out_are_refused(tmp_path):
    folder = as_folder(tmp_path / "set", FILES)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    os.symlink(folder / "list.txt", folder / "same.txt")
    assert raw_tree.open_tree(folder).read("same.txt") == b"l"
    os.symlink(folder / "train", folder / "again")
    with pytest.raises(DataError, match="again is a link to a folder"):
        raw_tree.open_tree(folder)
    (folder / "again").unlink()
    os.symlink("../../../secret.jpg", folder / "train" / "0000" / "z.jpg")
    with pytest.raises(DataError, match=r"refused: train/0000/z\.jpg is a link that leads out of it"):
        raw_tree.open_tree(folder)
    # The source itself may be one.
    (folder / "train" / "0000" / "z.jpg").unlink()
    os.symlink(folder, tmp_path / "link")
    assert raw_tree.open_tree(tmp_path / "link").read("list.txt") == b"l"


@pytest.mark.parametrize("name", ["../evil.jpg", "train/../../evil.jpg", "/evil.jpg", "C:/evil.jpg", "..\\evil.jpg"])
def test_zip_entries_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out of the archive"):
        raw_tree.open_tree(as_zip(tmp_path, FILES | {name: b"x"}))


def test_zip_bombs_are_refused(tmp_path, monkeypatch):
    bomb = as_zip(tmp_path / "one", FILES | {f"train/{i}.jpg": bytes(2**24) for i in range(6)})
    for opened in (raw_tree.open_tree, lambda path: raw.open_raw(path, ("train",))):
        with pytest.raises(DataError, match=r"refused: its .* bytes claim to hold 100,6.*, which images never do"):
            opened(bomb)
    # One file alone, below that sum.
    monkeypatch.setattr(raw, "MAX_BYTES", 4_999)
    for source in (as_zip(tmp_path / "two", FILES), as_folder(tmp_path / "three", FILES)):
        with pytest.raises(DataError, match="more than 4999 bytes"):
            raw_tree.open_tree(source).read("train/0000/a.jpg")
    monkeypatch.setattr(raw_tree, "_MAX_PART", 4_999)
    with pytest.raises(DataError, match="more than 4999 bytes"):
        raw_tree.open_tree(tmp_path / "two" / "set.zip").open("train/0000/a.jpg")


def test_damage_is_found_when_read(tmp_path):
    path = as_zip(tmp_path, FILES, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.find(b"a" * 5000) + 99] ^= 1
    path.write_bytes(content)
    tree = raw_tree.open_tree(path)
    for read in (tree.read, tree.open):
        with pytest.raises(DataError, match="CRC"):
            read("train/0000/a.jpg")
    folder = as_folder(tmp_path / "f", FILES)
    tree = raw_tree.open_tree(folder)
    (folder / "list.txt").unlink()
    for read in (tree.read, tree.open):
        with pytest.raises(DataError, match="No such file"):
            read("list.txt")
