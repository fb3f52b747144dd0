"""The builders as users of TensorFlow Datasets and of Grain know them."""

import pathlib
import subprocess
import sys

import pytest

from data_prep import convert
from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.data import records
from dmosnet_jax.data.splits import load_split
from tests.data_prep import raw_copies

ROOT = pathlib.Path(convert.__file__).resolve().parent.parent
SCENE = Scene(train_ids=3, test_ids=3, cameras=2, images=3, distractors=1, junk=1, image_size=(32, 16))
# The command without its other sub-commands, which need more packages.
TFDS_BUILD = """
from absl import app
from tensorflow_datasets.scripts.cli import build, cli_utils
app.run(lambda args: args.execute(), flags_parser=cli_utils.make_flags_parser(build.Args, description=""))
"""


def tfds_build(folder, *args):
    """Runs `tfds build` away from the checkout."""
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{TFDS_BUILD}", *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "raw"
    raw_copies.write("market1501", folder, SCENE)
    return folder


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tfrecord-?????-of-?????")}


def test_tfds_build_with_manual_dir_gives_what_convert_gives(raw, tmp_path):
    script = ROOT / "data_prep" / "builders" / "market1501.py"
    done = tfds_build(tmp_path, script, f"--manual_dir={raw}", f"--data_dir={tmp_path / 'tfds'}")
    assert done.returncode == 0, done.stderr
    convert.convert("market1501", tmp_path / "data", source=raw)
    ours = shards(tmp_path / "data" / "market1501" / "1.0.0")
    assert len(ours) == 3
    assert shards(tmp_path / "tfds" / "market1501" / "1.0.0") == ours
    # Training reads it, though the index is not there yet.
    assert load_split(tmp_path / "tfds", "market1501", "query").record(0).pid == SCENE.train_ids + 1


def test_a_missing_manual_dir_is_told_with_what_belongs_there(tmp_path):
    script = ROOT / "data_prep" / "builders" / "dukemtmc.py"
    done = tfds_build(tmp_path, script, f"--manual_dir={tmp_path / 'no'}", f"--data_dir={tmp_path / 'tfds'}")
    assert done.returncode != 0
    assert "manual_dir is the folder that the authors of the data set give out" in done.stderr


@pytest.mark.parametrize("dataset", [name for name in convert.DATASETS if name != "folder"])
def test_each_module_holds_the_one_builder_of_its_name(dataset):
    from tensorflow_datasets.core import community

    convert.builder_class_of(dataset)
    builder_class = community.builder_cls_from_module(f"data_prep.builders.{dataset}")
    assert builder_class.name == dataset
    assert "manual_dir" in builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS


def test_no_other_builder_is_registered():
    code = """if True:
        import sys
        import tensorflow_datasets as tfds
        before = set(tfds.list_builders())
        from data_prep import convert
        for dataset in convert.DATASETS:
            convert.builder_class_of(dataset)
        print(set(tfds.list_builders()) - before == set(convert.DATASETS))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_load_and_supervised_pairs(raw, tmp_path):
    import tensorflow_datasets as tfds

    import data_prep.builders.market1501  # noqa: F401 - registers it

    convert.convert("market1501", tmp_path, source=raw)
    data = tfds.load("market1501", data_dir=tmp_path, split="train", download=False, as_supervised=True)
    rows = [(image.shape, int(pid)) for image, pid in data.as_numpy_iterator()]
    split = load_split(tmp_path, "market1501", "train")
    assert rows == [((32, 16, 3), pid) for pid in split.pids.tolist()]


def test_manual_dir_may_hold_the_zip_and_data_source_reads_array_records(raw, tmp_path):
    import shutil

    import tensorflow_datasets as tfds

    from data_prep.builders.market1501 import Market1501

    pytest.importorskip("array_record")
    (tmp_path / "manual").mkdir()
    shutil.make_archive(str(tmp_path / "manual" / "Market"), "zip", raw)
    builder = Market1501(data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / "manual"))
    source = tfds.data_source("market1501", data_dir=tmp_path / "data", split="query")
    convert.convert("market1501", tmp_path / "ours", source=raw)
    split = load_split(tmp_path / "ours", "market1501", "query")
    assert len(source) == len(split) > 0
    for row, found in enumerate(source):
        record = split.record(row)
        labels = int(found["pid"]), int(found["camid"]), found["filename"].decode()
        assert labels == (record.pid, record.camid, record.filename)
        assert found["image"].shape == (32, 16, 3)


def test_grain_iterates_over_the_records(raw, tmp_path):
    import grain

    convert.convert("market1501", tmp_path, source=raw)
    split = load_split(tmp_path, "market1501", "train")
    images = (
        grain.MapDataset.source(split.source).shuffle(seed=0).map(records.parse).map(lambda record: record.filename)
    )
    assert len(images) == len(split)
    assert sorted(images) == sorted(split.filenames())
    assert list(images) != split.filenames()
    batches = list(images.batch(5).to_iter_dataset())
    assert [len(batch) for batch in batches] == [5, 5, 5, len(split) - 15]
    sampler = grain.samplers.IndexSampler(len(split), shuffle=True, seed=0, num_epochs=1)
    assert sorted(grain.DataLoader(data_source=split.source, sampler=sampler)) == sorted(split.source)
