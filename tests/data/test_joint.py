"""Several data sets as one: identities and cameras that never meet, records that are those of the parts."""

import pickle

import numpy as np
import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data.splits import JointSplit, Subset, load_split


@pytest.fixture
def parts(tmp_path, write_dataset, example):
    rows = {
        "market1501": [(2, 1), (2, 6), (1500, 1), (7, 3)],
        # Identities and cameras as in the other, some of them the largest that there are, and distractors.
        "dukemtmc": [(2, 1), (0, 8), (2**31 - 1, 2), (7, 1), (2, 1)],
        "luperson": [(-1, -1), (-1, -1)],
    }
    for name, values in rows.items():
        records = [example(bytes([i]), pid, cam, f"train/{i}.jpg") for i, (pid, cam) in enumerate(values)]
        write_dataset(tmp_path, name, "1.0.0", {"train": [records[:2], records[2:]] if len(records) > 2 else [records]})
    return tuple(load_split(tmp_path, name, "train") for name in rows)


def test_identities_and_cameras_never_meet(parts):
    union = JointSplit(parts)
    assert (union.name, union.split, len(union)) == ("market1501+dukemtmc+luperson", "train", 11)
    assert union.pids.dtype == union.camids.dtype == np.int32
    bounds = np.cumsum([0, *map(len, parts)])
    for values, columns in ((union.pids, [p.pids for p in parts]), (union.camids, [p.camids for p in parts])):
        seen: set[int] = set()
        for first, last, column in zip(bounds, bounds[1:], columns, strict=False):
            own = values[first:last]
            known = column >= 0
            # Equal where they were equal, different where they were different, and unknown where they were unknown.
            np.testing.assert_array_equal(own[known][:, None] == own[known], column[known][:, None] == column[known])
            assert (own[~known] == -1).all()
            assert not seen & set(own[known].tolist())
            seen |= set(own[known].tolist())
        assert seen == set(range(len(seen)))


def test_records_are_those_of_the_parts(parts):
    union = pickle.loads(pickle.dumps(JointSplit(parts)))
    row = 0
    for part in parts:
        for index in range(len(part)):
            found, original = union.record(row), part.record(index)
            assert found.image == original.image
            assert found.filename == f"{part.name}/{original.filename}"
            assert (found.pid, found.camid) == (union.pids[row], union.camids[row])
            row += 1
    assert row == len(union)
    assert union.filenames([10, 0, 4]) == ["luperson/train/1.jpg", "market1501/train/0.jpg", "dukemtmc/train/0.jpg"]
    for index in (-1, 11):
        with pytest.raises(IndexError):
            union.record(index)


def test_parts_may_be_subsets(parts):
    union = JointSplit((Subset(parts[0], np.int32([3, 0])), parts[1]))
    assert union.filenames([0, 1, 2]) == ["market1501/train/3.jpg", "market1501/train/0.jpg", "dukemtmc/train/0.jpg"]
    assert len(np.unique(union.pids[:2])) == 2


def test_damage_is_told_as_in_the_part(parts):
    path = parts[1].source.paths[0]
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff\xff")
    with pytest.raises(DataError, match=r"dukemtmc-train.*: record 0 at byte 0 is corrupt"):
        JointSplit(parts).record(4)
