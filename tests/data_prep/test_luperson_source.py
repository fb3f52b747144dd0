"""LUPerson's sources: databases, trees and lists that are damaged, hostile or of another kind."""

import os
import pickle

import numpy as np
import pytest

from data_prep.sources import lmdb, luperson
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import transforms
from tests.data_prep.luperson_case import run


class Attack:
    """A pickle that touches a file when it is loaded by Python."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["alone", "in the list", "in the dict", "beside the keys"])
def test_hostile_keys_are_refused_unread(raw, tmp_path, place):
    database, labels = raw("lmdb")
    source = tmp_path / "raw"
    source.mkdir()
    (source / "data.mdb").write_bytes((database / "lmdb" / "data.mdb").read_bytes())
    names, attack = [x.filename for x in labels], Attack(tmp_path / "touched")
    content = {
        "alone": attack,
        "in the list": [*names, attack],
        "in the dict": {"keys": attack},
        "beside the keys": {"keys": names, "pids": attack},
    }[place]
    for protocol in (0, 2, 4):
        (source / "keys.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(DataError, match=r"keys.pkl: refused, nothing was run: .*system") as error:
            run(source, tmp_path / "data")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "data").exists()


def test_labels_beside_the_keys_may_be_arrays(tmp_path):
    path = tmp_path / "keys.pkl"
    keys = ["00_00_0000_00000000", "00_00_0000_00000001"]
    for protocol in range(6):
        content = {"keys": keys, "vids": np.arange(2), "pids": [np.int64(1), np.int32(2)]}
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert lmdb.read_keys(path) == keys
        path.write_bytes(pickle.dumps([key.encode() for key in keys], protocol=protocol))
        assert lmdb.read_keys(path) == keys
    for content in ([], {}, {"names": keys}, [1], [np.str_("a")], np.arange(3), "text"):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=r"keys.pkl: "):
            lmdb.read_keys(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.write_bytes(b"x"), "is neither a folder nor an LMDB"),
        (lambda f: (f / "country" / "city" / "video").mkdir(parents=True), "holds no image"),
        (lambda f: put(f, "country/a.jpg"), "holds the image country/a.jpg: LUPerson's are laid out as"),
        (lambda f: put(f, "a.jpg"), "holds the image a.jpg"),
        (lambda f: put(f, "c/city/a.jpg", "c/city/v/b.jpg"), "c/city holds both images and folders of videos"),
        (lambda f: put(f, "00_00_0000_00000000.jpg", "a.jpg"), "a.jpg is not numbered as CC_CC_VVVV_MMMMMMMM"),
        (lambda f: put(f, "data.mdb"), "cannot be opened"),
    ],
)
def test_other_sources_are_told_in_one_line(tmp_path, make, message):
    source = tmp_path / "raw"
    make(source)
    with pytest.raises(DataError, match=message) as error:
        run(source, tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("where", ["c0/city/v0/z.jpg", "c0/city/v8", "c9", "0.jpg"])
def test_links_that_lead_out_are_refused(pictures, tmp_path, where):
    source, other = pictures(tmp_path / "raw", 4), pictures(tmp_path / "other", 4)
    (source / "c0" / "city" / "v0" / "again.jpg").symlink_to("000000.jpg")
    assert len(list(luperson.find(source).images())) == 5
    (source / where).symlink_to(other / "c0" / "city" / "v0" / "000000.jpg" if "." in where else other / "c0")
    with pytest.raises(DataError, match=f"is refused: {where} is a link that leads out of it"):
        list(luperson.find(source).images())


def test_a_link_to_nothing_is_an_unreadable_image(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 2)
    (source / "c0" / "city" / "v0" / "gone.jpg").symlink_to("never.jpg")
    assert [image.size > 0 for image in luperson.find(source).images()] == [True, False, True]
    with pytest.raises(DataError, match="1 of the first 2 images are unreadable"):
        run(source, tmp_path / "data")


def test_dictionary_of_bytes(tmp_path):
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps({b"keys": [b"00_00_0000_00000000"]}, protocol=2))
    assert lmdb.read_keys(tmp_path / "keys.pkl") == ["00_00_0000_00000000"]


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_damaged_databases_and_repeated_keys_are_told(raw, tmp_path):
    database, labels = raw("lmdb")
    content = (database / "lmdb" / "data.mdb").read_bytes()
    source = tmp_path / "raw"
    source.mkdir()
    (source / "data.mdb").write_bytes(content[: len(content) // 2 // 4096 * 4096])
    with pytest.raises(DataError, match=r"data.mdb is cut short: it has [\d,]+ of [\d,]+ bytes"):
        run(source, tmp_path / "data")
    (source / "data.mdb").write_bytes(content)
    for keys, message in (
        ([labels[0].filename] * 2, "lists 00_00_0000_00000000 twice"),
        (["a" * 600], "its key a+ is not numbered"),
        (["\N{GREEK SMALL LETTER ALPHA}"], "is not numbered"),
    ):
        (source / "keys.pkl").write_bytes(pickle.dumps(keys))
        with pytest.raises(DataError, match=message):
            run(source, tmp_path / "data")


def test_a_damaged_page_costs_its_images_and_no_more(raw, tmp_path):
    database, labels = raw("lmdb")
    content = (database / "lmdb" / "data.mdb").read_bytes()
    source = tmp_path / "raw"
    source.mkdir()
    lost = 0
    for page in range(2, len(content) // 4096):
        (source / "data.mdb").write_bytes(content[: 4096 * page] + bytes(4096) + content[4096 * (page + 1) :])
        for keys in (None, [label.filename for label in labels]):
            (source / "keys.pkl").unlink(missing_ok=True)
            if keys:
                (source / "keys.pkl").write_bytes(pickle.dumps(keys))
            try:
                images = list(luperson.find(source).images())
                read = luperson.reader("lmdb", str(source / "data.mdb"))
            except DataError:
                continue
            for image in images:
                try:
                    transforms.decode(read(image.ref))
                except DataError:
                    lost += 1
    assert lost


def test_a_pipe_is_an_unreadable_image(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 2)
    os.mkfifo(source / "c0" / "city" / "v0" / "pipe.jpg")
    with pytest.raises(DataError, match=r"1 of the first \d images are unreadable"):
        run(source, tmp_path / "data")
    assert "it is no regular file" in (tmp_path / "data" / ".luperson.incomplete" / "unreadable.txt").read_text()


def test_a_database_of_several_levels_is_read_as_by_its_own_library(tmp_path, rng):
    library = pytest.importorskip("lmdb")
    path = tmp_path / "data.mdb"
    values = {f"{i % 7:02d}_00_{i % 50:04d}_{i:08d}": rng.bytes(int(rng.integers(1, 9000))) for i in range(3000)}
    values["00_00_0000_99999999"] = b""
    with library.open(str(path), subdir=False, map_size=2**28) as env:
        for part in (list(values)[::2], list(values)[1::2]):
            with env.begin(write=True) as transaction:
                for key in part:
                    transaction.put(key.encode(), values[key])
        assert env.stat()["depth"] > 1
    database = lmdb.Database(str(path))
    assert database.entries == len(values)
    assert database.all_keys() == sorted(values)
    for key, value in values.items():
        assert database.size(key) == len(value)
        assert database.read(key) == value
    for missing in ("", "00", "99_99_9999_99999999", "00_00_0000_0000000"):
        with pytest.raises(DataError, match="it is not in the LMDB"):
            database.read(missing)


def test_an_empty_database_has_no_keys(tmp_path):
    library = pytest.importorskip("lmdb")
    library.open(str(tmp_path / "data.mdb"), subdir=False).close()
    database = lmdb.Database(str(tmp_path / "data.mdb"))
    assert database.all_keys() == []
    with pytest.raises(DataError, match="it is not in the LMDB"):
        database.read("a")


def test_what_is_left_out_of_a_source_is_counted_and_named(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 2)
    (source / "c0" / "city" / "v0" / "a.png").write_bytes(b"x")
    (source / "c0" / "city" / "v0" / "b.png").write_bytes(b"x")
    (source / "list.txt").write_bytes(b"x")
    _, warnings = run(source, tmp_path / "data")
    [found] = [text for text in warnings if "left out" in text]
    assert found == "3 files are left out (2 .png, 1 .txt), e.g. list.txt"
