"""A user's own folders and tables."""

import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import convert, lint
from data_prep.builders import folder
from data_prep.builders.folder import Folder
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import transforms
from dmosnet_jax.data.splits import load_split
from dmosnet_jax.evaluation import ranking


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def read(source, **options):
    _, listing = Folder.read_source(source, **options)
    return {split: [tuple(item) for item in items] for split, items in listing.splits.items()}


def table(root, text, *names):
    touch(root, *names)
    (root / "table.csv").write_text(text)
    return root


def test_tree_with_splits(tmp_path):
    touch(tmp_path, "train/7/1/a.jpg", "query/9/1/b.PNG", "gallery/9/2/c.jpg", "gallery/9/2/notes.txt")
    assert read(tmp_path) == {
        "train": [("train/7/1/a.jpg", 7, 1)],
        "query": [("query/9/1/b.PNG", 9, 1)],
        "gallery": [("gallery/9/2/c.jpg", 9, 2)],
    }


def test_names_are_numbered(tmp_path):
    touch(tmp_path, "train/bob/door/a.jpg", "query/alice/door/b.jpg", "gallery/alice/yard/c.jpg")
    assert read(tmp_path) == {
        "train": [("train/bob/door/a.jpg", 2, 1)],
        "query": [("query/alice/door/b.jpg", 1, 1)],
        "gallery": [("gallery/alice/yard/c.jpg", 1, 2)],
    }


