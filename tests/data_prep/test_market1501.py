import gzip

import pytest

from data_prep import lint
from data_prep.builders.base import Item
from data_prep.builders.market1501 import Market1501
from data_prep.check.rules import identities
from dmosnet_jax.core.errors import DataError

RULES = Market1501.RULES


def names(path):
    with gzip.open(path, "rt") as file:
        return [line.split("/")[-1] for line in file.read().split()]


def test_official_lists_give_the_official_numbers(shared):
    files = [
        f"{folder}/{name}"
        for folder, which in (
            ("bounding_box_train", "train"),
            ("query", "query"),
            ("bounding_box_test", "gallery_with_junk"),
        )
        for name in names(shared(f"lists/market1501_{which}.txt.gz"))
    ]
    listing = Market1501.scan(files)
    counts = {
        split: (len(items), len(identities([i.pid for i in items], RULES))) for split, items in listing.splits.items()
    }
    assert counts == RULES.official
    assert counts == {"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 750)}
    assert listing.junk == 19_732 - 15_913
    assert sum(item.pid == 0 for item in listing.splits["gallery"]) == 2_798
    assert {item.camid for items in listing.splits.values() for item in items} == set(range(1, 7))


def test_names_are_read():
    listing = Market1501.scan(
        [
            "bounding_box_test/-1_c1s1_000401_03.jpg",
            "bounding_box_test/0000_c6s3_094992_01.jpg.jpg",
            "bounding_box_test/readme.txt",
            "bounding_box_train/0002_c1s1_000451_03.jpg",
            "bounding_box_train/12345_c15s1_000451_03.JPEG",
            "query/0001_c2s1_000301_00.jpg",
        ]
    )
    assert listing.junk == 1
    assert listing.splits["gallery"] == [Item("bounding_box_test/0000_c6s3_094992_01.jpg.jpg", 0, 6)]
    assert [item[1:] for item in listing.splits["train"]] == [(2, 1), (12345, 15)]
    assert listing.splits["query"] == [Item("query/0001_c2s1_000301_00.jpg", 1, 2)]


def test_images_for_multiple_queries_are_those_of_a_query():
    kept = ["gt_bbox/0001_c2s1_000301_00.jpg", "gt_bbox/0001_c2s3_000901_00.jpg"]
    files = [
        *("gt_bbox/0001_c3s1_000301_00.jpg", "gt_bbox/0002_c2s1_000301_00.jpg", "gt_bbox/Thumbs.db", *kept),
        *("query/0001_c2s1_000301_00.jpg", "bounding_box_test/0001_c3s1_000401_03.jpg"),
    ]
    listing = Market1501.scan(files)
    assert listing.splits["multi_query"] == [Item(name, 1, 2) for name in kept]
    assert [len(listing.splits[split]) for split in ("query", "gallery")] == [1, 1]
    assert "multi_query" not in Market1501.scan([name for name in files if not name.startswith("query")]).splits
    with pytest.raises(DataError, match="1 images are not named"):
        Market1501.scan([*files, "gt_bbox/me.png"])
    # A copy prepared with a folder for each identity.
    moved = {"query/0001_c2s1_000301_00.jpg": "query/0001", "gt_bbox/0001_c2s1_000301_00.jpg": "multi-query/0001"}
    other = "multi-query/0001/0001_c3s1_000301_00.jpg"
    listing = Market1501.scan([*(f"{folder}/{name.split('/')[1]}" for name, folder in moved.items()), other])
    assert listing.splits["multi_query"] == [Item("multi-query/0001/0001_c2s1_000301_00.jpg", 1, 2)]
    assert other in listing.known


def test_every_wrong_name_is_listed():
    wrong = [
        "bounding_box_train/0000_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c1_f000451.jpg",
        "query/0000_c1s1_000451_03.jpg",
        "query/99999999999_c1s1_000451_03.jpg",
        "query/me.png",
    ]
    with pytest.raises(DataError, match="5 images are not named") as error:
        Market1501.scan([*wrong, "query/0001_c1s1_000451_03.jpg"])
    assert all(name in str(error.value) for name in wrong)
    assert "0001_c1s1" not in str(error.value)
    assert "\n" not in str(error.value)


def scanned(*names):
    listing = Market1501.scan(names)
    return {split: [item.filename for item in items] for split, items in listing.splits.items()}, listing


def test_prepared_copies_are_read_by_their_folders():
    """layumi's Person_reID_baseline_pytorch: an identity is a folder, and `train_all` is `train` with `val`."""
    train, junk = "0002_c1s1_000451_03.jpg", "-1_c1s1_000401_03.jpg"
    query, gallery = "0003_c1s6_015971_00.jpg", "0003_c3s3_064744_00.jpg"
    names = [f"train_all/0002/{train}", f"train/0002/{train}", f"val/0002/{train}", f"query/0003/{query}"]
    found, listing = scanned(*names, f"gallery/0003/{gallery}", f"gallery/-1/{junk}", f"multi-query/0003/{query}")
    several = {"multi_query": [f"multi-query/0003/{query}"]}
    assert found == {"train": [names[0]], "query": [names[3]], "gallery": [f"gallery/0003/{gallery}"]} | several
    assert listing.junk == 1
    assert scanned(*names[1:3])[0] == {"train": [names[1]], "val": [names[2]]}
    found, _ = scanned(f"train/{train}", f"Query/{query}", f"test/{gallery}")
    assert found == {"train": [f"train/{train}"], "query": [f"Query/{query}"], "gallery": [f"test/{gallery}"]}


def test_an_image_in_the_folder_of_another_identity_is_named():
    with pytest.raises(DataError, match=r"1 images are not named .*: query/0004/0003_c1s6_015971_00.jpg"):
        scanned("query/0004/0003_c1s6_015971_00.jpg")


def test_what_is_beside_the_data_set_is_told_and_what_is_in_it_is_a_warning(tmp_path):
    for name in (
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c1s1_000452_03.heic",
        "gt_bbox/0002_c1s1_000451_00.jpg",
        "gt_bbox/0002_c1s1_000452_00.jpg",
        "readme.txt",
        "bounding_box_train/Thumbs.db",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    report = lint.lint_source("market1501", tmp_path, images=False)
    warning = "1 files in the folders of the data set are left out: 1 in bounding_box_train (e.g. "
    [found] = [f.text for f in report.findings if "left out" in f.text]
    assert found == f"{warning}bounding_box_train/0002_c1s1_000452_03.heic)"
    [note] = report.notes
    assert note.startswith("3 files are no part of the data set and left out: 2 in gt_bbox (e.g. gt_bbox/")
    assert note.endswith("readme.txt")
