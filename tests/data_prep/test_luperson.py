"""LUPerson: what a conversion holds, and which options it takes."""

import io
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep import convert, lint, write
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import shards
from dmosnet_jax.data.splits import load_split
from tests.data_prep.luperson_case import ROOT, SMALL, jpegs, rows, run, snapshot


@pytest.mark.parametrize("video", [True, False])
def test_a_tree_keeps_bytes_order_and_paths(raw, tmp_path, video):
    source, labels = raw(video=video)
    summary, warnings = run(source, tmp_path / "data")
    found = rows(tmp_path / "data")
    files = jpegs(source)
    assert [r.filename for r in found] == [p.relative_to(source).as_posix() for p in files]
    assert [(r.filename, r.pid, r.camid) for r in found] == [tuple(label) for label in labels]
    assert [r.image for r in found] == [p.read_bytes() for p in files]
    videos = sorted({p.parent for p in files})
    assert [r.camid for r in found] == [videos.index(p.parent) if video else 0 for p in files]
    assert summary.splits == {"train": (len(files), 0, len(videos) if video else 1)}
    assert warnings[0] == f"train has {len(files)} images, the published data set 4,180,243"
    assert "names=numbers" in warnings[1]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["luperson"]


@pytest.mark.parametrize("keys", ["list", "dict"])
def test_every_form_gives_the_same_rows(raw, tmp_path, keys):
    tree, _ = raw()
    run(tree, tmp_path / "tree", names="numbers")
    database, labels = raw("lmdb", keys=keys)
    run(database, tmp_path / "lmdb")
    expected = rows(tmp_path / "tree")
    assert rows(tmp_path / "lmdb") == expected
    # The names of the published lists of scores.
    assert [(r.filename, r.pid, r.camid) for r in expected] == [(f"{x.filename}.jpg", -1, x.camid) for x in labels]
    assert len({r.camid for r in expected}) == len({r.filename[:10] for r in expected}) == 4
    flat = tmp_path / "LUP" / "images"
    flat.mkdir(parents=True)
    for record in expected:
        (flat / record.filename).write_bytes(record.image)
    for source in (flat, flat.parent, database / "lmdb" / "data.mdb"):
        data_dir = tmp_path / f"from-{source.name}"
        run(source, data_dir)
        assert rows(data_dir) == expected
    # Without keys.pkl, the keys are those of the database.
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "data.mdb").write_bytes((database / "lmdb" / "data.mdb").read_bytes())
    run(alone, tmp_path / "from-alone")
    assert rows(tmp_path / "from-alone") == expected


@pytest.mark.parametrize("form", ["folder", "lmdb"])
def test_lint_sees_the_same_before_and_after(raw, tmp_path, capsys, form):
    source, labels = raw(form)
    assert lint.main(["lint", "--dataset=luperson", f"--source={source}"]) == 0
    before = capsys.readouterr().out
    run(source, tmp_path)
    assert lint.main(["lint", "--dataset=luperson", f"--data_dir={tmp_path}"]) == 0
    after = capsys.readouterr().out
    (row,) = (line for line in before.splitlines() if line.split()[:1] == ["train"])
    assert row in after.splitlines()
    assert str(len(labels)) in row.split()
    assert "4,180,243" in before
    assert "4,180,243" in after


def test_lint_finds_unreadable_images(pictures, tmp_path, capsys):
    source = pictures(tmp_path / "raw", 100, bad={7})
    assert lint.main(["lint", "--dataset=luperson", f"--source={source}"]) == 1
    assert "c1/city/v1/000007.jpg" in capsys.readouterr().out


def test_shards_indices_and_description_are_those_of_the_other_data_sets(raw, tmp_path):
    source, labels = raw()
    run(source, tmp_path)
    import tensorflow_datasets as tfds

    folder = tmp_path / "luperson" / "1.0.0"
    before = snapshot(folder)
    found = rows(tmp_path)
    assert snapshot(folder) == before  # the indices were there and fit
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].num_examples == len(labels)
    paths = sorted(folder.glob("*.tfrecord-*-of-?????"))
    assert len(paths) == builder.info.splits["train"].num_shards >= 4
    assert all(path.stat().st_size <= 0.03 * 2**20 for path in paths)
    examples = builder.as_dataset(split="train").as_numpy_iterator()
    for record, example in zip(found, examples, strict=True):
        want = (record.pid, record.camid, record.filename.encode())
        assert (example["pid"], example["camid"], example["filename"]) == want
        with Image.open(io.BytesIO(record.image)) as image:
            assert np.abs(np.asarray(image, int) - example["image"]).mean() < 2  # two JPEG decoders
    for path in paths:
        index = shards.load_index(path)
        path.with_name(path.name + shards.INDEX_SUFFIX).unlink()
        for name, value in shards.load_index(path).items():
            np.testing.assert_array_equal(index[name], value, strict=True)