@pytest.mark.parametrize(("fraction", "tested"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_without_splits_identities_are_shared_out(tmp_path, fraction, tested):
    touch(tmp_path, *(f"{pid}/{camera}/{i}.jpg" for pid in range(8) for camera in (1, 2) for i in range(3)))
    found = read(tmp_path, test_fraction=fraction)
    people = {split: {pid for _, pid, _ in items} for split, items in found.items()}
    assert len(people.get("train", ())) == 8 - tested
    assert people.get("query") == people.get("gallery")
    assert not people.get("train", set()) & people.get("query", set())
    # One query of each person in each camera, the first.
    assert sorted(name for name, _, _ in found.get("query", ())) == sorted(
        f"{pid}/{camera}/0.jpg" for pid in people.get("query", ()) for camera in (1, 2)
    )
    assert sum(map(len, found.values())) == 48
    assert found == read(tmp_path, test_fraction=fraction)


def test_every_tested_identity_keeps_a_gallery(tmp_path):
    touch(tmp_path, *(f"{pid}/{camera}/0.jpg" for pid in range(4) for camera in (1, 2, 3)))
    found = read(tmp_path, test_fraction=1.0)
    assert [name for name, _, _ in found["query"]] == [f"{pid}/1/0.jpg" for pid in range(4)]
    assert len(found["gallery"]) == 8
    # A camera with one image of a person is for the gallery, so that the queries of the others find it.
    touch(tmp_path, "0/2/1.jpg", "9/1/only.jpg")
    found = read(tmp_path, test_fraction=1.0)
    assert [name for name, _, _ in found["query"] if name[0] == "0"] == ["0/2/0.jpg"]
    assert "9/1/only.jpg" in [name for name, _, _ in found["gallery"]]


def test_without_cameras_only_the_query_itself_is_junk(tmp_path):
    text = "path,pid,split\nx/a.jpg,1,query\nx/a.jpg,1,gallery\nx/b.jpg,1,gallery\nx/c.jpg,2,gallery\n"
    table(tmp_path, text, "x/a.jpg", "x/b.jpg", "x/c.jpg")
    found = read(tmp_path, camera_policy="none")
    query, gallery = (np.array([item[1:] for item in found[split]], np.int32) for split in ("query", "gallery"))
    assert len(set(gallery[:, 1])) == 3
    distance = np.array([[0.0, 0.5, 0.4]], np.float32)
    scores = ranking.evaluate(None, None, query[:, 0], gallery[:, 0], query[:, 1], gallery[:, 1], distance=distance)
    # The copy of the query does not count as found, the other image comes after the stranger.
    assert scores["num_valid_query"] == 1
    assert scores["mAP"] == pytest.approx(0.5)
    touch(tmp_path / "tree", "5/deep/er/a.jpg", "5/b.jpg", "6/c.jpg")
    assert sum(map(len, read(tmp_path / "tree", camera_policy="none").values())) == 3


def test_table_itself_as_source(tmp_path):
    text = '\ufeffpid, path ,camid,split,more\n1,"a, b.jpg",4,train,\n2,c.jpg,5,query,x\n2,c.jpg,5,gallery,x\n'
    table(tmp_path, text, "a, b.jpg", "c.jpg", "unrelated/thing.jpg")
    expected = {"train": [("a, b.jpg", 1, 4)], "query": [("c.jpg", 2, 5)], "gallery": [("c.jpg", 2, 5)]}
    assert read(tmp_path / "table.csv") == expected
    assert read(tmp_path) == expected


@pytest.mark.parametrize(
    "path", ["../secret.jpg", "x/../../secret.jpg", "{root}/secret.jpg", "link.jpg", "gone.jpg", "."]
)
@pytest.mark.parametrize("whole", [False, True])
def test_tables_that_lead_out_are_refused(tmp_path, path, whole):
    touch(tmp_path, "secret.jpg")
    path = path.format(root=tmp_path)
    folder = table(tmp_path / "set", f"path,pid,camid,split\n{path},1,1,train\nx/a.jpg,2,1,train\n", "x/a.jpg")
    os.symlink(tmp_path / "secret.jpg", folder / "link.jpg")
    if whole and path != "link.jpg":
        (folder / "link.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 paths of the table are not files inside|link\.jpg is a link that leads out"
    ):
        read(folder if whole else folder / "table.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column path, pid, camid"),
        ("path,pid,split\na.jpg,1,train\n", "no column camid: .* or --camera_policy=none where there are no cameras"),
        ("path,pid,camid,split\na.jpg,,1,train\n", "1 lines lack a value, .*: line 2"),
        ("path,pid,camid,split\na.jpg,1,1,test\n", "or have a split that is not one of train, val, query, gallery"),
        ("path,pid,camid,split\na.jpg,1,1,train\nb.jpg,1,1,\n", "1 of 2 images have no split"),
        ("path,pid,camid,split\na.jpg,1,1,train\na.jpg,2,1,train\n", "images come twice in train: a.jpg"),
        ("path,pid,camid,split\na.jpg,99999999999,1,train\n", "identities must be from -1 to 2147483647: 99999999999"),
        ("path,pid,camid,split\na.jpg,1,-5,train\n", "cameras must be from -1"),
        ('path,pid,camid,split\n"a.jpg,1,1,train\n', "is no CSV table"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, text, message):
    table(tmp_path, text, "a.jpg", "b.jpg")
    for source in (tmp_path, tmp_path / "table.csv"):
        with pytest.raises(DataError, match=message) as error:
            read(source)
        assert "\n" not in str(error.value)


def test_every_format_that_training_reads(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    for suffix in ("jpg", "png", "bmp", "webp"):
        (tmp_path / "raw" / "1" / "1").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "raw" / "1" / "1" / f"a.{suffix}")
    Image.fromarray(pixels).convert("P").save(tmp_path / "raw" / "1" / "1" / "palette.png")
    warnings: list[str] = []
    options = {"test_fraction": 0.0}
    convert.convert("folder", tmp_path / "data", source=tmp_path / "raw", options=options, warn=warnings.append)
    assert warnings == [
        "there is no query and no gallery: nothing to evaluate on",
        "1 images are WebP files, which training reads but tf.data does not",
    ]
    split = load_split(tmp_path / "data", "folder", "train")
    for row in range(len(split)):
        record = split.record(row)
        assert record.image == (tmp_path / "raw" / record.filename).read_bytes()
        assert transforms.decode(record.image).shape == (20, 16, 3)
    assert len(split) == 5


def test_other_depths_are_told(tmp_path):
    touch(tmp_path, "1/a.jpg", "2/b.jpg")
    with pytest.raises(
        DataError, match=r"2 images are not at pid/camera/image.jpg.*give --camera_policy=none: 1/a.jpg"
    ):
        read(tmp_path)
    touch(tmp_path / "empty", "readme.txt")
    with pytest.raises(DataError, match=r"there are no images at pid/camera/image\.jpg"):
        read(tmp_path / "empty")
    touch(tmp_path / "two", "a.csv", "b.csv")
    with pytest.raises(DataError, match=r"several tables \(a\.csv, b\.csv\)"):
        read(tmp_path / "two")


def test_bad_options(tmp_path, capsys):
    touch(tmp_path, "1/1/a.jpg")
    with pytest.raises(ConfigError, match=r"test_fraction=1\.5 must lie between 0 and 1"):
        read(tmp_path, test_fraction=1.5)
    with pytest.raises(ConfigError, match="camera_policy=perhaps is unknown"):
        read(tmp_path, camera_policy="perhaps")
    for arguments, message in (
        (["--dataset=folder", f"--source={tmp_path}", "--camera_policy=perhaps"], "camera_policy"),
        (
            ["--dataset=dukemtmc", f"--source={tmp_path}", "--test_fraction=0.3"],
            "dataset=dukemtmc has no test_fraction",
        ),
        (["--dataset=folder", f"--source={tmp_path}", "--test_fraction=2"], "test_fraction=2.0 must lie"),
    ):
        assert convert.main(["convert", f"--data_dir={tmp_path / 'data'}", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("names", "policy"),
    [
        (["7/1/a.jpg", "7/2/b.jpg", "8/1/c.jpg"], "given"),
        (["train/7/1/a.jpg", "train/8/2/b.jpg"], "given"),
        (["7/a.jpg", "7/b.jpg", "8/c.jpg"], "none"),
        (["query/7/a.jpg", "gallery/7/b.jpg"], "none"),
    ],
)
def test_one_more_folder_around_it_changes_nothing(tmp_path, names, policy, packed):
    plain = touch(tmp_path / "plain", *names)
    nested = touch(tmp_path / "nested", *(f"my data/v2/{name}" for name in names), "my data/README.txt")
    if packed:
        with zipfile.ZipFile(tmp_path / "nested.zip", "w") as archive:
            for path in sorted(nested.rglob("*.*")):
                archive.write(path, path.relative_to(nested))
        nested = tmp_path / "nested.zip"
    assert read(nested, camera_policy=policy) == read(plain, camera_policy=policy)


def test_table_in_one_more_folder(tmp_path):
    table(tmp_path / "my data", "path,pid,camid\n./im/b.jpg,5,2\nim/a.jpg,5,1\n", "im/a.jpg", "im/b.jpg")
    assert read(tmp_path, test_fraction=0.0) == {"train": [("im/a.jpg", 5, 1), ("im/b.jpg", 5, 2)]}


def test_equal_paths_of_a_table_are_recognised(tmp_path):
    table(tmp_path, "path,pid,camid\n./a.jpg,5,2\na.jpg,6,1\n", "a.jpg")
    for source in (tmp_path, tmp_path / "table.csv"):
        with pytest.raises(DataError, match=r"images come twice in train: a\.jpg"):
            read(source, test_fraction=0.0)


def test_empty_table_is_refused(tmp_path):
    table(tmp_path, "path,pid,camid\n")
    with pytest.raises(DataError, match="has no line below its first"):
        read(tmp_path)


def test_image_with_a_line_break_in_its_name_is_not_lost(tmp_path):
    touch(tmp_path, "train/7/1/a\nb.jpg")
    assert read(tmp_path) == {"train": [("train/7/1/a\nb.jpg", 7, 1)]}


def test_names_that_are_no_text_end_it_in_one_line(tmp_path, capsys):
    touch(tmp_path / "raw", "train/7/1/a.jpg")
    raw = os.fsencode(tmp_path / "raw" / "train" / "7" / "1")
    os.rename(raw + b"/a.jpg", raw + b"/a\xff.jpg")
    for command in (convert, lint):
        place = ["--data_dir=" + str(tmp_path / "data")] if command is convert else []
        assert command.main(["x", "--dataset=folder", f"--source={tmp_path / 'raw'}", *place]) == 1
        told = capsys.readouterr().err.strip().split("\n")
        assert len(told) == 1
        assert r"1 file names are not UTF-8 text: rename the files: train/7/1/a\udcff.jpg" in told[0]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("Train", "Query", "Gallery"), ("train", "query", "gallery")),
        (("train", "query", "test"), ("train", "query", "gallery")),
        (("training", "validation", "query", "test"), ("train", "val", "query", "gallery")),
        (("bounding_box_train", "query", "bounding_box_test"), ("train", "query", "gallery")),
        (("train_all", "query", "gallery"), ("train", "query", "gallery")),
        (("TRAIN",), ("train",)),
    ],
)
@pytest.mark.parametrize("cameras", [True, False])
def test_folders_that_are_called_as_splits_are_splits(tmp_path, folders, expected, cameras):
    place = "7/1/a.jpg" if cameras else "7/a.jpg"
    touch(tmp_path, *(f"{folder}/{place}" for folder in folders))
    found = read(tmp_path, camera_policy="given" if cameras else "none")
    assert list(found) == sorted(expected, key=list(found).index)
    assert {pid for items in found.values() for _, pid, _ in items} == {7}


