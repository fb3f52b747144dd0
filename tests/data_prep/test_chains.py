"""Every data set from its raw form to converted records: counts, labels and bytes are those of the generator."""

import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import convert, lint
from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.data.splits import load_split, split_names
from tests.data_prep import raw_copies
from tests.data_prep.raw_copies import Label
from tests.recipes import small

SCENE = Scene(train_ids=5, test_ids=6, cameras=3, images=3, distractors=3, junk=2, image_size=(48, 24))
CASES = {
    "market1501": ("market1501", {}, {}),
    "dukemtmc": ("dukemtmc", {}, {}),
    "cuhk03_detected": ("cuhk03_detected", {}, {}),
    "cuhk03_labeled": ("cuhk03_labeled", {}, {}),
    "cuhk03_detected folders": ("cuhk03_detected", {"form": "folders"}, {}),
    "cuhk03_labeled folders": ("cuhk03_labeled", {"form": "folders"}, {}),
    "msmt17 v1": ("msmt17", {"version": "v1"}, {}),
    "msmt17 v2": ("msmt17", {"version": "v2"}, {}),
    "msmt17 boxes": ("msmt17", {"version": "boxes"}, {}),
    "folder": ("folder", {}, {}),
    "folder csv": ("folder", {"form": "csv"}, {}),
    "folder without cameras": ("folder", {"cameras": False}, {"camera_policy": "none"}),
    "folder csv without cameras": ("folder", {"form": "csv", "cameras": False}, {"camera_policy": "none"}),
}
LAYOUTS = {"msmt17 v1": "msmt17 v1", "msmt17 v2": "msmt17 v2", "cuhk03_detected": "cuhk-03.mat", "folder csv": "csv"}


@pytest.fixture(scope="module", params=CASES)
def chain(request, tmp_path_factory):
    """Name of the case, data set, raw folder, data_dir, labels, and options of the conversion."""
    dataset, options, given = CASES[request.param]
    root = tmp_path_factory.mktemp("chain")
    labels = raw_copies.write(dataset, root / "raw", SCENE, **options)
    assert convert.convert(dataset, root / "data", source=root / "raw", options=given) is not None
    return request.param, dataset, root / "raw", root / "data", labels, given


def records(data_dir, dataset):
    splits = [load_split(data_dir, dataset, name) for name in split_names(data_dir, dataset)]
    return {split.split: [split.record(row) for row in range(len(split))] for split in splits}


def flags(given):
    return [f"--{name}={value}" for name, value in given.items()]


def test_counts_and_labels_are_the_generators(chain):
    name, dataset, _, data_dir, labels, _ = chain
    found = records(data_dir, dataset)
    assert {split: sorted(Label(r.filename, r.pid, r.camid) for r in rows) for split, rows in found.items()} == labels
    people = SCENE.train_ids, SCENE.test_ids
    training = [row for split in ("train", "val", "trainval") for row in found.get(split, ())]
    assert (len({r.pid for r in training}), len({r.pid for r in found["query"]})) == people
    assert sum(map(len, labels.values())) == sum(map(len, found.values())) > 60
    details = json.loads((data_dir / dataset / "1.0.0" / "metadata.json").read_text())
    if name in LAYOUTS:
        assert details["layout"] == LAYOUTS[name]
    if dataset == "folder":
        assert details["camera_policy"] == ("none" if "without" in name else "given")


def test_bytes_survive(chain):
    name, dataset, raw, data_dir, _, _ = chain
    rows = [row for rows in records(data_dir, dataset).values() for row in rows]
    if name not in ("cuhk03_detected", "cuhk03_labeled"):
        assert all(row.image == (raw / row.filename).read_bytes() for row in rows)
        return
    # Read in another way than the conversion does: straight from pair, person and number in the name.
    h5py = pytest.importorskip("h5py")
    with h5py.File(raw / "cuhk-03.mat") as file:
        for row in rows:
            kind, file_name = row.filename.split("/")
            pair, person, _, number = map(int, file_name.removesuffix(".png").split("_"))
            cell = file[file[kind][0, pair - 1]]
            pixels = file[cell[number - 1, person - 1]][()].transpose(2, 1, 0)
            assert row.image[:8] == b"\x89PNG\r\n\x1a\n"
            with Image.open(io.BytesIO(row.image)) as image:
                np.testing.assert_array_equal(np.asarray(image), pixels)