def test_few_unreadable_images_are_left_out_and_listed(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 2000, bad={7})
    folder = os.fsencode(source / "c0" / "city" / "v0")
    os.rename(os.path.join(folder, b"001200.jpg"), os.path.join(folder, b"\xff.jpg"))
    summary, _ = run(source, tmp_path / "data")
    listed = (tmp_path / "data" / "luperson" / "1.0.0" / "unreadable.txt").read_bytes().splitlines()
    assert listed[0] == b"c0/city/v0/\xff.jpg\tits name is not UTF-8 text"
    assert listed[1].startswith(b"c1/city/v1/000007.jpg\t")
    names = [r.filename for r in rows(tmp_path / "data")]
    assert len(names) == 1998
    assert "c1/city/v1/000007.jpg" not in names
    assert "2 unreadable images left out, listed in" in str(summary)


@pytest.mark.parametrize("form", ["tree", "keys"])
def test_more_unreadable_images_end_it_in_one_line(pictures, tmp_path, capsys, form, raw):
    if form == "tree":
        source = pictures(tmp_path / "raw", 1500, bad={7, 8})
    else:
        source = tmp_path / "raw"
        source.mkdir()
        database, labels = raw("lmdb")
        (source / "data.mdb").write_bytes((database / "lmdb" / "data.mdb").read_bytes())
        (source / "keys.pkl").write_bytes(pickle.dumps([*(x.filename for x in labels), "77_00_0000_00000000"]))
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    argv = ["convert", "--dataset=luperson", f"--source={source}", f"--data_dir={tmp_path / 'data'}", *options]
    for _ in range(2):  # going on does not help
        assert convert.main(argv) == 1
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == 1
        assert errors[0].startswith(f"error: {2 if form == 'tree' else 1} of the first ")
        assert "more than 0.1% of all" in errors[0]
    listed = pathlib.Path(errors[0].rsplit(" ", 1)[1]).read_text().splitlines()
    assert len(listed) == (2 if form == "tree" else 1)
    if form == "keys":
        assert listed == ["77_00_0000_00000000\tit is not in the LMDB"]
    with pytest.raises(DataError, match="no data set luperson"):
        load_split(tmp_path / "data", "luperson", "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "both"}, "names='both' is unknown"),
        ({"shard_mib": 0.0}, "shard_mib=0.0 must be a number greater than 0"),
        ({"shard_mib": float("nan")}, "shard_mib=nan must be a number greater than 0"),
        ({"shard_mib": float("inf")}, "shard_mib=inf must be a number greater than 0"),
        ({"workers": -1}, "workers=-1 must be 0, for all cores, or a number of processes"),
        ({"beam_options": "FlinkRunner on four"}, "'FlinkRunner' is no option"),
        ({"beam_options": "--direct_num_workers=two"}, "are not options of Beam's"),
        ({"beam_options": "runner=DataflowRunner"}, "'runner=DataflowRunner' is no option"),
        ({"beam_options": "--runner='Dataflow"}, "are not options of Beam's"),
        ({"test_fraction": 0.5}, "luperson has no test_fraction"),
    ],
)
def test_wrong_options_are_told(raw, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(raw()[0], tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_numbers_need_the_level_of_the_video(raw, tmp_path):
    with pytest.raises(DataError, match="lacks the level of the video"):
        run(raw(video=False)[0], tmp_path / "data", names="numbers")


def test_neither_beam_nor_tensorflow_is_needed(raw, tmp_path):
    source, labels = raw()
    code = """if True:
        import sys
        from data_prep import convert
        sys.modules["apache_beam"] = None
        options = {"shard_mib": 0.03, "workers": 2}
        print(convert.convert("luperson", sys.argv[2], source=sys.argv[1], options=options))
        print("imported:", [name for name in ("tensorflow", "torch") if name in sys.modules])
    """
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(rows(tmp_path / "two")) == len(labels)
    assert done.stdout.endswith("imported: []\n")
    run(source, tmp_path / "one")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_beam_is_asked_for_where_it_is_needed(raw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "data_prep.write.beam", raising=False)
    monkeypatch.delattr(write, "beam", raising=False)
    with pytest.raises(ConfigError, match=r"beam_options need more packages .*pip install 'dmosnet_jax\[convert\]'"):
        run(raw()[0], tmp_path / "data", beam_options="--runner=DataflowRunner")


def test_beam_writes_the_same(raw, tmp_path):
    source, _ = raw()
    with pytest.raises(DataError, match=r"shards were not written: .*NoSuchRunner.*; finished shards are kept"):
        run(source, tmp_path / "data", beam_options="--runner=NoSuchRunner")
    run(source, tmp_path / "data", beam_options="--runner=BundleBasedDirectRunner")
    run(source, tmp_path / "other")
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "other")


def test_beam_lists_unreadable_images(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 100, bad={7})
    with pytest.raises(DataError, match=r"1 of the first \d+ images are unreadable, more than 0.1% of all 100"):
        run(source, tmp_path / "data", beam_options="--runner=BundleBasedDirectRunner")
