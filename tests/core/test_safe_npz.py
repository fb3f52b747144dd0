"""NumPy's files from anywhere: what numpy wrote comes back, and nothing else costs memory or runs."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from dmosnet_jax.core import files, safe_npz
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.safe_npz import read_arrays


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def header(text, body=b""):
    """An `.npy` file with this description."""
    padded = text + " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + body


def zipped(content, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("names.npy", content)
    return out.getvalue()


def lying(archive, size):
    """A zip whose only entry declares `size` bytes, in both of its headers."""
    data = bytearray(archive)
    struct.pack_into("<I", data, data.index(b"PK\x03\x04") + 22, size)
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, size)
    return bytes(data)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_comes_back(tmp_path, rng, save):
    arrays = {
        "floats": rng.normal(size=(3, 0, 5)).astype(np.float32),
        "columns": np.asfortranarray(rng.normal(size=(4, 7))),
        "text": np.array(["a.jpg", "ü/b.jpg"]),
        "scalar": np.array(7, np.int64),
        "bytes": np.array([b"abc", b"d"]),
        "big": np.arange(5, dtype=">i4"),
        "rows": np.zeros(3, [("a", "i4"), ("b", "f8")]),
    }
    save(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    np.save(tmp_path / "b.npy", arrays["text"])
    np.testing.assert_array_equal(read_arrays(tmp_path / "b.npy")["names"], arrays["text"])


def test_a_file_behind_a_url(tmp_path):
    pytest.importorskip("fsspec")
    files.write("memory://npz/a.npz", zipped(npy(np.arange(3))))
    assert read_arrays("memory://npz/a.npz")["names"].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"memory://npz/b\.npz: .*No such file"):
        read_arrays("memory://npz/b.npz")


BOMB = npy(np.zeros(30_000_000, np.uint8))
BOMBS = {
    "deflate": zipped(BOMB, zipfile.ZIP_DEFLATED),
    # These two declare a kilobyte; zipfile unpacks all of the second before it looks.
    "deflate that lies": lying(zipped(BOMB, zipfile.ZIP_DEFLATED), 1000),
    "bzip2 that lies": lying(zipped(BOMB, zipfile.ZIP_BZIP2), 1000),
    "bzip2": zipped(BOMB, zipfile.ZIP_BZIP2),
    "lzma": zipped(BOMB, zipfile.ZIP_LZMA),
    "declared shape": zipped(header("{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000,)}", bytes(80))),
    "declared text": header("{'descr': '<U1000000000', 'fortran_order': False, 'shape': (1,)}", bytes(80)),
    "negative shape": header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -10)}", bytes(80)),
    "nothing of a lot": header("{'descr': '|V0', 'fortran_order': False, 'shape': (2000000000000,)}"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_within_bounded_memory(tmp_path, kind):
    path = tmp_path / "bomb.npz"
    path.write_bytes(BOMBS[kind])
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"bomb\.npz: .*: convert again") as error:
            read_arrays(path, max_bytes=2_000_000, fix="convert again")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value).isprintable()
    assert peak < 12_000_000


def test_entries_count_together(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{str(number): np.zeros(1000, np.uint8) for number in range(10)})
    assert len(read_arrays(path, max_bytes=12_000)) == 10
    with pytest.raises(DataError, match="unpacks to more than 9,000 bytes"):
        read_arrays(path, max_bytes=9_000)


def test_any_damage_is_one_line(tmp_path, rng):
    path = tmp_path / "a.npz"
    out = io.BytesIO()
    np.savez_compressed(out, names=np.array(["a", "b"]), scores=np.arange(20.0))
    bases = [out.getvalue(), npy(np.array(["a", "b"])), zipped(npy(np.arange(9)))]
    outcomes = {True: 0, False: 0}
    for number in range(1500):
        data = bytearray(bases[number % 3])
        for at in rng.integers(len(data), size=int(rng.integers(1, 4))):
            data[at] = int(rng.integers(256))
        path.write_bytes(bytes(data[: int(rng.integers(1, len(data)))] if number % 5 == 0 else data))
        try:
            read_arrays(path)
            outcomes[True] += 1
        except DataError as error:
            outcomes[False] += str(error).startswith(str(path)) and str(error).isprintable()
    assert sum(outcomes.values()) == 1500
    assert min(outcomes.values()) > 50


def test_a_bomb_is_refused_by_what_it_claims_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    path.write_bytes(BOMBS["deflate"])
    monkeypatch.setattr(safe_npz, "SLACK", 1_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_arrays(path)


def test_entries_that_overlap_do_not_add_to_the_size_of_the_file(tmp_path, monkeypatch):
    """A directory may list one entry many times: what counts is the file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.npy", npy(np.zeros(100_000, np.uint8)))
        first = archive.infolist()[0]
        for number in range(1, 100):
            twin = zipfile.ZipInfo(f"{number}.npy")
            for name in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(twin, name, getattr(first, name))
            archive.filelist.append(twin)
    path = tmp_path / "a.npz"
    path.write_bytes(out.getvalue())
    monkeypatch.setattr(safe_npz, "SLACK", 1_000_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_arrays(path)
