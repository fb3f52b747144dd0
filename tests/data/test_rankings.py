"""Orders of images from files: our score files, and lists of names in every form, hostile ones among them."""

import gzip
import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import rankings
from dmosnet_jax.data.splits import load_split

NAMES = [f"bounding_box_train/{i:04d}_c1s1_{i:06d}_00.jpg" for i in range(7)]


class Payload:
    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self._marker}",)


@pytest.fixture
def data_dir(tmp_path, write_dataset, example):
    def records(count, name="train"):
        return [example(bytes(range(i + 1)), 10 + i // 2, 1 + i % 3, f"{name}/{i}.jpg") for i in range(count)]

    write_dataset(tmp_path, "market1501", "1.0.0", {"train": [records(4), records(7)[4:]], "query": [records(7)]})
    write_dataset(tmp_path, "resharded", "1.0.0", {"train": [records(2), records(3)[2:], records(7)[3:]]})
    write_dataset(tmp_path, "longer", "1.0.0", {"train": [records(8)]})
    return tmp_path


@pytest.fixture
def split(data_dir):
    return load_split(data_dir, "market1501", "train")


def written(path, scores, split):
    with path.open("wb") as file:
        rankings.write_scores(file, scores, split)
    return path


def test_scores_come_back_as_they_were(tmp_path, split, rng):
    scores = rng.normal(size=7).astype(np.float32)
    path = written(tmp_path / "scores.npz", scores, split)
    np.testing.assert_array_equal(rankings.read_scores(path, split), scores, strict=True)
    order = rankings.read_ranking(path, split)
    assert (np.diff(scores[order]) <= 0).all()
    assert sorted(order) == list(range(7))


def test_equal_scores_keep_the_order_of_the_records(tmp_path, split):
    scores = np.float32([0.5, 0.9, 0.5, 0.9, -0.1, 0.5, 0.9])
    path = written(tmp_path / "scores.npz", scores, split)
    assert rankings.read_ranking(path, split).tolist() == [1, 3, 6, 0, 2, 5, 4]


def test_identity_does_not_depend_on_the_shards_but_on_all_else(data_dir, split, write_dataset, example):
    same = load_split(data_dir, "market1501", "train")
    assert rankings.identity(same) == rankings.identity(split)
    # The same records in other shards, under the same name.
    resharded = load_split(data_dir, "resharded", "train")
    object.__setattr__(resharded, "name", "market1501")
    assert rankings.identity(resharded) == rankings.identity(split)
    others = [load_split(data_dir, "market1501", "query"), load_split(data_dir, "longer", "train")]
    swapped = [example(bytes(range(i + 1)), 10 + i // 2, 1 + i % 3, f"train/{i}.jpg") for i in (1, 0, 2, 3, 4, 5, 6)]
    write_dataset(data_dir, "market1501", "1.0.1", {"train": [swapped]})
    others.append(load_split(data_dir, "market1501", "train"))
    assert len({rankings.identity(other) for other in (*others, split)}) == 4


def test_scores_of_other_data_are_refused(tmp_path, data_dir, split):
    path = written(tmp_path / "scores.npz", np.zeros(7, np.float32), split)
    for name, part in (("resharded", "train"), ("longer", "train"), ("market1501", "query")):
        with pytest.raises(DataError, match=rf"scores of the 7 images of market1501 train .* {name} {part}"):
            rankings.read_ranking(path, load_split(data_dir, name, part))


def test_damaged_score_files_are_refused(tmp_path, split):
    path = written(tmp_path / "scores.npz", np.zeros(7, np.float32), split)
    content = path.read_bytes()
    bad = np.zeros(7, np.float32)
    bad[3] = np.nan
    for change in (content[:100], content[: len(content) // 2], b"PK\x03\x04" + bytes(100)):
        path.write_bytes(change)
        with pytest.raises(DataError, match=r"scores\.npz: damaged") as error:
            rankings.read_ranking(path, split)
        assert "\n" not in str(error.value)
    for scores in (bad, np.zeros(6, np.float32), np.zeros(7)):
        np.savez(path, scores=scores, identity=rankings.identity(split))
        with pytest.raises(DataError, match=r"scores\.npz: damaged: its scores are not 7 finite numbers"):
            rankings.read_ranking(path, split)
    np.savez(path, scores=np.zeros(7, np.float32))
    with pytest.raises(DataError, match="is not a score file"):
        rankings.read_scores(path, split)


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99)])
def test_archives_of_other_kinds_are_refused(tmp_path, split, place, value):
    """Encrypted, and compressed in an unknown way."""
    path = tmp_path / "list.npz"
    np.savez(path, names=np.array(["a.jpg"]))
    content = bytearray(path.read_bytes())
    directory = content.find(b"PK\x01\x02")
    content[directory + place] = content[place - 2] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"list\.npz: damaged, or of another kind"):
        rankings.read_ranking(path, split)


def lists(folder):
    """The same names in every form that is read."""
    text = "\n".join(NAMES)
    np.savez(folder / "named.npz", names=np.array(NAMES), other=np.arange(3))
    np.savez(folder / "single.npz", whatever=np.array(NAMES))
    np.savez_compressed(folder / "bytes.npz", names=np.array(NAMES).astype("S"))
    np.save(folder / "names.npy", np.array(NAMES))
    files = {
        "a.txt": text.encode(),
        "b.txt": b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode() + b"\r\n",
        "with scores.tsv": "".join(f"{name}\t{0.5}\n" for name in NAMES).encode(),
        "c.txt.gz": gzip.compress(text.encode()),
        "no suffix": pickle.dumps(NAMES),
        "pairs.pkl": pickle.dumps([(name, 0.5) for name in NAMES]),
        "bytes.pkl": pickle.dumps([name.encode() for name in NAMES]),
        "keys.pkl": pickle.dumps({"keys": NAMES, "more": 1}),
    }
    files |= {f"{protocol}.pkl": pickle.dumps(NAMES, protocol) for protocol in range(6)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def test_lists_in_every_form(tmp_path, split):
    (tmp_path / "lists").mkdir()
    for path in lists(tmp_path / "lists"):
        assert rankings.read_ranking(path, split) == NAMES, path.name


def test_own_lists_come_back(tmp_path, split):
    for compress in (False, True):
        for number in range(2):
            rankings.write_names(tmp_path / f"{number}", NAMES, compress=compress)
        assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
        assert rankings.read_ranking(tmp_path / "0", split) == NAMES


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".P"])
def test_malicious_pickles_are_refused_and_never_run(tmp_path, split, protocol, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"list{suffix}"
    for value in (Payload(marker), [*NAMES, Payload(marker)], {"names": NAMES, "hook": Payload(marker)}):
        path.write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(DataError) as error:
            rankings.read_ranking(path, split)
        assert "\n" not in str(error.value)
        assert "refused, nothing was run" in str(error.value)
        assert "posix.system" in str(error.value)
        assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickles_without_a_suffix_are_never_run(tmp_path, split, protocol):
    marker, path = tmp_path / "marker", tmp_path / "list"
    for value in (Payload(marker), [*NAMES, Payload(marker)]):
        path.write_bytes(pickle.dumps(value, protocol))
        if protocol == 0 and isinstance(value, Payload):
            # A stream of lines, which nothing tells from a list: they are taken for names that no data set has.
            assert rankings.read_ranking(path, split)[:2] == ["cposix", "system"]
            continue
        with pytest.raises(DataError):
            rankings.read_ranking(path, split)
    assert not marker.exists()


def test_arrays_of_objects_are_refused_and_never_run(tmp_path, split):
    marker = tmp_path / "marker"
    for name, save in (("list.npz", np.savez), ("list.npy", np.save)):
        save(tmp_path / name, np.array([Payload(marker), "a"], object))
        with pytest.raises(DataError, match=rf"{name}: damaged, or of another kind"):
            rankings.read_ranking(tmp_path / name, split)
    assert not marker.exists()


def bomb(size):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("names.npy", "w") as entry:
        entry.write(bytes(size))
    return out.getvalue()


def test_bombs_are_refused(tmp_path, split, monkeypatch):
    monkeypatch.setattr(rankings, "MAX_BYTES", 1_000_000)
    for name, content in (("a.npz", bomb(2_000_000)), ("a.txt.gz", gzip.compress(bytes(2_000_000)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"unpacks to more than 1,000,000 bytes"):
            rankings.read_ranking(tmp_path / name, split)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, "can't be read"),
        ("empty.txt", b"", "names no image"),
        ("blank.txt", b"\n\n \n", "names no image"),
        ("empty.pkl", pickle.dumps([]), "names no image"),
        ("image.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0", "neither UTF-8 text"),
        ("zeros.txt", b"a\0b", "not a text file"),
        ("cut.gz", gzip.compress(b"a.jpg\nb.jpg\n" * 1000, mtime=0)[:-20], "damaged"),
        ("numbers.pkl", pickle.dumps([1, 2]), "entry 0 (1) is not a name"),
        ("nested.pkl", pickle.dumps(["a", [["b"]]]), "entry 1 ([['b']]) is not a name"),
        ("scalar.pkl", pickle.dumps("a.jpg"), "holds no list of names"),
        ("other.pkl", pickle.dumps({"images": NAMES}), "holds no list of names"),
        ("old", pickle.dumps(NAMES, 0), "looks like a pickle: give it the suffix .pkl"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, split, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        rankings.read_ranking(path, split)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_nested_lists_that_no_text_can_show_are_refused(tmp_path, split):
    path = tmp_path / "list.pkl"
    often = ["a"]
    for _ in range(40):
        often = [often] * 10
    deep = b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b"."
    for content in (pickle.dumps([often]), deep):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"entry 0 \(\[.*\.\.\..*\) is not a name"):
            rankings.read_ranking(path, split)


def test_a_folder_is_refused(tmp_path, split):
    with pytest.raises(DataError, match="can't be read"):
        rankings.read_ranking(tmp_path, split)


def test_arrays_without_names_are_refused(tmp_path, split):
    np.savez(tmp_path / "features.npz", features=np.zeros((2, 3)), files=np.array([["a", "b"]]))
    with pytest.raises(DataError, match=r"holds no vector of strings called `names` \(features float64\[2, 3\]"):
        rankings.read_ranking(tmp_path / "features.npz", split)


def test_a_gzipped_bomb_is_refused_within_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rankings, "SLACK", 1_000_000)
    path = tmp_path / "names.txt.gz"
    path.write_bytes(gzip.compress(b"a.jpg\n" * 20_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"names\.txt\.gz: unpacks to more than"):
            rankings.read_ranking(path, None)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("start", "part"), [(b"version https://git-lfs", "Git LFS"), (b"<!doctype html>", "a web page")]
)
def test_what_stands_in_the_place_of_a_list(tmp_path, start, part):
    (tmp_path / "list.pkl").write_bytes(start)
    with pytest.raises(DataError, match=part):
        rankings.read_ranking(tmp_path / "list.pkl", None)