def test_copies_prepared_with_all_training_images_twice_are_read_once(tmp_path):
    """layumi's Person_reID_baseline_pytorch: `train_all` is `train` with `val`."""
    touch(tmp_path, "train_all/2/a.jpg", "train_all/2/b.jpg", "train/2/a.jpg", "val/2/b.jpg")
    touch(tmp_path, "query/3/c.jpg", "gallery/3/d.jpg", "gallery/-1/e.jpg")
    found = read(tmp_path, camera_policy="none")
    assert {split: [name for name, *_ in items] for split, items in found.items()} == {
        "train": ["train_all/2/a.jpg", "train_all/2/b.jpg"],
        "query": ["query/3/c.jpg"],
        "gallery": ["gallery/-1/e.jpg", "gallery/3/d.jpg"],
    }
    assert found["gallery"][0][1] == -1
    report = lint.lint_source("folder", tmp_path, options={"camera_policy": "none"}, images=False)
    assert any("2 files in the folders of the data set are left out: " in f.text for f in report.findings)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("train/1/1/a.jpg", "other/1/1/b.jpg"),
            "the folders train are called as splits, and other beside them are not",
        ),
        (("train/1/1/a.jpg", "test/1/1/b.jpg"), "it is not clear which splits the folders test, train are"),
        (("gallery/1/1/a.jpg", "test/1/1/b.jpg", "query/1/1/c.jpg"), "it is not clear which splits"),
        (("Train/1/a.jpg", "Query/1/b.jpg"), "2 images are not at pid/camera/image.jpg"),
    ],
)
@pytest.mark.parametrize("policy", ["given", "none"])
def test_splits_that_are_not_clear_never_become_identities(tmp_path, names, message, policy):
    if policy == "none" and "not at" in message:
        pytest.skip("these are at their places then")
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, camera_policy=policy)
    assert "camera_policy" not in str(error.value) or "not at" in message