def test_tensorflow_iterates_it(chain):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    _, dataset, _, data_dir, _, _ = chain
    builder = tfds.builder_from_directory(data_dir / dataset / "1.0.0")
    for split, rows in records(data_dir, dataset).items():
        data = builder.as_dataset(split=split).map(
            lambda row: {**row, "image": tf.image.resize(row["image"], (32, 16))}
        )
        seen = list(data.batch(8).as_numpy_iterator())
        assert np.concatenate([batch["pid"] for batch in seen]).tolist() == [row.pid for row in rows]
        assert np.concatenate([batch["camid"] for batch in seen]).tolist() == [row.camid for row in rows]
        assert np.concatenate([batch["filename"] for batch in seen]).tolist() == [r.filename.encode() for r in rows]
        assert {batch["image"].shape[1:] for batch in seen} == {(32, 16, 3)}


def test_lint_finds_no_error_before_and_after(chain, capsys):
    _, dataset, raw, data_dir, labels, given = chain
    for arguments in ([f"--source={raw}", *flags(given)], [f"--data_dir={data_dir}"]):
        assert lint.main(["lint", f"--dataset={dataset}", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("0 errors")
        counts = {line.split()[0]: int(line.split()[1]) for line in lines[2 : 2 + len(labels)]}
        assert counts == {split: len(items) for split, items in labels.items()}
        # A small copy has other numbers than the published data set, and that is all that is wrong with it.
        told = [line for line in lines if line.startswith("warning: ")]
        assert all("the published data set" in line for line in told)
        assert bool(told) == (dataset != "folder")


def test_zip_gives_the_same(chain, tmp_path):
    _, dataset, raw, data_dir, _, given = chain
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(raw.rglob("*")):
            # One's own table has its paths relative to the top.
            root = "" if dataset == "folder" else "download/"
            archive.write(file, root + file.relative_to(raw).as_posix())
        archive.writestr("__MACOSX/._x", b"x")
    convert.convert(dataset, tmp_path / "data", source=tmp_path / "set.zip", options=given)
    assert records(tmp_path / "data", dataset) == records(data_dir, dataset)


def test_every_data_set_can_be_written_small():
    assert set(raw_copies.known()) == set(convert.DATASETS)
    assert {dataset for dataset, _, _ in CASES.values()} | {"luperson", "synthetic"} == set(convert.DATASETS)


@pytest.mark.slow
def test_all_can_be_evaluated(cli, tiny_flags, untrained, tmp_path):
    cases = ("market1501", "dukemtmc", "cuhk03_detected", "cuhk03_labeled", "msmt17 v2", "folder csv without cameras")
    expected = {}
    for case in cases:
        dataset, options, given = CASES[case]
        expected[dataset] = raw_copies.write(dataset, tmp_path / case, SCENE, **options)
        convert.convert(dataset, tmp_path / "data", source=tmp_path / case, options=given)
    fields = {"data_dir": tmp_path / "data", "checkpoint": untrained, "model.name": small.NAME}
    line = tiny_flags("evaluate", dataset="+".join(expected), **fields)
    finished = cli.forked(*line, f"--workdir={tmp_path / 'run'}")
    assert finished.status == 0, finished.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())["datasets"]
    assert list(results) == list(expected)
    for dataset, labels in expected.items():
        found = results[dataset]
        assert (found["num_query"], found["num_gallery"]) == (len(labels["query"]), len(labels["gallery"]))
        assert found["num_valid_query"] == len(labels["query"])
        assert 0 < found["mAP"] <= 1


@pytest.fixture
def untrained(tmp_path) -> pathlib.Path:
    """A network that was not trained."""
    import jax
    import optax

    from dmosnet_jax import models
    from dmosnet_jax.core.parallel import make_mesh
    from dmosnet_jax.train import state as train_state
    from dmosnet_jax.train.checkpoints import Checkpoints

    workdir = tmp_path / "untrained"
    small.register()
    model = models.build(small.NAME, image_size=(64, 32))
    mesh = make_mesh(jax.devices()[:1])
    state = train_state.create(*model.init(jax.random.key(0)), optax.identity(), seed=0, mesh=mesh)
    store = Checkpoints(workdir)
    store.save(state, {"model": {"name": model.name, "neck": model.neck}, "config": {}, "loop": {}})
    store.close()
    return workdir
