"""Each thing that lint looks for is found, before conversion and after, and told by the exit status."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_prep import convert, lint
from data_prep.check.images import Contents, duplicates
from data_prep.synthetic.pedestrians import Scene
from tests.data_prep import raw_copies

ROOT = pathlib.Path(lint.__file__).resolve().parent.parent
SCENE = Scene(train_ids=3, test_ids=3, cameras=2, images=3, distractors=2, junk=2, image_size=(32, 16))


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "raw"
    raw_copies.write("market1501", folder, SCENE)
    return folder


@pytest.fixture
def raw(market, tmp_path):
    shutil.copytree(market, tmp_path / "raw")
    return tmp_path / "raw"


def run(capsys, *arguments):
    status = lint.main(["lint", *arguments])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def told(lines, kind):
    return [line.removeprefix(f"{kind}: ") for line in lines if line.startswith(f"{kind}: ")]


def both_ways(capsys, raw, dataset="market1501"):
    """Findings on the raw data set, and the same on the converted one."""
    status, lines, _ = run(capsys, f"--dataset={dataset}", f"--source={raw}")
    convert.convert(dataset, raw.parent / "data", source=raw)
    after = run(capsys, f"--dataset={dataset}", f"--data_dir={raw.parent / 'data'}")
    assert status == after[0]
    assert [line for line in lines[1:] if "junk" not in line] == after[1][1:]
    return status, lines


def test_images_for_multiple_queries_are_a_split_and_no_duplicates(raw, capsys):
    shutil.copytree(raw / "query", raw / "gt_bbox")
    extra = next((raw / "bounding_box_train").glob("*.jpg"))
    shutil.copy(extra, raw / "gt_bbox")
    status, lines = both_ways(capsys, raw)
    assert status == 0
    # The training image is of no query.
    query = len(list((raw / "query").iterdir()))
    assert lines[5].split()[:3] == ["multi_query", str(query), "3"]
    assert not [line for line in lines if "by content" in line]


def test_clean_copy(raw, capsys):
    status, lines = both_ways(capsys, raw)
    assert status == 0
    assert lines[0] == f"market1501 in {raw}, to be converted"
    train = lines[2].split()
    assert train[:6] == ["train", "18", "12,936", "3", "751", "2"]
    assert train[6:12] == ["32", "to", "32", "16", "to", "16"]
    assert lines[4].split()[:6] == ["gallery", "14", "15,913", "3", "750", "2"]
    assert "  2 junk images (identity -1) will be left out" in lines
    assert len(told(lines, "warning")) == 6
    assert told(lines, "error") == []
    assert lines[-1] == "0 errors, 6 warnings"


def test_identities_in_both_sets(raw, capsys):
    image = sorted((raw / "bounding_box_train").glob("0001_*"))[0]
    shutil.copy(image, raw / "bounding_box_test" / "0001_c2s1_000777_00.jpg")
    status, lines = both_ways(capsys, raw)
    assert status == 1
    assert told(lines, "error") == ["1 identities are in the training set and in the test set: 1"]
    assert any(
        text.startswith("2 images, 1 by content, are in the training set and in the test set, e.g. train: ")
        for text in told(lines, "warning")
    )
    assert lines[-1] == "1 error, 7 warnings"


def test_the_same_number_may_be_somebody_else(tmp_path, capsys):
    raw_copies.write("msmt17", tmp_path / "raw", SCENE)
    status, lines = both_ways(capsys, tmp_path / "raw", "msmt17")
    assert status == 0
    assert lines[3].split()[:2] == ["val", "3"]


def test_queries_without_a_match(raw, capsys):
    for image in (raw / "bounding_box_test").glob("0004_*"):
        image.unlink()
    for image in (raw / "bounding_box_test").glob("0005_c2*"):
        image.unlink()
    status, lines = both_ways(capsys, raw)
    assert status == 0
    [text] = [text for text in told(lines, "warning") if "match" in text]
    # Both of person 4, and of person 5 the one from the camera that is left.
    assert text.startswith("3 of 6 queries have no match in the gallery from another camera: query/0004_c1")
    assert "query/0005_c1s1_000001_00.jpg" in text
    for image in (raw / "bounding_box_test").glob("000[56]*"):
        image.unlink()
    status, lines, _ = run(capsys, "--dataset=market1501", f"--source={raw}")
    assert status == 1
    assert told(lines, "error")[0].startswith("6 of 6 queries have no match")


def test_equal_images(raw, capsys):
    train = sorted((raw / "bounding_box_train").iterdir())
    shutil.copy(train[0], raw / "bounding_box_train" / "0001_c1s1_000888_00.jpg")
    shutil.copy(train[0], raw / "bounding_box_train" / "0001_c1s1_000889_00.jpg")
    other = next(path for path in train if path.name.startswith("0003"))
    shutil.copy(train[5], other)
    query = sorted((raw / "query").iterdir())[0]
    shutil.copy(query, raw / "bounding_box_test" / query.name)
    _, lines = both_ways(capsys, raw)
    kinds = [text for text in told(lines, "warning") if "by content" in text]
    assert kinds == [
        f"3 images, 1 by content, come more than once, e.g. train: bounding_box_train/{train[0].name} = "
        "train: bounding_box_train/0001_c1s1_000888_00.jpg",
        f"2 images, 1 by content, have different identities, e.g. train: bounding_box_train/{train[5].name} = "
        f"train: bounding_box_train/{other.name}",
        f"2 images, 1 by content, are in query and gallery, e.g. query: query/{query.name} = "
        f"gallery: bounding_box_test/{query.name}",
    ]


def test_unreadable_images_and_odd_sizes(raw, capsys):
    from PIL import Image

    train = sorted((raw / "bounding_box_train").iterdir())
    train[0].write_bytes(b"")
    train[1].write_bytes(train[1].read_bytes()[:200])
    Image.new("RGB", (20, 9)).save(train[2])
    status, lines, errors = run(capsys, "--dataset=market1501", f"--source={raw}")
    assert (status, errors) == (1, [])
    [text] = told(lines, "error")
    assert text.startswith(f"2 images of train cannot be read: bounding_box_train/{train[0].name} (")
    assert f"bounding_box_train/{train[1].name} (" in text
    odd = [text for text in told(lines, "warning") if "pixels" in text or "wider" in text]
    assert odd == [
        f"1 images of train are less than 16 pixels high or wide, e.g. bounding_box_train/{train[2].name}",
        f"1 images of train are wider than high, e.g. bounding_box_train/{train[2].name}",
    ]
    # Without reading them, nothing of this is known.
    status, lines, _ = run(capsys, "--dataset=market1501", f"--source={raw}", "--noimages")
    assert status == 0
    assert len(told(lines, "warning")) == 6
    assert lines[2].split() == ["train", "18", "12,936", "3", "751", "2"]


def test_damaged_records(raw, capsys):
    convert.convert("market1501", raw.parent / "data", source=raw)
    [shard] = (raw.parent / "data" / "market1501" / "1.0.0").glob("*-query.tfrecord-00000-of-00001")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, lines, errors = run(capsys, "--dataset=market1501", f"--data_dir={raw.parent / 'data'}")
    assert status == 1
    [text] = told(lines, "error") or errors
    assert shard.name in text


def test_labels_that_the_index_has_otherwise(raw, capsys):
    convert.convert("market1501", raw.parent / "data", source=raw)
    flags = ["--dataset=market1501", f"--data_dir={raw.parent / 'data'}"]
    [shard] = (raw.parent / "data" / "market1501" / "1.0.0").glob("*-query.tfrecord-00000-of-00001")
    sidecar = shard.with_name(shard.name + ".index.npz")
    with np.load(sidecar) as arrays:
        index = dict(arrays)
    pids, camids = index["pid"].copy(), index["camid"].copy()
    index["pid"][2], index["camid"][4] = 7, 9
    np.savez(sidecar, **index)
    status, lines, errors = run(capsys, *flags)
    assert (status, errors) == (1, [])
    [text] = told(lines, "error")
    assert text.startswith("2 of 6 records of query have other labels than the index beside their shard")
    for row, labels in ((2, (7, camids[2])), (4, (pids[4], 9))):
        at = f"{shard}: record {row} at byte {index['offset'][row]}"
        assert f"{at}: pid {pids[row]} and camid {camids[row]}, in the index {labels[0]} and {labels[1]}" in text
    # As it advises.
    sidecar.unlink()
    assert run(capsys, *flags)[0] == 0


def test_sizes_are_those_of_the_decoded_image(raw, capsys):
    """A phone's photo is stored lying and shown upright: what training sees is what lint tells."""
    from PIL import Image

    from dmosnet_jax.data import transforms

    path = sorted((raw / "bounding_box_train").iterdir())[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 40)).save(path, exif=exif)
    height, width = transforms.decode(path.read_bytes()).shape[:2]
    status, lines = both_ways(capsys, raw)
    assert status == 0
    assert lines[2].split()[6:12] == ["32", "to", str(max(height, 32)), "16", "to", str(max(width, 16))]
    assert any("wider than high" in text for text in told(lines, "warning")) == (width > height)


