import io
import itertools
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
from PIL import Image

from data_prep import beam_pipeline, convert, layouts, lint, luperson_source, shards
from data_prep.pedestrians import Scene
from dmosnet_jax.core import places
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import sources
from dmosnet_jax.data.datasets import load_split

ROOT = pathlib.Path(convert.__file__).resolve().parent.parent
SCENE = Scene(train_ids=6, test_ids=3, cameras=4, images=3, image_size=(64, 32))
# About five shards; in this process, for the processes of a real conversion take seconds to start.
SMALL = {"shard_mib": 0.03, "beam_options": "--direct_running_mode=in_memory"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The function `raw(form, **options)`: a source in that form, and its labels."""
    folder = tmp_path_factory.mktemp("raw")
    made = {}

    def give(form="folder", **options):
        key = "-".join(map(str, [form, *itertools.chain(*sorted(options.items()))]))
        if key not in made:
            made[key] = folder / key, layouts.write("luperson", folder / key, SCENE, form=form, **options)["train"]
        return made[key]

    return give


@pytest.fixture
def pictures():
    """The function `pictures(folder, count, bad=())`: a tree of tiny images of which those in `bad` are cut short."""

    def write(folder, count, bad=()):
        for number in range(count):
            place = folder / f"c{number % 2}" / "city" / f"v{number % 6}"
            place.mkdir(parents=True, exist_ok=True)
            out = io.BytesIO()
            Image.new("RGB", (4, 8), (number % 256, number // 256, 0)).save(out, "jpeg")
            data = out.getvalue()
            (place / f"{number:06d}.jpg").write_bytes(data[: len(data) // 2] if number in bad else data)
        return folder

    return write


def run(source, data_dir, **options):
    warnings = []
    summary = convert.convert("luperson", data_dir, source=source, options=SMALL | options, warn=warnings.append)
    return summary, warnings


def rows(data_dir):
    split = load_split(data_dir, "luperson", "train")
    return [split.record(row) for row in range(len(split))]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def jpegs(folder):
    return [path for path in sorted(folder.rglob("*.jpg")) if path.is_file()]


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
        index = sources.load_index(path)
        path.with_name(path.name + sources.INDEX_SUFFIX).unlink()
        for name, value in sources.load_index(path).items():
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


class Attack:
    """A pickle that touches a file when it is loaded by Python."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["alone", "in the list", "in the dict", "beside the keys"])
def test_hostile_keys_are_refused_unread(raw, tmp_path, place):
    database, labels = raw("lmdb")
    source = tmp_path / "raw"
    source.mkdir()
    (source / "data.mdb").write_bytes((database / "lmdb" / "data.mdb").read_bytes())
    names, attack = [x.filename for x in labels], Attack(tmp_path / "touched")
    content = {
        "alone": attack,
        "in the list": [*names, attack],
        "in the dict": {"keys": attack},
        "beside the keys": {"keys": names, "pids": attack},
    }[place]
    for protocol in (0, 2, 4):
        (source / "keys.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(DataError, match=r"keys.pkl: refused, nothing was run: .*system") as error:
            run(source, tmp_path / "data")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "data").exists()


def test_labels_beside_the_keys_may_be_arrays(tmp_path):
    path = tmp_path / "keys.pkl"
    keys = ["00_00_0000_00000000", "00_00_0000_00000001"]
    for protocol in range(6):
        content = {"keys": keys, "vids": np.arange(2), "pids": [np.int64(1), np.int32(2)]}
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert luperson_source.read_keys(path) == keys
        path.write_bytes(pickle.dumps([key.encode() for key in keys], protocol=protocol))
        assert luperson_source.read_keys(path) == keys
    for content in ([], {}, {"names": keys}, [1], [np.str_("a")], np.arange(3), "text"):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=r"keys.pkl: "):
            luperson_source.read_keys(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.write_bytes(b"x"), "is neither a folder nor an LMDB"),
        (lambda f: (f / "country" / "city" / "video").mkdir(parents=True), "holds no image"),
        (lambda f: put(f, "country/a.jpg"), "holds the image country/a.jpg: LUPerson's are laid out as"),
        (lambda f: put(f, "a.jpg"), "holds the image a.jpg"),
        (lambda f: put(f, "c/city/a.jpg", "c/city/v/b.jpg"), "c/city holds both images and folders of videos"),
        (lambda f: put(f, "00_00_0000_00000000.jpg", "a.jpg"), "a.jpg is not numbered as CC_CC_VVVV_MMMMMMMM"),
        (lambda f: put(f, "data.mdb"), "cannot be opened"),
    ],
)
def test_other_sources_are_told_in_one_line(tmp_path, make, message):
    source = tmp_path / "raw"
    make(source)
    with pytest.raises(DataError, match=message) as error:
        run(source, tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("where", ["c0/city/v0/z.jpg", "c0/city/v8", "c9", "0.jpg"])
def test_links_that_lead_out_are_refused(pictures, tmp_path, where):
    source, other = pictures(tmp_path / "raw", 4), pictures(tmp_path / "other", 4)
    (source / "c0" / "city" / "v0" / "again.jpg").symlink_to("000000.jpg")
    assert len(list(luperson_source.find(source).images())) == 5
    (source / where).symlink_to(other / "c0" / "city" / "v0" / "000000.jpg" if "." in where else other / "c0")
    with pytest.raises(DataError, match=f"is refused: {where} is a link that leads out of it"):
        list(luperson_source.find(source).images())


def test_a_link_to_nothing_is_an_unreadable_image(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 2)
    (source / "c0" / "city" / "v0" / "gone.jpg").symlink_to("never.jpg")
    assert [image.size > 0 for image in luperson_source.find(source).images()] == [True, False, True]
    with pytest.raises(DataError, match="1 of the first 2 images are unreadable"):
        run(source, tmp_path / "data")


def test_dictionary_of_bytes(tmp_path):
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps({b"keys": [b"00_00_0000_00000000"]}, protocol=2))
    assert luperson_source.read_keys(tmp_path / "keys.pkl") == ["00_00_0000_00000000"]


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_damaged_databases_and_repeated_keys_are_told(raw, tmp_path):
    database, labels = raw("lmdb")
    content = (database / "lmdb" / "data.mdb").read_bytes()
    source = tmp_path / "raw"
    source.mkdir()
    (source / "data.mdb").write_bytes(content[: len(content) // 2 // 4096 * 4096])
    with pytest.raises(DataError, match=r"data.mdb is cut short: it has [\d,]+ of [\d,]+ bytes"):
        run(source, tmp_path / "data")
    (source / "data.mdb").write_bytes(content)
    for keys, message in (
        ([labels[0].filename] * 2, "lists 00_00_0000_00000000 twice"),
        (["a" * 600], "its key a+ is not numbered"),
        (["\N{GREEK SMALL LETTER ALPHA}"], "is not numbered"),
    ):
        (source / "keys.pkl").write_bytes(pickle.dumps(keys))
        with pytest.raises(DataError, match=message):
            run(source, tmp_path / "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "both"}, "names='both' is unknown"),
        ({"shard_mib": 0.0}, "shard_mib=0.0 must be a number greater than 0"),
        ({"shard_mib": float("nan")}, "shard_mib=nan must be a number greater than 0"),
        ({"shard_mib": float("inf")}, "shard_mib=inf must be a number greater than 0"),
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


def test_beam_is_needed_and_tensorflow_is_not(raw, tmp_path):
    source, labels = raw()
    code = """if True:
        import sys
        from data_prep import convert
        sys.modules.update(dict.fromkeys(sys.argv[3:]))
        print(convert.convert("luperson", sys.argv[2], source=sys.argv[1], options={"shard_mib": 256.0}))
        print("imported:", [name for name in ("tensorflow", "torch") if name in sys.modules])
    """
    command = [sys.executable, "-c", code, str(source), str(tmp_path)]
    done = subprocess.run([*command, "apache_beam"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ConfigError: conversion needs more packages" in done.stderr
    assert "pip install 'dmosnet_jax[convert]'" in done.stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")
    assert len(rows(tmp_path)) == len(labels)


def test_beams_options_reach_beam(raw, tmp_path):
    source, _ = raw()
    with pytest.raises(DataError, match=r"shards were not written: .*NoSuchRunner.*; finished shards are kept"):
        run(source, tmp_path / "data", beam_options="--runner=NoSuchRunner")
    run(source, tmp_path / "data", beam_options="--runner=BundleBasedDirectRunner")
    run(source, tmp_path / "other", beam_options="--direct_running_mode=multi_threading --direct_num_workers=2")
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "other")


def test_a_stopped_conversion_goes_on_without_redoing_shards(raw, tmp_path, monkeypatch):
    source, labels = raw()
    run(source, tmp_path / "whole")
    original, calls = shards._write, []

    def failing(stage, plan, number):
        calls.append(number)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(stage, plan, number)

    monkeypatch.setattr(shards, "_write", failing)
    with pytest.raises(DataError, match=r"cannot write to .*No space left on device.*finished shards are kept"):
        run(source, tmp_path / "data")
    stage = tmp_path / "data" / ".luperson.incomplete"
    finished = {p.name for p in (stage / "done").iterdir()}
    assert len(finished) >= 3
    files = {p.name: p.stat().st_ino for p in (stage / "dataset").iterdir() if p.name.split("-")[2] in finished}
    # One of them is lost, and something that a killed process left.
    lost = sorted(finished)[0]
    next((stage / "dataset").glob(f"*-{lost}-of-?????")).write_bytes(b"short")
    (stage / "dataset" / "luperson-train.tfrecord-00004-of-00006.abc.part").write_bytes(b"half")
    before = len(calls)
    summary, warnings = run(source, tmp_path / "data")
    assert not {int(name) for name in finished - {lost}} & set(calls[before:])
    assert int(lost) in calls[before:]
    assert any(text.startswith("goes on with a conversion that was stopped") for text in warnings)
    assert "were converted before" in str(summary)
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "whole")
    folder = tmp_path / "data" / "luperson" / "1.0.0"
    kept = [name for name in files if name.split("-")[2] != lost]
    assert all((folder / name).stat().st_ino == files[name] for name in kept)
    assert len(rows(tmp_path / "data")) == len(labels)


def test_without_a_terminal_progress_is_told_in_lines(pictures, tmp_path, monkeypatch, capsys):
    source = pictures(tmp_path / "raw", 600)
    run(source, tmp_path / "one")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(beam_pipeline, "_REPORT", 0.0)
    monkeypatch.setattr(beam_pipeline, "_LOCAL_LOOK", 0.01)
    run(source, tmp_path / "two")
    lines = capsys.readouterr().err.splitlines()
    form = re.compile(r"converted (\d+) of 600 images, [\d,]+ images/s, \d\d:\d\d left")
    counts = [int(form.fullmatch(line)[1]) for line in lines]
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= 600


def test_another_source_or_size_begins_anew(pictures, tmp_path, monkeypatch):
    source = pictures(tmp_path / "raw", 300)
    original = shards._write

    def failing(stage, plan, number):
        if number == 2:
            raise OSError(5, "Input/output error")
        return original(stage, plan, number)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", failing)
        for options in ({}, {"names": "numbers"}, {}):
            with pytest.raises(DataError, match="Input/output error"):
                run(source, tmp_path / "data", **options)
    place = source / "c0" / "city" / "v0"
    (place / "more.jpg").write_bytes((place / "000000.jpg").read_bytes())
    summary, warnings = run(source, tmp_path / "data")
    assert not any("goes on" in text for text in warnings)
    assert summary.splits["train"][0] == 301
    assert summary.notes == ()


def test_existing_set_is_kept_unless_overwritten(raw, tmp_path):
    source, _ = raw()
    run(source, tmp_path)
    before = snapshot(tmp_path)
    assert run(source, tmp_path) == (None, [])
    assert snapshot(tmp_path) == before
    options = SMALL | {"names": "numbers"}
    convert.convert("luperson", tmp_path, source=source, options=options, overwrite=True)
    assert rows(tmp_path)[0].filename == "00_00_0000_00000000.jpg"
    assert [p.name for p in tmp_path.iterdir()] == ["luperson"]


def test_remote_data_dir_holds_what_a_local_one_does(raw, tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("DMOSNET_CACHE", str(tmp_path / "cache"))
    source, _ = raw()
    root = f"memory://{uuid.uuid4().hex}/data"
    run(source, tmp_path / "data")
    summary, _ = run(source, root)
    assert summary.folder == f"{root}/luperson/1.0.0"
    local = {str(path): content for path, content in snapshot(tmp_path / "data" / "luperson" / "1.0.0").items()}
    assert {e.name: places.read(places.join(summary.folder, e.name)) for e in places.entries(summary.folder)} == local
    assert [e.name for e in places.entries(root)] == ["luperson"]
    assert rows(root) == rows(tmp_path / "data")
    assert run(source, root) == (None, [])
    # A source behind a URL too.
    for path in jpegs(source):
        places.copy(path, f"{root}/raw/{path.relative_to(source).as_posix()}")
    convert.convert("luperson", root, source=f"{root}/raw", options=SMALL, overwrite=True)
    assert rows(root) == rows(tmp_path / "data")


@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_that_nobody_waits_for_is_left_alone(raw, tmp_path, remote):
    if remote:
        pytest.importorskip("fsspec")
    stage = f"memory://{uuid.uuid4().hex}/stage" if remote else str(tmp_path / "stage")
    shards.install(stage, *shards.make_plan(luperson_source.find(raw()[0]), "luperson", 2**15))
    shards.stop(stage)
    shards.write_shard(stage, 0)
    assert shards.results(stage) == {}


def test_other_data_sets_can_be_remote_too(tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("DMOSNET_CACHE", str(tmp_path / "cache"))
    layouts.write("market1501", tmp_path / "raw", SCENE)
    root = f"memory://{uuid.uuid4().hex}"
    summary = convert.convert("market1501", root, source=tmp_path / "raw")
    assert str(summary).startswith(f"written to {root}/market1501/1.0.0\n")
    convert.convert("market1501", tmp_path / "data", source=tmp_path / "raw")
    for name in ("train", "query", "gallery"):
        here, there = (load_split(place, "market1501", name) for place in (tmp_path / "data", root))
        assert [here.record(i) for i in range(len(here))] == [there.record(i) for i in range(len(there))]
    assert convert.convert("market1501", root, source=tmp_path / "raw") is None


@pytest.mark.slow
def test_killed_half_way_it_goes_on_to_the_same_files(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 12_000)
    data_dir, stage = tmp_path / "data", tmp_path / "data" / ".luperson.incomplete"
    options = ["--shard_mib=0.25", f"--source={source}"]
    command = [sys.executable, "-m", "data_prep.convert", "--dataset=luperson", f"--data_dir={data_dir}", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (stage / "done").exists() or len(list((stage / "done").iterdir())) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [int(line) for line in _children(process.pid)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(_is_worker(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(DataError, match="no data set luperson"):
        load_split(data_dir, "luperson", "train")
    total = len(json.loads((stage / "plan.json").read_text())["images"])
    finished = {p.name for p in (stage / "done").iterdir()}
    assert 3 <= len(finished) < total
    inodes = {p.name: p.stat().st_ino for p in (stage / "dataset").iterdir() if p.name.split("-")[2] in finished}
    # Stopped politely in the middle of it, with one line and no process left.
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (len(list((stage / "done").iterdir())) > len(finished)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert lines == ["interrupted; finished shards are kept, the same command goes on"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: ")] == []
    assert "were converted before" in done.stdout
    folder = data_dir / "luperson" / "1.0.0"
    assert all((folder / name).stat().st_ino == inode for name, inode in inodes.items())
    assert [p.name for p in data_dir.iterdir()] == ["luperson"]
    convert.convert("luperson", tmp_path / "whole", source=source, options=SMALL | {"shard_mib": 0.25})
    assert snapshot(data_dir) == snapshot(tmp_path / "whole")


def _children(pid):
    return subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split()


def _is_worker(pid):
    try:
        return b"beam_worker" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