def test_the_advice_about_cameras_is_given_where_it_helps(tmp_path):
    touch(tmp_path / "a", "1/a.jpg", "2/b.jpg")
    with pytest.raises(DataError, match="give --camera_policy=none"):
        read(tmp_path / "a")
    touch(tmp_path / "b", "1/c/d/e/a.jpg", "2/c/d/e/a.jpg")
    with pytest.raises(DataError, match="images are not at pid/camera") as error:
        read(tmp_path / "b")
    assert "camera_policy" not in str(error.value)


@pytest.mark.parametrize(
    ("pids", "expected"),
    [
        (("2.0", "-1.0", "10.0"), (2, -1, 10)),
        (("2", "-1", "10"), (2, -1, 10)),
        (("p2", "-1", "p10"), (2, -1, 1)),
        (("p2", "-1.0", "7"), (2, -1, 1)),
        (("bob", "alice", "-1."), (2, 1, -1)),
    ],
)
def test_minus_one_is_no_identity_however_it_is_written(tmp_path, pids, expected):
    rows = "".join(f"x/{i}.jpg,{pid},1,train\n" for i, pid in enumerate(pids))
    table(tmp_path, f"path,pid,camid,split\n{rows}", *(f"x/{i}.jpg" for i in range(3)))
    assert tuple(pid for _, pid, _ in read(tmp_path)["train"]) == expected


@pytest.mark.parametrize(
    ("pid", "message"),
    [
        ("2.5", "identities must be whole numbers from -1 to 2147483647, or names: 2.5"),
        ("nan", "identities are nan: write -1 where there is none"),
        ("None", "identities are None: write -1"),
        ("1" * 30, "identities must be whole numbers"),
    ],
)
def test_identities_that_are_no_numbers_and_no_names(tmp_path, pid, message):
    table(tmp_path, f"path,pid,camid,split\nx/a.jpg,3,1,train\nx/b.jpg,{pid},1,train\n", "x/a.jpg", "x/b.jpg")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_images_without_identity_are_left_out_of_what_is_split_up(tmp_path):
    touch(tmp_path, *(f"{pid}/{camera}/{i}.jpg" for pid in (-1, 1, 2, 3, 4) for camera in (1, 2) for i in range(2)))
    _, listing = Folder.read_source(tmp_path)
    assert not [item for items in listing.splits.values() for item in items if item.pid == -1]
    assert listing.junk == 4
    assert listing.notes == ("4 images have no identity (-1) and are left out, e.g. -1/1/0.jpg",)
    # A set of such images alone is for pre-training.
    touch(tmp_path / "new", "-1/1/a.jpg", "-1/2/b.jpg")
    assert list(read(tmp_path / "new")) == ["train"]


def test_splits_of_a_table_are_known_by_their_usual_names(tmp_path):
    names = ("a.jpg", "b.jpg", "c.jpg")
    table(tmp_path, "path,pid,camid,split\na.jpg,1,1,Train\nb.jpg,2,1,Query\nc.jpg,2,2,test\n", *names)
    assert list(read(tmp_path)) == ["train", "query", "gallery"]


def test_a_table_of_very_many_lines_is_refused_within_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MAX_ROWS", 1000)
    table(tmp_path, "path,pid,camid,split\n" + ",\n" * 500_000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="has more than 1,000 lines"):
            read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_files_that_are_no_images_by_name_are_counted_and_named(tmp_path):
    touch(tmp_path, "train/1/1/a.jpg", "train/1/1/b.heic", "train/1/1/c.heic", "train/2/1/d.avif", "notes.txt")
    report = lint.lint_source("folder", tmp_path, images=False)
    found = [finding.text for finding in report.findings if "left out" in finding.text]
    assert found == [
        "4 files in the folders of the data set are left out: notes.txt, 3 in train (e.g. train/1/1/b.heic)"
    ]