@pytest.mark.parametrize("options", [{}, {"video": False}, {"form": "lmdb"}, {"form": "lmdb", "keys": "dict"}])
def test_luperson_has_no_labels(tmp_path, capsys, options):
    labels = raw_copies.write("luperson", tmp_path / "raw", SCENE, **options)
    status, lines, _ = run(capsys, "--dataset=luperson", f"--source={tmp_path / 'raw'}")
    assert status == 0
    assert lines[2].split()[:3] == ["train", str(len(labels["train"])), "4,180,243"]
    assert lines[-1] == "0 errors, 1 warning"


def test_own_images_without_queries(tmp_path, capsys):
    raw_copies.write("folder", tmp_path / "raw", SCENE, splits=False)
    flags = ["--dataset=folder", f"--source={tmp_path / 'raw'}"]
    status, lines, _ = run(capsys, *flags, "--test_fraction=0")
    assert status == 0
    assert told(lines, "warning") == ["there is no query and no gallery: nothing to evaluate on"]
    status, lines, _ = run(capsys, *flags, "--test_fraction=1")
    assert (status, told(lines, "warning")) == (0, ["there is no train: nothing to train on"])
    shutil.rmtree(tmp_path / "raw")
    raw_copies.write("folder", tmp_path / "raw", SCENE)
    shutil.rmtree(tmp_path / "raw" / "query")
    status, lines, _ = run(capsys, *flags)
    [error] = told(lines, "error")
    assert status == 1
    assert error.startswith("there is gallery without query: an evaluation needs both")


