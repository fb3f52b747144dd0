import stat
import zipfile

import pytest

from data_prep import raw
from dmosnet_jax.core.errors import DataError

FOLDERS = ("train", "query")
FILES = {
    "train/b.jpg": b"bb",
    "train/a.jpg": b"a" * 5000,
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
    path.mkdir(exist_ok=True)
    with zipfile.ZipFile(path / "set.zip", "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path / "set.zip"


@pytest.mark.parametrize("make", [as_folder, as_zip])
@pytest.mark.parametrize("root", ["", "Market-1501-v15.09.15/", "download/Market/"])
def test_root_is_found_and_rubbish_ignored(tmp_path, make, root):
    files = {root + name: content for name, content in (FILES | RUBBISH).items()}
    files |= {root + "readme.txt": b"x", root + "gt_bbox/train_c1.jpg": b"x", root + "train/deeper/d.jpg": b"x"}
    source = raw.open_raw(make(tmp_path / "source", files), FOLDERS)
    assert source.names == sorted(FILES)
    assert {name: source.read(name) for name in source.names} == FILES
    assert str(tmp_path / "source") in source.location


def test_windows_separators_and_stored_entries(tmp_path):
    path = as_zip(
        tmp_path, {"root\\" + name.replace("/", "\\"): data for name, data in FILES.items()}, zipfile.ZIP_STORED
    )
    source = raw.open_raw(path, FOLDERS)
    assert {name: source.read(name) for name in source.names} == FILES


def test_entries_that_begin_at_the_dot(tmp_path):
    path = as_zip(tmp_path, {f"./{name}": data for name, data in (FILES | RUBBISH).items()})
    source = raw.open_raw(path, FOLDERS)
    assert {name: source.read(name) for name in source.names} == FILES
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("./../train/z.jpg", b"z")
    with pytest.raises(DataError, match="leads out of the archive"):
        raw.open_raw(path, FOLDERS)


@pytest.mark.parametrize("make", [as_folder, as_zip])
def test_missing_folders_are_named(tmp_path, make):
    path = make(tmp_path / "a", {"train/a.jpg": b"a", "other/b.jpg": b"b"})
    with pytest.raises(DataError, match="lacks the folder query"):
        raw.open_raw(path, FOLDERS)
    path = make(tmp_path / "b", {"images/a.jpg": b"a", "b.txt": b"b"})
    with pytest.raises(DataError, match=r"has no folder train, query; it holds b.txt, images: give the root"):
        raw.open_raw(path, FOLDERS)


@pytest.mark.parametrize("make", [as_folder, as_zip])
def test_several_roots_are_named(tmp_path, make):
    files = {f"{root}/{name}": content for root in ("one", "two") for name, content in FILES.items()}
    with pytest.raises(DataError, match=r"several data sets \(one/, two/\)"):
        raw.open_raw(make(tmp_path / "a", files), FOLDERS)


def test_source_that_is_neither(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        raw.open_raw(tmp_path / "nowhere", FOLDERS)
    (tmp_path / "a.mat").write_bytes(b"MATLAB" * 100)
    with pytest.raises(DataError, match=r"a\.mat cannot be opened \(it is not a zip file\)"):
        raw.open_raw(tmp_path / "a.mat", FOLDERS)
    whole = as_zip(tmp_path, FILES).read_bytes()
    for size in (0, 10, len(whole) - 30):
        (tmp_path / "cut.zip").write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be opened"):
            raw.open_raw(tmp_path / "cut.zip", FOLDERS)


@pytest.mark.parametrize(
    "name", ["../train/evil.jpg", "train/../../evil.jpg", "/train/evil.jpg", "C:/train/evil.jpg", "..\\evil.jpg"]
)
def test_entries_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out of the archive"):
        raw.open_raw(as_zip(tmp_path, FILES | {name: b"x"}), FOLDERS)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = as_zip(tmp_path, FILES)
    info = zipfile.ZipInfo("train/z.jpg")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"entry 'train/z.jpg' is a link or a device"):
        raw.open_raw(path, FOLDERS)


def test_encrypted_and_double_entries_are_refused(tmp_path):
    content = bytearray(as_zip(tmp_path, FILES).read_bytes())
    central = content.find(b"PK\x01\x02")
    content[central + 8] |= 1  # the flag of the first entry
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        raw.open_raw(tmp_path / "locked.zip", FOLDERS)
    path = as_zip(tmp_path, FILES | {"train\\a.jpg": b"other"})
    with pytest.raises(DataError, match=r"holds 'train/a.jpg' twice"):
        raw.open_raw(path, FOLDERS)


def test_damaged_or_huge_files_fail_when_read(tmp_path, monkeypatch):
    path = as_zip(tmp_path, FILES, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.find(b"a" * 5000) + 99] ^= 1
    path.write_bytes(content)
    source = raw.open_raw(path, FOLDERS)
    assert source.read("train/b.jpg") == b"bb"
    with pytest.raises(DataError, match="CRC"):
        source.read("train/a.jpg")
    monkeypatch.setattr(raw, "MAX_BYTES", 4999)
    for made in (as_zip(tmp_path / "z", FILES), as_folder(tmp_path / "f", FILES)):
        with pytest.raises(DataError, match="more than 4999 bytes"):
            raw.open_raw(made, FOLDERS).read("train/a.jpg")


def test_a_file_that_vanishes_is_reported(tmp_path):
    source = raw.open_raw(as_folder(tmp_path / "f", FILES), FOLDERS)
    (tmp_path / "f" / "query" / "c.jpg").unlink()
    with pytest.raises(DataError, match="No such file"):
        source.read("query/c.jpg")


def test_links_of_a_folder_must_stay_inside(tmp_path):
    folder = as_folder(tmp_path / "set", FILES)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "train" / "again.jpg").symlink_to(folder / "train" / "a.jpg")
    assert raw.open_raw(folder, FOLDERS).read("train/again.jpg") == b"a" * 5000
    (folder / "train" / "z.jpg").symlink_to("../../secret.jpg")
    with pytest.raises(DataError, match=r"refused: train/z\.jpg is a link that leads out of it: put the files"):
        raw.open_raw(folder, FOLDERS)
    (folder / "train" / "z.jpg").unlink()
    (tmp_path / "elsewhere").mkdir()
    (folder / "query").rename(tmp_path / "elsewhere" / "query")
    (folder / "query").symlink_to(tmp_path / "elsewhere" / "query")
    with pytest.raises(DataError, match="refused: query is a link that leads out of it"):
        raw.open_raw(folder, FOLDERS)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (folder / "query").unlink()
    (tmp_path / "elsewhere" / "query").rename(folder / "query")
    assert len(raw.open_raw(tmp_path / "link", FOLDERS).names) == len(FILES) + 1
