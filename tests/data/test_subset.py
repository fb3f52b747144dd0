"""Subsets by an order from outside: exact counts, names in the forms that lists have, the same after a restart."""

import fractions
import math
import pickle

import numpy as np
import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import rankings, subset
from dmosnet_jax.data.pipeline import evaluation_batches
from dmosnet_jax.data.splits import load_split

FOLDERS = [f"CN/Beijing/{video:04d}/{image:08d}.jpg" for video in (1, 12) for image in (3, 1, 2, 4)]


@pytest.fixture
def split_of(tmp_path, write_dataset, example):
    """The function `split_of(names)`: a split whose images have these file names."""

    def make(names, dataset="luperson"):
        rows = [example(b"x" * (5 + i), -1, i % 3, name) for i, name in enumerate(names)]
        write_dataset(tmp_path / f"{len(names)}", dataset, "1.0.0", {"train": [rows[:3], rows[3:]]})
        return load_split(tmp_path / f"{len(names)}", dataset, "train")

    return make


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [
        # The published list's half, and what its authors keep as 60 %.
        (4_180_243, 0.5, 2_090_122),
        (4_180_243, 0.6, 2_508_146),
        (30, 0.1, 3),
        (3, 0.1, 1),
        (10, 0.3, 3),
        (1_000_000, 0.000001, 1),
        (7, 1, 7),
        (7, 1.0, 7),
    ],
)
def test_a_share_is_exact(total, share, count):
    assert subset.share_count(total, share) == count
    assert count == math.ceil(fractions.Fraction(str(share)) * total)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.51, 1.0])
def test_the_best_are_kept_in_the_order_of_the_records(tmp_path, split_of, rng, share):
    split = split_of(FOLDERS)
    scores = rng.normal(size=8).astype(np.float32)
    with (tmp_path / "scores.npz").open("wb") as file:
        rankings.write_scores(file, scores, split)
    chosen, about = subset.choose(split, tmp_path / "scores.npz", share)
    count = math.ceil(8 * share)
    assert len(chosen) == len(chosen.pids) == count
    assert (np.diff(chosen.rows) > 0).all()
    left = np.setdiff1d(np.arange(8), chosen.rows)
    assert left.size == 0 or scores[chosen.rows].min() > scores[left].max()
    assert f"luperson train: {count} of 8 images, the best by {tmp_path / 'scores.npz'}" in about
    # The list of names that goes with the scores chooses the same.
    order = rankings.order(scores)
    rankings.write_names(tmp_path / "names.txt", split.filenames(order), compress=False)
    by_name, about = subset.choose(split, tmp_path / "names.txt", share)
    np.testing.assert_array_equal(by_name.rows, chosen.rows, strict=True)
    assert "(8 names, 0 of them not in the data set, compared by path)" in about


def test_ties_go_to_the_first_records(tmp_path, split_of):
    split = split_of(FOLDERS)
    with (tmp_path / "scores.npz").open("wb") as file:
        rankings.write_scores(file, np.float32([0.1, 0.5, 0.5, 0.5, 0.9, 0.5, 0.1, 0.5]), split)
    assert subset.choose(split, tmp_path / "scores.npz", 0.5)[0].rows.tolist() == [1, 2, 3, 4]
    assert subset.choose(split, tmp_path / "scores.npz", 0.375)[0].rows.tolist() == [1, 2, 4]


def test_a_subset_is_a_split(tmp_path, split_of, rng):
    split = split_of(FOLDERS)
    chosen = subset.Subset(split, np.int32([6, 1, 3]))
    assert (chosen.name, chosen.split, len(chosen)) == ("luperson", "train", 3)
    np.testing.assert_array_equal(chosen.camids, split.camids[[6, 1, 3]], strict=True)
    assert chosen.filenames() == [FOLDERS[row] for row in (6, 1, 3)]
    assert chosen.filenames(np.array([2, 0])) == [FOLDERS[3], FOLDERS[6]]
    copy = pickle.loads(pickle.dumps(chosen))
    assert [copy.record(row) for row in range(3)] == [split.record(row) for row in (6, 1, 3)]
    with pytest.raises(DataError, match=rf"luperson image 0 \({FOLDERS[6]}\)"):
        next(evaluation_batches(chosen, image_size=(8, 4), batch_size=2, threads=0))


def forms():
    keys = [name.removesuffix(".jpg").replace("/", "_") for name in FOLDERS]
    return {
        "path": FOLDERS,
        "path, ./": [f"./{name}" for name in FOLDERS],
        "path, windows": [name.replace("/", "\\") for name in FOLDERS],
        "path without suffix": [name.replace(".jpg", ".png") for name in FOLDERS],
        "the last 4 parts of the path": [f"/home/me/LUP/{name}" for name in FOLDERS],
        "the last 2 parts of the path": [f"/{name.split('/', 2)[2]}" for name in FOLDERS],
        "path joined by _": keys,
    }


@pytest.mark.parametrize("how", list(forms()))
def test_names_in_the_forms_that_lists_have(tmp_path, split_of, how):
    names = forms()[how]
    listed = [names[row] for row in (5, 2, 7, 0)]
    path = tmp_path / "list.pkl"
    path.write_bytes(pickle.dumps(listed))
    found = subset.ranked_rows(split_of(FOLDERS), path)
    assert found.rows.tolist() == [5, 2, 7, 0]
    assert (found.listed, found.unmatched, found.repeated) == (4, 0, 0)
    assert found.how == how.split(",")[0]


