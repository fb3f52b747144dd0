"""The published numbers come out of the real file names and the official split files."""

import gzip
import re

import numpy as np
import pytest

from data_prep.builders import market_layout, msmt17
from data_prep.builders.cuhk03 import protocol_file, scan_folders
from data_prep.builders.cuhk03_detected import Cuhk03Detected
from data_prep.builders.cuhk03_labeled import Cuhk03Labeled
from data_prep.builders.dukemtmc import Dukemtmc
from data_prep.check.rules import identities
from data_prep.sources.mat import read_protocol


def names(path):
    with gzip.open(path, "rt") as file:
        return file.read().split()


def test_dukemtmc(shared):
    listing = Dukemtmc.scan([f"bounding_box_train/{name}" for name in names(shared("lists/duke_train.txt.gz"))])
    train = listing.splits["train"]
    assert (len(train), len(identities([i.pid for i in train], Dukemtmc.RULES))) == Dukemtmc.RULES.official["train"]
    assert (len(train), len({i.pid for i in train})) == (16_522, 702)
    assert {i.camid for i in train} == set(range(1, 9))


@pytest.mark.parametrize(
    ("builder", "counts"),
    [(Cuhk03Detected, (7_365, 1_400, 5_332)), (Cuhk03Labeled, (7_368, 1_400, 5_328))],
)
def test_cuhk03_new_protocol(shared, builder, counts):
    kind = builder.name.removeprefix("cuhk03_")
    protocol = read_protocol(shared(f"lists/{protocol_file(kind)}").read_bytes())
    found = {split: (len(rows), len(set(protocol.pids[rows].tolist()))) for split, rows in protocol.splits.items()}
    assert found == builder.RULES.official
    assert tuple(n for n, _ in found.values()) == counts
    assert set(np.unique(protocol.camids)) == {1, 2}
    # The ready-made folders are named by identity, camera and row, so they say the same as the split file.
    rows = protocol.splits["train"]
    said = sorted(f"{protocol.pids[r]:04d}_c{protocol.camids[r]}_{r + 1}.png" for r in rows)
    real = names(shared(f"lists/cuhk03_np_{kind}_train.txt.gz"))
    assert said == sorted(real)
    listing = scan_folders([f"{kind}/bounding_box_train/{name}" for name in real], f"{kind}/")
    assert len(listing.splits["train"]) == counts[0]
    assert {i.pid for i in listing.splits["train"]} == set(protocol.pids[rows].tolist())
    # A name tells pair, person, camera and number.
    parts = [re.fullmatch(r"([1-5])_\d{3}_([12])_(\d\d)\.png", name) for name in protocol.names]
    assert all(parts)
    assert [int(part[2]) for part in parts] == protocol.camids.tolist()
    assert all((int(part[3]) > 5) == (part[2] == "2") for part in parts)


def test_msmt17_train_and_val(shared):
    files = [f"bounding_box_train/{name}" for name in names(shared("lists/msmt17_train.txt.gz"))]
    files += ["query/0000_c1_0001.jpg", "bounding_box_test/0000_c2_0002.jpg"]
    items = msmt17.scan_renamed(files).splits["trainval"]
    rules = msmt17.Msmt17.RULES
    assert (len(items), len(identities([i.pid for i in items], rules))) == rules.official["trainval"]
    assert (len(items), len({i.pid for i in items})) == (32_621, 1_041)
    assert 0 in {i.pid for i in items}  # a person like any other
    assert {i.camid for i in items} == set(range(1, 16))
    official = msmt17.Msmt17.RULES.official
    assert official["train"].images + official["val"].images == 32_621


def test_msmt17_lists_of_as_many_lines(shared):
    """The official lists name files in another way; of each person the last images are for validation."""

    class Tree:
        location = "msmt17"
        names: tuple[str, ...]
        files: dict[str, bytes]

        def read(self, name):
            return self.files[name]

    lines: dict[int, list[str]] = {}
    for name in names(shared("lists/msmt17_train.txt.gz")):
        pid, camid, number = map(int, re.fullmatch(r"(\d+)_c(\d+)_(\d+)\.jpg", name).groups())
        lines.setdefault(pid, []).append(f"{pid:04d}/{pid:04d}_{number:03d}_{camid:02d}_0303morning_0008_0.jpg {pid}")
    tree = Tree()
    train, val = (
        [line for of_person in lines.values() for line in of_person[part]] for part in (slice(2, None), slice(2))
    )
    tree.files = {f"list_{split}.txt": "\r\n".join(part).encode() for split, part in (("train", train), ("val", val))}
    tree.files |= {
        f"list_{split}.txt": f"0000/0000_00{i}_01_0_0_0.jpg 0\n".encode()
        for i, split in enumerate(("query", "gallery"))
    }
    tree.names = (
        *tree.files,
        *(f"train/{line.split()[0]}" for line in (*train, *val)),
        *(f"test/0000/0000_00{i}_01_0_0_0.jpg" for i in range(2)),
    )
    splits = msmt17.read_lists(tree).splits
    assert len(splits["train"]) + len(splits["val"]) == 32_621
    assert len({i.pid for i in (*splits["train"], *splits["val"])}) == 1_041
    assert {i.camid for i in splits["train"]} == set(range(1, 16))


def test_folders_are_those_of_market1501():
    assert list(market_layout.FOLDERS) == ["bounding_box_train", "query", "bounding_box_test"]
