"""`cuhk-03.mat` and the protocol's files where a user may have them, and where they are damaged or meant to harm."""

import io
import shutil
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import scipy.io

from data_prep.builders import cuhk03
from data_prep.sources.mat import MatImages, read_protocol
from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.core.errors import DataError
from tests.data_prep import raw_copies

h5py = pytest.importorskip("h5py")
SCENE = Scene(train_ids=3, test_ids=3, cameras=2, images=2, image_size=(32, 16))
PROTOCOL = "cuhk03_new_protocol_config_detected.mat"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "raw"
    return folder, raw_copies.write("cuhk03_detected", folder, SCENE)


@pytest.fixture
def raw(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "raw")
    return tmp_path / "raw"


def read(source, kind="detected"):
    _, listing = cuhk03.read_source(source, kind)
    return {split: [(i.filename, i.pid, i.camid) for i in items] for split, items in listing.splits.items()}


def test_wherever_the_files_are(made, raw, tmp_path):
    expected = {split: [tuple(label) for label in labels] for split, labels in made[1].items()}
    mat = raw / "cuhk-03.mat"

    def as_expected(source):
        return {split: sorted(items) for split, items in read(source).items()} == expected

    assert as_expected(raw)
    assert as_expected(mat)
    (raw / "cuhk03_release").mkdir()
    shutil.move(mat, raw / "cuhk03_release" / "cuhk-03.mat")
    assert as_expected(raw)
    assert as_expected(raw / "cuhk03_release")
    assert as_expected(raw / "cuhk03_release" / "cuhk-03.mat")
    # The download itself, with the protocol's file beside it.
    with zipfile.ZipFile(raw / "cuhk03_release.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(raw / "cuhk03_release" / "cuhk-03.mat", "cuhk03_release/cuhk-03.mat")
    assert as_expected(raw / "cuhk03_release.zip")
    (raw / PROTOCOL).unlink()
    with pytest.raises(DataError, match=f"lacks {PROTOCOL}: put this file"):
        read(raw)


def test_kinds_differ(made):
    detected, labeled = (read(made[0], kind) for kind in ("detected", "labeled"))
    assert len(detected["train"]) == len(labeled["train"]) + 1
    assert {name.split("/")[0] for name, _, _ in labeled["query"]} == {"labeled"}


def test_files_that_do_not_belong_together(raw):
    content = scipy.io.loadmat(raw / PROTOCOL)
    content["filelist"][0, 0] = np.array(["5_900_1_01.png"])
    scipy.io.savemat(raw / PROTOCOL, {k: v for k, v in content.items() if k[0] != "_"})
    with pytest.raises(DataError, match=r"lacks 1 of the images .* \(detected/5_900_1_01.png\)"):
        read(raw)


def image_file(tmp_path, **dataset):
    """`cuhk-03.mat` with one person, whose first image is as said."""
    path = tmp_path / "cuhk-03.mat"
    with h5py.File(path, "w") as file:
        image = file.create_dataset("image", **dataset)
        people = np.full((10, 1), file.create_dataset("empty", data=np.zeros(2, np.uint64)).ref)
        people[0, 0] = image.ref
        cell = file.create_dataset("people", data=people, dtype=h5py.ref_dtype)
        file.create_dataset("detected", data=np.array([[cell.ref]]), dtype=h5py.ref_dtype)
    return path


def first_image(path):
    with path.open("rb") as file:
        return MatImages(file, "detected", str(path)).read("detected/1_001_1_01.png")


def test_huge_images_are_refused_before_they_are_read(tmp_path):
    sizes = {"compression": "gzip", "dtype": np.uint8}
    for shape, more in (
        ((3, 2**20, 2**20), {"chunks": (1, 64, 64)}),
        ((3, 9000, 2), {}),
        ((3, 8192, 8192), {"chunks": (1, 64, 64)}),
        ((3, 8, 8), {"chunks": (3, 2**14, 2**14), "maxshape": (None, None, None)}),
    ):
        path = image_file(tmp_path, shape=shape, **sizes, **more)
        assert path.stat().st_size < 100_000
        with pytest.raises(DataError, match="it claims"):
            first_image(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 8, 8), np.uint8), r"uint8\[4, 8, 8\] instead of uint8\[3, width, height\]"),
        (np.zeros((3, 8, 8), np.float32), r"float32\[3, 8, 8\]"),
        (np.zeros((3, 0, 8), np.uint8), r"uint8\[3, 0, 8\]"),
    ],
)
def test_what_is_no_image(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        first_image(image_file(tmp_path, data=data))


def test_values_in_other_files_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(range(192)))
    path = image_file(tmp_path, shape=(3, 8, 8), dtype=np.uint8, external=[(str(tmp_path / "secret"), 0, 192)])
    with pytest.raises(DataError, match="its values are in another file"):
        first_image(path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["detected"] = np.zeros(3)
    with h5py.File(path, "w") as file:
        file["detected"] = h5py.ExternalLink("other.h5", "detected")
    with pytest.raises(DataError, match="has no cell 'detected'"):
        first_image(path)


def test_damaged_files_are_one_line(raw, made):
    whole = (made[0] / "cuhk-03.mat").read_bytes()
    for damaged in (b"", b"MATLAB 5.0 MAT-file", whole[:3000], whole[: len(whole) // 2], b"\0" * 5000):
        (raw / "cuhk-03.mat").write_bytes(damaged)
        with pytest.raises(DataError, match=r"is no whole cuhk-03\.mat .*: download the file again") as error:
            read(raw)
        assert "\n" not in str(error.value)
    with h5py.File(raw / "cuhk-03.mat", "w") as file:
        file["detected"] = np.zeros((1, 5))
    with pytest.raises(DataError, match="detected is no cell array"):
        read(raw)


def saved(**changes):
    content = {
        "filelist": np.array([["1_001_1_01.png"], ["1_001_2_06.png"]], object),
        "labels": np.array([[1], [1]], np.uint16),
        "camId": np.array([[1], [2]], np.uint8),
        "train_idx": np.array([[1]], np.uint16),
        "query_idx": np.array([[2]], np.uint16),
        "gallery_idx": np.array([[2]], np.uint16),
    }
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {k: v for k, v in (content | changes).items() if v is not None})
    return buffer.getvalue()


def test_protocol_is_read():
    protocol = read_protocol(saved())
    assert protocol.names == ["1_001_1_01.png", "1_001_2_06.png"]
    assert {split: rows.tolist() for split, rows in protocol.splits.items()} == {
        "train": [0],
        "query": [1],
        "gallery": [1],
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no whole MATLAB 5 file"),
        (b"nothing" * 100, "no whole MATLAB 5 file"),
        (saved()[:-40], "no whole MATLAB 5 file"),
        (saved(labels=None), "it has no labels"),
        (saved(labels=np.array([[1]])), "2 names, 1 labels"),
        (saved(labels=np.array([[-3], [1]])), "out of range"),
        (saved(query_idx=np.array([[3]])), "query_idx points outside of the 2 names"),
        (saved(query_idx=np.array([[0]])), "query_idx points outside"),
    ],
)
def test_bad_protocols_are_one_line(data, message):
    with pytest.raises(DataError, match=message) as error:
        read_protocol(data)
    assert "\n" not in str(error.value)


def test_a_protocol_that_would_unpack_to_gigabytes_is_refused():
    packed = zlib.compress(bytes(2**27), 9)
    assert len(packed) < 200_000
    bomb = saved()[:128] + struct.pack("<II", 15, len(packed)) + packed
    with pytest.raises(DataError, match="unpacks to more than"):
        read_protocol(bomb)
    # In parts, each of which is small enough.
    part = zlib.compress(saved()[128:].ljust(2**22, b"\0"), 9)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_protocol(saved()[:128] + 3 * (struct.pack("<II", 15, len(part)) + part))


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")


@pytest.mark.parametrize("kind", [1, 4, 9, 2, 5])
def test_what_an_array_claims_is_not_believed(kind):
    """184 bytes of a cell that claims two thousand million entries; text, numbers, structures and sparse arrays too."""
    claims = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", 1, 2_000_000_000))
    data = saved()[:128] + element(14, claims + element(1, b"filelist"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="it has no labels"):
            read_protocol(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_cells_in_cells_are_refused():
    head = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, b"filelist")
    with pytest.raises(DataError, match="it holds cells in cells"):
        read_protocol(saved()[:128] + element(14, head + element(14, head)))
