import pytest

from data_prep.builders.msmt17 import Msmt17
from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.core.errors import DataError
from tests.data_prep import raw_copies

SCENE = Scene(train_ids=2, test_ids=2, cameras=2, images=2, image_size=(32, 16))


@pytest.fixture
def raw(tmp_path):
    raw_copies.write("msmt17", tmp_path / "raw", SCENE)
    return tmp_path / "raw"


def lines(raw, split):
    return (raw / f"list_{split}.txt").read_text().splitlines()


def append(raw, split, line):
    with (raw / f"list_{split}.txt").open("a") as file:
        file.write(line + "\n")


def test_train_is_without_val_and_numbers_start_anew(raw):
    _, listing = Msmt17.read_source(raw)
    found = {split: {i.pid for i in items} for split, items in listing.splits.items()}
    assert found == {"train": {0, 1}, "val": {0, 1}, "query": {0, 1}, "gallery": {0, 1}}
    assert not {i.filename for i in listing.splits["train"]} & {i.filename for i in listing.splits["val"]}
    assert not Msmt17.RULES.common_ids
    assert listing.notes == ()


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "../../secret.jpg",
        "/etc/secret_0_01_x.jpg",
        "0000/../../0000_000_01_x.jpg",
        "0009/0009_000_01_x.jpg",
    ],
)
def test_lists_that_name_other_files_are_refused(raw, tmp_path, path):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    append(raw, "query", f"{path} 0")
    with pytest.raises(DataError, match=r"list_query\.txt (names 1 files that are not in the source|has 1 lines)"):
        Msmt17.read_source(raw)


def test_bad_lines_are_told(raw):
    for bad in ("0000/0000_000_01_a.jpg", "one two three", "0000/nothing.jpg 3"):
        append(raw, "gallery", bad)
    count = len(lines(raw, "gallery"))
    with pytest.raises(DataError, match=rf"has 3 lines that are not <path> <identity>: line {count - 2} ") as error:
        Msmt17.read_source(raw)
    assert "\n" not in str(error.value)
    (raw / "list_gallery.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"list_gallery\.txt cannot be read"):
        Msmt17.read_source(raw)


def test_missing_and_double_lists(raw):
    append(raw, "val", lines(raw, "train")[0])
    with pytest.raises(DataError, match="1 images are listed twice: train/0000/"):
        Msmt17.read_source(raw)
    (raw / "list_val.txt").unlink()
    with pytest.raises(DataError, match=r"list_val\.txt is missing"):
        Msmt17.read_source(raw)


def test_files_in_no_list_are_counted(raw):
    (raw / "train" / "0000" / "more.jpg").write_bytes(b"x")
    assert Msmt17.read_source(raw)[1].notes == ("1 files in the folders are in no list and are left out",)


def test_both_versions_or_none(raw):
    (raw / "train").rename(raw / "elsewhere")
    with pytest.raises(DataError, match="neither V1"):
        Msmt17.read_source(raw)
    (raw / "elsewhere").rename(raw / "train")
    for name in ("mask_train_v2", "mask_test_v2"):
        (raw / name).mkdir()
        (raw / name / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="both V1 and V2: give one of them"):
        Msmt17.read_source(raw)


def test_lists_as_windows_writes_them(raw):
    before = Msmt17.read_source(raw)[1].splits
    for split in before:
        path = raw / f"list_{split}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Msmt17.read_source(raw)[1].splits == before