def test_a_data_set_of_any_name_can_be_checked_when_converted(tiny_data, capsys):
    status, lines, _ = run(capsys, "--dataset=tiny", f"--data_dir={tiny_data}")
    assert status == 0
    assert lines[2].split()[:4] == ["train", "48", "8", "2"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "--dataset is missing"),
        (["--dataset=nothing", "--source=s"], 2, "dataset=nothing is unknown: use one of market1501"),
        (["--dataset=market1501"], 2, "give either --source=PATH, the raw data set, or --data_dir=DIR"),
        (["--dataset=market1501", "--source=s", "--data_dir=d"], 2, "give either --source=PATH"),
        (["--dataset=market1501", "--source=s", "--camera_policy=none"], 2, "market1501 has no camera_policy"),
        (["--dataset=luperson", "--source=s", "--camera_policy=none"], 2, "luperson has no camera_policy"),
        (["--dataset=folder", "--data_dir=d", "--test_fraction=0.5"], 2, "test_fraction is for a raw data set"),
        (["--dataset=market1501", "--source=s", "--wat"], 2, "wat"),
        (["--dataset=market1501", "--source=s", "more"], 2, "unexpected argument 'more'"),
        (["--dataset=../x", "--data_dir=d"], 2, "is not a name"),
        (["--dataset=market1501", "--source=nowhere"], 1, "nowhere does not exist"),
        (["--dataset=luperson", "--source=nowhere"], 1, "nowhere"),
        (["--dataset=market1501", "--data_dir=nowhere"], 1, "no data set market1501 in nowhere"),
    ],
)
def test_bad_commands_end_in_one_line(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *arguments)
    assert (found, out, len(err)) == (status, [], 1)
    assert err[0].startswith("error: ")
    assert message in err[0]


def test_as_a_command(raw):
    command = [sys.executable, "-m", "data_prep.lint", "--dataset=market1501", f"--source={raw}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "0 errors, 6 warnings"
    assert lint.main(["lint", "--help"]) == 0


def test_groups_are_those_of_a_direct_search(rng):
    digests = [rng.integers(0, 12, n).astype(np.uint64) for n in (30, 1, 25)]
    contents = {}
    for split, values in zip("abc", digests, strict=True):
        side, size = np.ones(len(values), np.int32), np.ones(len(values), np.int64)
        contents[split] = Contents(values, side, side, size, {})
    places: dict[int, list[tuple[str, int]]] = {}
    for split, values in zip("abc", digests, strict=True):
        for row, value in enumerate(values.tolist()):
            places.setdefault(value, []).append((split, row))
    expected = sorted(group for value, group in places.items() if value != 0 and len(group) > 1)
    assert duplicates(contents) == expected
    assert duplicates({}) == []
