import pytest

from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.core.errors import ConfigError, DataError
from tests.data_prep import raw_copies

SCENE = Scene(train_ids=2, test_ids=2, cameras=3, images=2, image_size=(32, 16))


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dataset", [name for name in raw_copies.known() if not name.startswith("cuhk03")])
def test_the_same_scene_gives_the_same_files(dataset, tmp_path):
    first, again = (raw_copies.write(dataset, tmp_path / name, SCENE) for name in ("one", "two"))
    assert first == again
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_both_kinds_of_cuhk03_are_in_one_copy(tmp_path):
    h5py = pytest.importorskip("h5py")
    labels = raw_copies.write("cuhk03_detected", tmp_path / "raw", SCENE)
    assert {label.camid for items in labels.values() for label in items} == {1, 2}
    with h5py.File(tmp_path / "raw" / "cuhk-03.mat") as file:
        assert {"detected", "labeled"} < set(file)
        assert file["detected"].shape == (1, 5)
        assert h5py.check_ref_dtype(file["detected"].dtype) is h5py.Reference
    assert (tmp_path / "raw" / "cuhk-03.mat").read_bytes().startswith(b"MATLAB 7.3 MAT-file")


def test_bad_calls_leave_nothing(tmp_path):
    for dataset, options, message in (
        ("nothing", {}, "dataset=nothing is unknown"),
        ("dukemtmc", {"form": "mat"}, r"dataset=dukemtmc has no option form: there are none"),
        ("msmt17", {"version": "v3"}, "version='v3' is unknown: use one of v1, v2, boxes"),
        ("luperson", {"keys": "set"}, "keys='set' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            raw_copies.write(dataset, tmp_path / "raw", SCENE, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="exists already"):
        raw_copies.write("dukemtmc", tmp_path / "raw", SCENE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot write to"):
        raw_copies.write("dukemtmc", tmp_path / "file" / "raw", SCENE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "raw"]