def test_paths_with_a_root_find_keys(tmp_path, split_of):
    split = split_of([name.replace("/", "_") for name in FOLDERS])
    path = tmp_path / "list.txt"
    path.write_text("\n".join(f"/mnt/LUP/{FOLDERS[row]}" for row in (5, 2, 7, 0)))
    found = subset.ranked_rows(split, path)
    assert found.rows.tolist() == [5, 2, 7, 0]
    assert found.how == "the last 4 parts of the path joined by _"


def test_only_the_suffix_of_an_image_is_left_away(tmp_path, split_of):
    split = split_of(["us/ny/v1/a.1.jpg", "us/ny/v1/a.2.JPEG", "us/ny/v1/b.jpg.jpg"])
    for listed in (["us/ny/v1/a.2", "us/ny/v1/a.1"], ["v1/a.2.png", "v1/a.1"], ["us_ny_v1_a.2", "us_ny_v1_a.1"]):
        (tmp_path / "list.txt").write_text("\n".join(listed))
        assert subset.ranked_rows(split, tmp_path / "list.txt").rows.tolist() == [1, 0]


def test_names_that_two_images_share_are_not_compared(tmp_path, split_of):
    # Videos number their images alike: the bare file name tells nothing.
    path = tmp_path / "list.txt"
    path.write_text("other/root/0007/00000003.jpg\n")
    twins = split_of([f"v{video}/{image}.jpg" for video in range(2) for image in range(2)])
    with pytest.raises(DataError, match="none of its 1 names"):
        subset.ranked_rows(twins, path)
    path.write_text("elsewhere/v1/0.jpg\n")
    assert subset.ranked_rows(twins, path).rows.tolist() == [2]


def test_unmatched_and_repeated_names_are_counted(tmp_path, split_of):
    path = tmp_path / "list.txt"
    path.write_text("\n".join([FOLDERS[4], "gone.jpg", FOLDERS[1], FOLDERS[4], "CN/Beijing/0099/1.jpg", FOLDERS[0]]))
    split = split_of(FOLDERS)
    chosen, about = subset.choose(split, path, 0.25)
    assert chosen.rows.tolist() == [1, 4]
    assert "(6 names, 2 of them not in the data set, compared by path, 1 repeated)" in about
    chosen, about = subset.choose(split, path, 0.5)
    assert chosen.rows.tolist() == [0, 1, 4]
    assert about.endswith("; a share of 0.5 would be 4")


def test_a_list_of_another_data_set_is_refused(tmp_path, split_of):
    path = tmp_path / "list.txt"
    path.write_text("bounding_box_train/0002_c1s1_000451_03.jpg\nbounding_box_train/0002_c1s1_000551_01.jpg\n")
    with pytest.raises(DataError) as error:
        subset.choose(split_of(FOLDERS), path, 0.5)
    message = str(error.value)
    assert message.startswith(f"{path}: none of its 2 names (the first is 'bounding_box_train/0002_c1s1_000451_03.jpg'")
    assert f" is in luperson train (its first is '{FOLDERS[0]}')" in message
    assert "\n" not in message


def test_names_of_large_sets_are_read_once(tmp_path, split_of, monkeypatch):
    monkeypatch.setattr(subset, "KEEP_FROM", 8)
    split, path = split_of(FOLDERS), tmp_path / "list.txt"
    path.write_text("\n".join([FOLDERS[6], "gone", FOLDERS[2], FOLDERS[6]]))
    reads = []

    def names():
        reads.append(1)
        return split.filenames()

    first = subset.ranked_rows(split, path, names=names)
    again = subset.ranked_rows(split, path, names=names)
    assert len(reads) == 1
    assert first.rows.tolist() == again.rows.tolist() == [6, 2]
    assert (again.listed, again.unmatched, again.repeated, again.how) == (4, 1, 1, "path")
    # Another list under the same name, a damaged file, and a data set of other records.
    path.write_text(FOLDERS[3])
    assert subset.ranked_rows(split, path, names=names).rows.tolist() == [3]
    [kept] = tmp_path.glob("list.txt.rows-*.npz")
    kept.write_bytes(b"damaged")
    assert subset.ranked_rows(split, path, names=names).rows.tolist() == [3]
    other = split_of([*FOLDERS[::-1], "x/1.jpg"])
    assert subset.ranked_rows(other, path).rows.tolist() == [4]
    assert len(reads) == 3
    # Where nothing can be kept, nothing is.
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]
    small = split_of(FOLDERS[:4], "small")
    path.write_text(FOLDERS[0])
    subset.ranked_rows(small, path)
    assert len(list(tmp_path.glob("list.txt.rows-*.npz"))) == 2


def test_a_list_that_names_a_few_of_the_images_is_refused(tmp_path, split_of):
    split = split_of(FOLDERS)
    path = tmp_path / "list.txt"
    foreign = [f"other/{i}.jpg" for i in range(100)]
    path.write_text("\n".join([*FOLDERS[:1], *foreign]))
    with pytest.raises(
        DataError, match=r"only 1 of its 101 names are in luperson train, of whose 8 images 4 are wanted"
    ):
        subset.choose(split, path, 0.5)
    # A short list of its own, and a longer one of a larger data set, are what they say.
    path.write_text("\n".join(FOLDERS[:2]))
    assert len(subset.choose(split, path, 1.0)[0]) == 2
    path.write_text("\n".join([*foreign, *FOLDERS]))
    assert len(subset.choose(split, path, 1.0)[0]) == 8
